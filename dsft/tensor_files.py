"""Named tensors in safetensors files: written as they come, read one at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsft.checkpoint import another_checkpoint
from dsft.errors import UserError
from dsft.files import write_text

SHARD_BYTES = 4 * 2**30


def write_tensors(folder: Path | None, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors as they come, as stem.safetensors or, above SHARD_BYTES, in numbered files with an index.

    Args:
        folder: where to; None goes through the tensors without writing (they come from collectives).
        stem: name of the files.
        tensors: consumed once, to the end, even when writing has failed.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    failure: Exception | None = None

    def flush() -> None:
        nonlocal failure
        assert folder is not None
        try:
            save_file(pending, folder / f"{stem}.part{len(shards):05d}", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failure = error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if folder is None or failure is not None:
            continue
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
    if folder is None:
        return
    if failure is None:
        flush()
    if failure is not None:
        raise failure
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        whole = len(shards) == 1
        file = f"{stem}.safetensors" if whole else f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}.part{index:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        write_text(folder / f"{stem}.safetensors.index.json", index_text)


class TensorReader:
    """Reads tensors one at a time from what write_tensors has written."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises:
        UserError: missing or damaged files.
        """
        self.folder, self.stem = folder, stem
        self._file_of: dict[str, Path] = {}
        files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*.safetensors"))
        if not files:
            raise UserError(f"{folder / stem}.safetensors is missing; {another_checkpoint(folder)}")
        count = 1 if files[0].name == f"{stem}.safetensors" else int(files[0].stem.rsplit("-", 1)[1])
        if len(files) < count:
            missing = f"{count - len(files)} of the {count} files {folder / stem}-*.safetensors"
            raise UserError(f"missing: {missing}; {another_checkpoint(folder)}")
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} is damaged ({error}); {another_checkpoint(folder)}") from error

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless every one of the named tensors is there, in its shape."""
        for name, shape in shapes.items():
            stored = self._shape_of(name)
            if stored != shape:
                raise UserError(
                    f"{self.folder / self.stem}.safetensors holds {'no' if stored is None else 'another shape of'} "
                    f"'{name}', so it belongs to another model; {another_checkpoint(self.folder)}"
                )

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def __call__(self, name: str) -> torch.Tensor:
        """One tensor, on CPU.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._file_of:
            raise UserError(f"{self.folder / self.stem}.safetensors holds no '{name}'; it belongs to another model")
        with safe_open(self._file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)
