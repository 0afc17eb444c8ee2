"""Which Hugging Face tensors make up each parameter of the decoder, and how to fuse and split them.

Hugging Face stores projections [out, in] and q, k, v, gate and up apart; the decoder stores [in, out] and
fuses (see ``decoder.py``). One table serves both directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.families import family_of

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class HfTensor:
    """A tensor's name and shape in the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter of the decoder: ``fuse(tensors) -> parameter`` and its inverse ``split``."""

    path: str
    tensors: tuple[HfTensor, ...]
    fuse: Callable[[Arrays], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


def parameter_layouts(config: ModelConfig) -> list[ParameterLayout]:
    """One entry for every parameter of ``Decoder(config)``."""
    modules = family_of(config.architecture).modules
    layouts = [
        _plain("embedding", modules["embed"], (config.vocab_size, config.hidden_size)),
        _plain("final_norm.scale", modules["final_norm"], (config.hidden_size,)),
    ]
    if not config.tie_word_embeddings:
        head = HfTensor(f"{modules['lm_head']}.weight", (config.vocab_size, config.hidden_size))
        layouts.append(ParameterLayout("lm_head", (head,), _fuse_transposed, _split_transposed))
    for layer in range(config.num_layers):
        names = {part: module.format(layer=layer) for part, module in modules.items()}
        layouts += _layer_layouts(config, f"layers.{layer}", names)
    return layouts


def is_ignorable(config: ModelConfig, name: str) -> bool:
    """Whether a tensor that the decoder has no place for may be in a checkpoint all the same."""
    derived = name.endswith(".rotary_emb.inv_freq")  # older checkpoints store what the config already says
    head = family_of(config.architecture).modules["lm_head"]
    return derived or (config.tie_word_embeddings and name == f"{head}.weight")


def _layer_layouts(config: ModelConfig, prefix: str, names: dict[str, str]) -> list[ParameterLayout]:
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    widths = [count * config.head_dim for count in heads]
    size, inner = config.hidden_size, config.intermediate_size
    layouts = [
        _plain(f"{prefix}.attn_norm.scale", names["attn_norm"], (size,)),
        _plain(f"{prefix}.mlp_norm.scale", names["mlp_norm"], (size,)),
    ]
    if config.qk_norm:
        layouts += [
            _plain(f"{prefix}.attn.{norm}.scale", names[norm], (config.head_dim,))
            for norm in ("q_norm", "k_norm")
        ]
    qkv = [names[part] for part in "qkv"]
    fuse_qkv, split_qkv = partial(_fuse_qkv, config), partial(_split_qkv, config)
    layouts += _linear(f"{prefix}.attn.qkv", qkv, widths, size, config.attention_bias, fuse_qkv, split_qkv)
    layouts += _linear(
        f"{prefix}.attn.out", [names["attn_out"]], [size], widths[0], config.attention_out_bias
    )
    gate_up = [names["gate"], names["up"]]
    layouts += _linear(f"{prefix}.mlp.gate_up", gate_up, [inner, inner], size, config.mlp_bias)
    layouts += _linear(f"{prefix}.mlp.down", [names["down"]], [size], inner, config.mlp_bias)
    return layouts


def _linear(
    path: str,
    modules: list[str],
    widths: list[int],
    size_in: int,
    bias: bool,
    fuse: Callable[[Arrays], np.ndarray] = np.concatenate,
    split: Callable[[np.ndarray], list[np.ndarray]] | None = None,
) -> list[ParameterLayout]:
    """The kernel and the optional bias of modules whose outputs lie side by side; ``fuse`` joins on axis 0."""
    apart = split or partial(np.split, indices_or_sections=np.cumsum(widths)[:-1])
    kernels = tuple(HfTensor(f"{m}.weight", (w, size_in)) for m, w in zip(modules, widths, strict=True))
    layouts = [
        ParameterLayout(
            f"{path}.kernel", kernels, lambda arrays: fuse(arrays).T, lambda fused: list(apart(fused.T))
        )
    ]
    if bias:
        biases = tuple(HfTensor(f"{m}.bias", (w,)) for m, w in zip(modules, widths, strict=True))
        layouts.append(ParameterLayout(f"{path}.bias", biases, fuse, lambda fused: list(apart(fused))))
    return layouts


def _plain(path: str, module: str, shape: tuple[int, ...]) -> ParameterLayout:
    tensor = HfTensor(f"{module}.weight", shape)
    return ParameterLayout(path, (tensor,), lambda arrays: arrays[0], lambda fused: [fused])


def _fuse_transposed(arrays: Arrays) -> np.ndarray:
    return arrays[0].T


def _split_transposed(fused: np.ndarray) -> list[np.ndarray]:
    return [fused.T]


def _fuse_qkv(config: ModelConfig, arrays: Arrays) -> np.ndarray:
    """q [Hq * D, ...], k and v [Hkv * D, ...] -> [Hkv * (G + 2) * D, ...], each group's heads together."""
    heads = [a.reshape(config.num_kv_heads, -1, config.head_dim, *a.shape[1:]) for a in arrays]
    return np.concatenate(heads, axis=1).reshape(-1, *arrays[0].shape[1:])


def _split_qkv(config: ModelConfig, fused: np.ndarray) -> list[np.ndarray]:
    rest = fused.shape[1:]
    heads = fused.reshape(config.num_kv_heads, config.group_size + 2, config.head_dim, *rest)
    group = config.group_size
    parts = heads[:, :group], heads[:, group : group + 1], heads[:, group + 1 :]
    return [part.reshape(-1, *rest) for part in parts]
