"""A decoder's hyper-parameters, read from and written to Hugging Face's config.json (transformers 4 and 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.models.errors import CheckpointError, UnsupportedModelError
from jaxpaged.models.families import family_of
from jaxpaged.models.families.fields import HfFields

# What transformers assumes for absent fields, whatever the family.
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length.

    ``linear`` divides every frequency by ``factor`` (Chen et al. 2023, arXiv:2306.15595). ``llama3`` divides
    only those whose wavelength exceeds ``original_max_position_embeddings / low_freq_factor``, leaves
    those below ``original_max_position_embeddings / high_freq_factor`` and blends between (Llama 3.1).
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise UnsupportedModelError(
                f"rope_type={self.rope_type!r} is not supported: only 'linear', 'llama3'"
            )
        if self.factor <= 0 or self.high_freq_factor <= self.low_freq_factor:
            raise UnsupportedModelError(
                f"{self}: factor must be above 0, high_freq_factor above low_freq_factor"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a decoder's shapes and arithmetic; hashable.

    ``sliding_windows`` has one entry a layer: the number of most recent positions a token attends to,
    itself included, or None for all. ``attention_bias`` is that of q, k and v. Raises
    ``UnsupportedModelError`` where the numbers do not fit together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UnsupportedModelError(f"{name}={getattr(self, name)} must be at least 1")
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise UnsupportedModelError(f"sliding_windows={self.sliding_windows} must be at least 1 or None")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim={self.head_dim} is odd: rotary embeddings need pairs")
        if len(self.sliding_windows) != self.num_layers:
            raise UnsupportedModelError(
                f"sliding_windows has {len(self.sliding_windows)} entries for num_layers={self.num_layers}"
            )
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if not 0 <= token_id < self.vocab_size:
                raise UnsupportedModelError(f"token id {token_id} is outside of vocab_size={self.vocab_size}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Reads config.json's fields and, for the end-of-sequence ids, generation_config.json's.

        Raises ``CheckpointError`` for a malformed field and ``UnsupportedModelError`` for a legal value
        that the decoder does not compute; both name the field and its value.
        """
        family = family_of(_architecture(hf))
        fields = HfFields(_without_nulls(hf), {**_COMMON_DEFAULTS, **family.defaults})
        _reject_unsupported(fields)
        num_heads = fields.positive_int("num_attention_heads")
        hidden_size = fields.positive_int("hidden_size")
        rope_theta, rope_scaling = _rope(fields)
        generation_fields = HfFields(generation or {}, {})
        eos_ids = fields.token_ids("eos_token_id") + generation_fields.token_ids("eos_token_id")
        return cls(
            architecture=family.architecture,
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=fields.positive_int("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads
            if fields.raw("num_key_value_heads") is None
            else fields.positive_int("num_key_value_heads"),
            head_dim=hidden_size // num_heads
            if fields.raw("head_dim") is None
            else fields.positive_int("head_dim"),
            rms_norm_eps=fields.positive_float("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            bos_token_id=fields.optional_int("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(eos_ids)),
            **family.traits(fields),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json fields that ``from_hf`` reads back to an equal configuration.

        Both the spellings of transformers 4 (``rope_theta``, ``rope_scaling``) and of 5
        (``rope_parameters``) are written.
        """
        family = family_of(self.architecture)
        scaling = _rope_to_hf(self.rope_scaling)
        eos = list(self.eos_token_ids)
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            **family.to_hf(self),
        }


# Fields for which null means something; elsewhere null is read as absent.
_NULLABLE = frozenset({"sliding_window", "bos_token_id", "eos_token_id"})


def _without_nulls(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf.items() if value is not None or name in _NULLABLE}


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config.json: architectures must be a list of one name, got {names!r}")
    return names[0]


def _reject_unsupported(fields: HfFields) -> None:
    if fields.raw("hidden_act") != "silu":
        raise fields.unsupported("hidden_act", "only 'silu'")
    if fields.raw("quantization_config") is not None:
        raise fields.unsupported("quantization_config", "weights must be bfloat16, float16 or float32")


def _rope(fields: HfFields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    name = "rope_parameters" if fields.raw("rope_parameters") is not None else "rope_scaling"
    entries = fields.optional_mapping(name)
    theta = fields.positive_float("rope_theta")
    if entries is None:
        return theta, None
    rope = HfFields(entries, {"rope_theta": theta, "rope_type": entries.get("type", "default")})
    if rope.raw("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.unsupported("partial_rotary_factor", "the whole head must rotate")
    theta = rope.positive_float("rope_theta")
    rope_type = rope.raw("rope_type")
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", rope.positive_float("factor"))
    if rope_type == "llama3":
        return theta, RopeScaling(
            "llama3",
            rope.positive_float("factor"),
            rope.positive_float("low_freq_factor"),
            rope.positive_float("high_freq_factor"),
            rope.positive_int("original_max_position_embeddings"),
        )
    raise UnsupportedModelError(
        f"config.json: {name}.rope_type={rope_type!r} is not supported: only 'default', 'linear', 'llama3'"
    )


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.rope_type,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
