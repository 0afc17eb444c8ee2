"""Hugging Face checkpoint folders to a ``Decoder`` and back: config.json and safetensors, nothing else.

All names, dtypes and shapes are checked from the files' headers before anything is built; then tensors are
read one parameter at a time, fused and cast on the host, and put on the device once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.errors import CheckpointError
from jaxpaged.models.layout import HfTensor, is_ignorable, parameter_layouts
from jaxpaged.models.parameters import split_parameters
from jaxpaged.models.tensor_folder import SINGLE_FILE, TensorFolder, read_json

# Place(path of a parameter, host array) -> device array: where shardings come in.
Place = Callable[[str, np.ndarray], jax.Array]

_STORED_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
_NAMES_SHOWN = 8


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a local checkpoint folder, generation_config.json's end-of-sequence ids included.

    Raises ``CheckpointError`` or ``UnsupportedModelError``, naming the file or the field.
    """
    folder = _folder(path)
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        read_json(folder / "config.json"), read_json(generation) if generation.exists() else None
    )


def load_model(path: str | Path, *, dtype: DTypeLike | None = None, place: Place | None = None) -> Decoder:
    """A ``Decoder`` with the weights of a local Hugging Face checkpoint folder.

    ``dtype`` (bfloat16, float16 or float32) is that of weights and activations, by default the dtype in
    which the checkpoint stores its embedding. ``place`` puts each parameter on its devices; the default is
    JAX's own choice. Needs host memory for one parameter at a time.

    Raises ``CheckpointError`` naming file, tensor, expectation and finding when files are missing,
    truncated or do not fit the configuration, ``UnsupportedModelError`` when the decoder does not compute
    such a model.
    """
    folder = _folder(path)
    config = load_config(folder)
    layouts = parameter_layouts(config)
    with TensorFolder(folder) as tensors:
        _check(tensors, config, [tensor for layout in layouts for tensor in layout.tensors], folder)
        if dtype is None:
            dtype = _STORED_DTYPES[tensors.dtype(layouts[0].tensors[0].name)]
        dtype = jnp.dtype(dtype)
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
        _, merge = split_parameters(model)
        parameters = {}
        for layout in layouts:
            fused = layout.fuse([tensors.read(tensor.name) for tensor in layout.tensors])
            fused = np.ascontiguousarray(fused.astype(dtype, copy=False))
            parameters[layout.path] = jnp.asarray(fused) if place is None else place(layout.path, fused)
        return merge(parameters)


def save_model(model: Decoder, path: str | Path, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes config.json, generation_config.json and model.safetensors in Hugging Face's layout.

    The folder is made when missing; weights are cast to ``dtype`` (bfloat16, float16 or float32). Needs
    host memory for the whole model. Raises ``ValueError`` for another dtype.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in [jnp.dtype(stored) for stored in _STORED_DTYPES.values()]:
        raise ValueError(f"save_model: dtype={dtype.name} is none of bfloat16, float16, float32")
    folder, config = Path(path), model.config
    folder.mkdir(parents=True, exist_ok=True)
    parameters, _ = split_parameters(model)
    tensors = {}
    for layout in parameter_layouts(config):
        parts = layout.split(np.asarray(parameters[layout.path]).astype(dtype))
        for tensor, part in zip(layout.tensors, parts, strict=True):
            tensors[tensor.name] = np.ascontiguousarray(part)
    hf = config.to_hf()
    generation = {name: hf[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "config.json", {**hf, "dtype": dtype.name, "torch_dtype": dtype.name})
    _write_json(folder / "generation_config.json", generation)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{path!s} is not a local folder; models are read from disk, nothing is downloaded"
        )
    return folder


def _check(tensors: TensorFolder, config: ModelConfig, expected: list[HfTensor], folder: Path) -> None:
    """Raises ``CheckpointError`` unless the files hold the expected tensors, and no others that matter."""
    names = set(tensors.names())
    missing = [tensor for tensor in expected if tensor.name not in names]
    if missing:
        listed = _some([f"{tensor.name} {list(tensor.shape)}" for tensor in missing])
        raise CheckpointError(f"{folder}: missing {len(missing)} of {len(expected)} tensors: {listed}")
    unknown = names - {tensor.name for tensor in expected}
    extra = sorted(name for name in unknown if not is_ignorable(config, name))
    if extra:
        where = tensors.file(extra[0])
        raise CheckpointError(
            f"{where}: {len(extra)} tensors that {config.architecture} has no place for: {_some(extra)}"
        )
    for tensor in expected:
        file, shape, dtype = tensors.file(tensor.name), tensors.shape(tensor.name), tensors.dtype(tensor.name)
        if shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {tensor.name}: expected shape {list(tensor.shape)}, got {list(shape)}"
            )
        if dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"{file}: {tensor.name}: expected dtype {' or '.join(_STORED_DTYPES)}, got {dtype}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
