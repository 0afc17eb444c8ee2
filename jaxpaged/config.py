"""What an engine is built with: sizes and switches, checked before anything is allocated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxpaged.buckets import token_buckets
from jaxpaged.errors import InvalidRequestError
from jaxpaged.kv_cache_dtype import AUTO, PLAIN, checked_dtypes, checked_layers, layer_dtypes

MAX_SWAP_SPACE = 1 << 16  # GiB
DTYPES = PLAIN


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's sizes, all resolved. Defaults that depend on device and model are filled in by ``resolve``.

    Names are vLLM's where vLLM has them. Raises InvalidRequestError (a ValueError) naming argument and value.

    Attributes:
      dtype: of weights and activations.
      kv_cache_dtype: in what keys and values are kept: "auto" (the model's dtype), "float32", "bfloat16", "float16",
        "fp8" (or "fp8_e4m3"), "int8" or "int4"; or a sequence with one of them for each layer. Quantised ones have
        a scale for each token and head. An engine's own ``config`` has what it came to: a name without "auto", or a
        tuple of them.
      kv_cache_dtype_skip_layers: layers, counted from 0, that keep the model's dtype whatever ``kv_cache_dtype`` says.
      max_model_len: prompt and output tokens of one sequence.
      block_size: tokens a block.
      num_blocks: blocks of the pool, the dummy included; None sizes it by the memory there is.
      gpu_memory_utilization: share of the device's memory that weights, activations and pool may take together.
      max_num_seqs: sequences of one step.
      max_num_batched_tokens: tokens of one step.
      enable_prefix_caching: whether full blocks are found again by later requests.
      attention: implementation of paged attention; None takes the best for the device.
      seed: of requests that bring none.
      warmup: compile all buckets before the constructor returns, and forbid compiling afterwards.
      max_logprobs: most likely tokens that a request may ask for.
      logprobs_mode: log-probabilities of the model's own logits or of what is left after the processors.
      num_scheduler_steps: decode steps that run in one program while a few rows do nothing else; their tokens
        come together. 1 turns it off.
      watermark: share of the blocks that a new request must leave free.
      scheduling_policy: who is admitted first and who gives way: "fcfs", "priority", "shortest-prompt-first",
        "longest-prefix-match", or a ``SchedulingPolicy``: an instance, a class or its dotted name.
      tenant_weights: shares of tenants beside 1, that of all others.
      preemption_mode: what becomes of a request that gives up its blocks: "recompute", "swap" to the host, or "auto",
        whichever is estimated to cost less.
      swap_space: GiB of host memory for blocks that do not fit the pool: of preempted requests, and of cached prefixes
        that were evicted. ``num_host_blocks`` overrides it.
      async_scheduling: plan and hand over a step while the one before runs.
      memory_warning, memory_critical: shares of the blocks in use from which on no request is admitted while others
        run, and steps are halved; 1 turns either off.
      deterministic: a request's tokens and log-probabilities are bitwise the same whatever else is in the batch, and
        however it is chunked, preempted or found in the prefix cache. Slower: rows go in tiles of one size.
    """

    dtype: str
    max_model_len: int
    kv_cache_dtype: str | Sequence[str] = AUTO
    kv_cache_dtype_skip_layers: Sequence[int] = ()
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    attention: str | None = None
    seed: int = 0
    warmup: bool = False
    max_logprobs: int = 20
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    num_scheduler_steps: int = 1
    watermark: float = 0.01
    scheduling_policy: Any = "fcfs"
    tenant_weights: Mapping[str, float] | None = None
    preemption_mode: Literal["auto", "recompute", "swap"] = "auto"
    swap_space: float = 0.0
    num_host_blocks: int | None = None
    async_scheduling: bool = False
    memory_warning: float = 0.95
    memory_critical: float = 0.99
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidRequestError("dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        object.__setattr__(self, "kv_cache_dtype", checked_dtypes(self.kv_cache_dtype))
        object.__setattr__(
            self, "kv_cache_dtype_skip_layers", checked_layers(self.kv_cache_dtype_skip_layers)
        )
        for name, low in (
            ("max_model_len", 1),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_logprobs", 1),
            ("num_scheduler_steps", 1),
        ):
            _check_int(name, getattr(self, name), low)
        for name, low in (("num_blocks", 2), ("num_host_blocks", 0)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"must be at least max_num_seqs={self.max_num_seqs}: every sequence needs a token a step",
            )
        _check_share("gpu_memory_utilization", self.gpu_memory_utilization)
        _check_share("watermark", self.watermark, zero=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InvalidRequestError("seed", self.seed, "must be an integer")
        if self.preemption_mode not in ("auto", "recompute", "swap"):
            raise InvalidRequestError(
                "preemption_mode", self.preemption_mode, "must be 'auto', 'recompute' or 'swap'"
            )
        if not _is_number(self.swap_space) or not 0 <= self.swap_space <= MAX_SWAP_SPACE:
            raise InvalidRequestError("swap_space", self.swap_space, f"must be GiB in [0, {MAX_SWAP_SPACE}]")
        for name in ("enable_prefix_caching", "warmup", "async_scheduling", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "must be True or False")
        if self.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise InvalidRequestError(
                "logprobs_mode", self.logprobs_mode, "must be 'raw_logprobs' or 'processed_logprobs'"
            )

    @classmethod
    def resolve(
        cls, arguments: dict[str, Any], *, platform: str, max_position_embeddings: int
    ) -> "EngineConfig":
        """Fills in what was None: a CPU gets smaller steps and float32, in which it is fastest."""
        known = {field.name for field in fields(cls)}
        for name, value in arguments.items():
            if name not in known:
                raise InvalidRequestError(name, value, "is not an argument of the engine")
        on_cpu = platform == "cpu"
        defaults: dict[str, Any] = {
            "dtype": "float32" if on_cpu else "bfloat16",
            "max_model_len": max_position_embeddings,
            "max_num_seqs": 64 if on_cpu else 256,
            "max_num_batched_tokens": 1024 if on_cpu else 8192,
            # On a CPU the host's work and the device's share the cores, so nothing hides it.
            "num_scheduler_steps": 8 if on_cpu else 1,
            "async_scheduling": not on_cpu,
            # A CPU's pool is in host memory already.
            "swap_space": 0.0 if on_cpu else 4.0,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        if isinstance(given.get("max_num_seqs"), int) and "max_num_batched_tokens" not in given:
            defaults["max_num_batched_tokens"] = max(
                defaults["max_num_batched_tokens"], given["max_num_seqs"]
            )
        if isinstance(given.get("max_num_batched_tokens"), int) and "max_num_seqs" not in given:
            defaults["max_num_seqs"] = max(1, min(defaults["max_num_seqs"], given["max_num_batched_tokens"]))
        config = cls(**(defaults | given))
        if config.max_model_len > max_position_embeddings:
            raise InvalidRequestError(
                "max_model_len",
                config.max_model_len,
                f"the model has positions up to max_position_embeddings={max_position_embeddings} only",
            )
        return config

    def layer_dtypes(self, num_layers: int) -> tuple[str, ...]:
        """In what each layer of a model keeps its keys and values; raises InvalidRequestError if they do not fit it."""
        dtypes = checked_dtypes(self.kv_cache_dtype)
        return layer_dtypes(dtypes, self.kv_cache_dtype_skip_layers, self.dtype, num_layers)

    @property
    def table_width(self) -> int:
        """Entries of a block table: M."""
        return -(-self.max_model_len // self.block_size)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Token counts that have a compiled program."""
        return token_buckets(self.max_num_batched_tokens, self.max_num_seqs)


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidRequestError(name, value, f"must be an integer of at least {low}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_share(name: str, value: object, *, zero: bool = False) -> None:
    if not _is_number(value) or not (0 < float(value) <= 1 or (zero and value == 0)):  # type: ignore[arg-type]
        raise InvalidRequestError(
            name, value, "must be a share in (0, 1]" if not zero else "must be in [0, 1]"
        )
