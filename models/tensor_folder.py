"""The safetensors of a checkpoint folder: one file, or shards under an index. Nothing is unpickled."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes  # noqa: F401  safetensors finds numpy's bfloat16 only after this import
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpaged.models.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorFolder:
    """Headers of all tensors at once, contents one at a time; a context manager.

    Invariant: every name in ``names()`` is in exactly one open file.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the files; ``CheckpointError`` names one that is missing, truncated or not safetensors."""
        self._files: dict[str, tuple[Path, Any]] = {}
        for file in _tensor_files(folder):
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118  not a mapping
                if name in self._files:
                    raise CheckpointError(f"{file}: tensor {name} is also in {self._files[name][0]}")
                self._files[name] = file, handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()  # dropping the last reference unmaps a file

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._files.keys()

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._files[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype as safetensors spells it ("BF16", "F32", ...), from the header."""
        return self._files[name][1].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """The tensor's content in its stored dtype."""
        return self._files[name][1].get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ``CheckpointError`` names the file otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        note = f"; {', '.join(pickles)} hold pickles, which are never read" if pickles else ""
        raise CheckpointError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} found{note}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names, got {shards!r:.80}")
    for shard in set(shards.values()):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} in weight_map is not a file name in the same folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _open(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
