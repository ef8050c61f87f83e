"""A small Hub on this machine: the HTTP endpoints for uploading models and downloading datasets."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, READ_ONLY = "hf_" + "t" * 34, "hf_" + "r" * 34


@dataclass
class Repository:
    """What the Hub has of one model."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class Hub:
    """Serves while it is open."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """For a process that takes this for the Hub. Chunked storage is another server's business, so it is off."""
        variables = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        return variables | ({"HF_TOKEN": token} if token else {"HF_TOKEN": ""})

    # What each endpoint answers: status and a JSON value

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        """One request."""
        self.requests.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            return self._check_card(json.loads(body))
        if path.startswith("/storage/"):
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if path.startswith("/api/datasets/"):
            return self._describe(path.removeprefix("/api/datasets/"))
        if token not in (TOKEN, READ_ONLY):
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if token == READ_ONLY:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            kinds = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            return 200, {"files": kinds}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]}
        if "/tree/" in path:
            files = self.repositories[name].files.items()
            return 200, [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files]
        if "/commit/" in path:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": self.repositories[name].private}

    def _describe(self, place: str) -> tuple[int, Any]:
        """A dataset, its revision, or the tree of its files."""
        name = "/".join(place.split("/")[:2])
        if name not in self.datasets:
            return 404, {"error": "Repository not found"}
        files = self.datasets[name]
        if "/tree/" in place:
            oid = hashlib.sha1
            return 200, [
                {"type": "file", "path": p, "size": len(b), "oid": oid(b).hexdigest()} for p, b in files.items()
            ]
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "sha": "2" * 40, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def file(self, path: str) -> bytes | None:
        """The content of /datasets/OWNER/NAME/resolve/REVISION/FILE."""
        _, kind, owner, name, resolve, _, *parts = path.split("/") if path.count("/") > 5 else [""] * 6
        if (kind, resolve) != ("datasets", "resolve"):
            return None
        return self.datasets.get(f"{owner}/{name}", {}).get("/".join(parts))

    def _check_card(self, asked: dict[str, Any]) -> tuple[int, Any]:
        metadata = yaml.safe_load(asked["content"].split("---")[1])
        if not isinstance(metadata.get("license"), str):
            return 400, {"errors": [{"message": '"license" is required'}]}
        return 200, {"warnings": [], "errors": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.repositories
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories.setdefault(name, Repository(private))
        return (409 if exists else 200), {"url": f"{self.address}/{name}", "name": name, "id": name}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.address}/storage/{wanted['oid']}", "header": {}}
        return wanted | {"authenticated": True, "actions": {"upload": upload}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.repositories[name].files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.repositories[name].files[value["path"]]
            elif line["key"] == "lfsFile":
                content = self._large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.repositories[name].files[value["path"]] = content
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.address}/{name}/commit/{'1' * 40}"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self._body()
                token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
                if (found := hub.file(self.path.partition("?")[0])) is not None:
                    self.send_response(200)
                    self.send_header("ETag", f'"{hashlib.sha1(found).hexdigest()}"')
                    self.send_header("X-Repo-Commit", "2" * 40)
                    self.send_header("Content-Length", str(len(found)))
                    self.end_headers()
                    if self.command == "GET":
                        self.wfile.write(found)
                    return
                status, value = hub.answer(self.command, self.path.partition("?")[0], token, body)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_POST = do_PUT = do_HEAD = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
