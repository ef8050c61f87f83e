"""Named float32 tensors in safetensors files, written as they arrive and read a part at a time.

The safetensors library writes a file from a dict that holds all of its tensors. A checkpoint may be larger than memory,
so the header is written here first, and the values as they arrive. The library reads the files.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dsft.errors import UserError

Shape = tuple[int, ...]
LARGEST_FILE = 4 * 2**30
SMALLEST_SHARE = 64 * 2**20  # a smaller share per rank is not worth a file
BYTES = 4  # of a float32


@dataclass(frozen=True)
class TensorFile:
    """One file to write, by one rank."""

    name: str
    tensors: list[tuple[str, Shape]]
    owner: int


def grouped(tensors: Sequence[tuple[str, Shape]], limit: int) -> list[list[tuple[str, Shape]]]:
    """Consecutive tensors with at most `limit` bytes together; a larger one is alone."""
    groups: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in tensors:
        more = BYTES * math.prod(shape)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += more
    return groups


def plan_files(stem: str, tensors: Sequence[tuple[str, Shape]], ranks: int, first_owner: int = 0) -> list[TensorFile]:
    """Split tensors into files of similar size: stem.safetensors, or numbered files as transformers names them.

    Args:
        stem: start of the file names.
        tensors: name and shape of each, in order.
        ranks: number of ranks that write.
        first_owner: rank that writes the first file; the others follow round robin.
    """
    total = BYTES * sum(math.prod(shape) for _, shape in tensors)
    limit = min(LARGEST_FILE, max(SMALLEST_SHARE, math.ceil(total / ranks)))
    groups = grouped(tensors, limit)
    count = len(groups)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    owners = [(first_owner + i) % ranks for i in range(count)]
    return [TensorFile(n, group, owner) for n, group, owner in zip(names, groups, owners, strict=True)]


def index_text(files: Sequence[TensorFile]) -> str:
    """stem.safetensors.index.json for several files."""
    weight_map = {name: file.name for file in files for name, _ in file.tensors}
    total = BYTES * sum(math.prod(shape) for file in files for _, shape in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


class TensorWriter:
    """Writes the tensors of one file in order, and computes its checksum."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, Shape]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors:
            start, end = end, end + BYTES * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns values to eight bytes
        self._sum, self._left = hashlib.sha256(), len(text) + 8 + end
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._add(len(text).to_bytes(8, "little") + text)

    def write(self, values: torch.Tensor) -> None:
        """Append values: float32, 1-D, on CPU."""
        self._add(values.contiguous().numpy().view(np.uint8).data)

    def _add(self, data: "bytes | memoryview") -> None:
        self._sum.update(data)
        self._left -= len(data)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def finish(self) -> str:
        """Flush to disk; returns the SHA-256 in hexadecimal digits."""
        assert not self._left, "values and header differ in size"
        os.fsync(self._file.fileno())
        return self._sum.hexdigest()

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: "type[BaseException] | None", error: object, trace: "TracebackType | None") -> None:
        self._file.close()


class TensorReader:
    """Reads the files that TensorWriter writes."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises:
        UserError: missing, additional or damaged files.
        """
        self.folder, self.stem = folder, stem
        self._handle_of: dict[str, Any] = {}
        self._path_of: dict[str, Path] = {}
        for path in _stored_files(folder, stem):
            try:
                handle = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged ({error}); choose another checkpoint") from error
            for name in handle.keys():  # noqa: SIM118 (no dict)
                if name in self._path_of:
                    other = self._path_of[name].name
                    raise UserError(f"{path} and {other} both contain '{name}'; choose another checkpoint")
                self._handle_of[name], self._path_of[name] = handle, path

    @property
    def place(self) -> str:
        """The files as one path."""
        is_single = (self.folder / f"{self.stem}.safetensors").is_file()
        return f"{self.folder / self.stem}{'' if is_single else '-*'}.safetensors"

    def check(self, shapes: dict[str, Shape]) -> None:
        """Raise UserError unless the files contain exactly these tensors, in float32."""
        remedy = "it was saved with another model or other LoRA flags; choose another checkpoint"
        for name, shape in shapes.items():
            handle = self._handle_of.get(name)
            if handle is None:
                raise UserError(f"{self.place} does not contain '{name}': {remedy}")
            part = handle.get_slice(name)
            stored, kind = tuple(part.get_shape()), part.get_dtype()
            if stored != shape or kind != "F32":
                raise UserError(
                    f"{self._path_of[name]}: expected '{name}' to be F32 {list(shape)}, got {kind} {list(stored)}: "
                    f"{remedy}"
                )
        for name in sorted(self._path_of.keys() - shapes.keys()):
            raise UserError(f"{self._path_of[name]} contains '{name}', which the model does not have: {remedy}")

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of the flattened tensor, on CPU; only the rows that contain them are read.

        Raises:
            UserError: no tensor of that name.
        """
        handle = self._handle_of.get(name)
        if handle is None:
            raise UserError(
                f"{self.place} does not contain '{name}': it was saved with another model; choose another checkpoint"
            )
        part = handle.get_slice(name)
        shape = part.get_shape()
        if not shape:
            return handle.get_tensor(name).reshape(1)[start:stop]
        row = math.prod(shape[1:])
        if stop <= start or not row:
            return torch.empty(0)
        first = start // row
        return part[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]


def _stored_files(folder: Path, stem: str) -> list[Path]:
    """stem.safetensors, or all of the numbered files.

    Raises:
        UserError: one is missing or unexpected.
    """
    found = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors"))
    wanted = [f"{stem}.safetensors"]
    numbers = re.fullmatch(r"\d{5}-of-(\d{5})", found[0][len(stem) + 1 : -len(".safetensors")]) if found else None
    if numbers and not (folder / wanted[0]).is_file():
        wanted = [f"{stem}-{i + 1:05d}-of-{numbers[1]}.safetensors" for i in range(int(numbers[1]))]
    for name in wanted:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; choose another checkpoint")
    for name in found:
        if name not in wanted:
            raise UserError(f"{folder / name} does not belong to {folder.name}; choose another checkpoint")
    return [folder / name for name in wanted]
