"""Options that several commands share: those of the engine and those of sampling."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jaxpaged import Engine, SamplingParams

ENGINE, SAMPLING = "Engine", "Sampling"


def _engine(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=ENGINE)


def _sampling(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=SAMPLING)


def compilation_cache_folder() -> Path:
    """Where compiled programs are kept between runs: ``jaxpaged`` in the user's cache folder (XDG)."""
    configured = os.path.expandvars("$XDG_CACHE_HOME")
    parent = Path(configured) if os.path.isabs(configured) else Path("~/.cache").expanduser()
    return parent / "jaxpaged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is built with; a value that is not given is left to the engine."""

    model: Annotated[
        Path | None,
        _engine(
            "--model", "-m", help="Folder of a Hugging Face checkpoint. [dim]Default: the embedded model.[/]"
        ),
    ] = None
    dtype: Annotated[
        str | None, _engine(help="float32, bfloat16 or float16, of weights and activations.")
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        _engine(
            help="What keys and values are kept in: auto, float32, bfloat16, float16, fp8, int8 or int4; or one for "
            "each layer, with commas. [dim]Default: auto, the dtype of the model.[/]"
        ),
    ] = None
    kv_cache_dtype_skip_layers: Annotated[
        str | None, _engine(help="Layers that keep the dtype of the model: numbers from 0, with commas.")
    ] = None
    max_model_len: Annotated[int | None, _engine(help="Prompt and output tokens of one sequence.")] = None
    block_size: Annotated[int | None, _engine(help="Tokens a block of the KV pool.")] = None
    num_blocks: Annotated[
        int | None, _engine(help="Blocks of the KV pool. [dim]Default: what the memory allows.[/]")
    ] = None
    max_num_seqs: Annotated[int | None, _engine(help="Sequences of one step.")] = None
    max_num_batched_tokens: Annotated[int | None, _engine(help="Tokens of one step.")] = None
    num_scheduler_steps: Annotated[
        int | None, _engine(help="Decode steps of one program while nothing else is to do; 1 is off.")
    ] = None
    async_scheduling: Annotated[
        str | None,
        _engine(help="on or off: plan a step while the one before runs. [dim]Default: on, but for CPUs.[/]"),
    ] = None
    scheduling_policy: Annotated[
        str | None,
        _engine(
            help="Who goes first: fcfs, priority, shortest-prompt-first, longest-prefix-match, or a dotted name."
        ),
    ] = None
    swap_space: Annotated[
        float | None, _engine(help="GiB of host memory for KV blocks that do not fit the pool.")
    ] = None
    preemption_mode: Annotated[
        str | None, _engine(help="What happens to preempted requests: recompute, swap, or auto.")
    ] = None
    deterministic: Annotated[
        bool, _engine("--deterministic", help="The same bits whatever else is in the batch.")
    ] = False
    no_prefix_caching: Annotated[bool, _engine("--no-prefix-caching", help="Compute every prompt anew.")] = (
        False
    )
    attention: Annotated[
        str | None, _engine(help="Implementation of attention. [dim]Default: the best one here.[/]")
    ] = None
    seed: Annotated[int | None, _engine(help="The same seed gives the same text.")] = None
    warmup: Annotated[
        bool,
        _engine("--warmup", help="Compile every bucket before the first request; serve does in any case."),
    ] = False
    compilation_cache: Annotated[
        Path | None,
        _engine(help="Folder for compiled programs. [dim]Default: jaxpaged in the user's cache folder.[/]"),
    ] = None

    @property
    def is_embedded(self) -> bool:
        """Whether the model is the one that comes with the package."""
        return self.model is None

    @property
    def folder(self) -> Path:
        """Where the model is."""
        from jaxpaged.models import embedded_model_path

        return self.model or embedded_model_path()

    def open(self, **changes: Any) -> "Engine":
        """The engine. ``changes`` are engine arguments that hold where no option was given."""
        import jax

        from jaxpaged import Engine

        given = {name: getattr(self, name) for name in _AS_THEY_ARE}
        given |= {"warmup": self.warmup or None, "deterministic": self.deterministic or None}
        given |= {"enable_prefix_caching": not self.no_prefix_caching}
        given["kv_cache_dtype"] = _one_or_more(self.kv_cache_dtype)
        given["kv_cache_dtype_skip_layers"] = _with_commas(self.kv_cache_dtype_skip_layers)
        given["async_scheduling"] = _switch("--async-scheduling", self.async_scheduling)
        arguments = changes | {name: value for name, value in given.items() if value is not None}
        folder = self.compilation_cache
        # Somebody who has configured JAX's own cache keeps it.
        if folder is None and jax.config.jax_compilation_cache_dir is None:
            folder = compilation_cache_folder()
        return Engine(self.folder, compilation_cache_dir=folder, **arguments)


_AS_THEY_ARE = (
    "dtype",
    "max_model_len",
    "block_size",
    "num_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_scheduler_steps",
    "scheduling_policy",
    "swap_space",
    "preemption_mode",
    "attention",
    "seed",
)


def _switch(option: str, value: str | None) -> bool | None:
    if value not in (None, "on", "off"):
        raise ValueError(f"{option}={value!r}: must be on or off")
    return None if value is None else value == "on"


def _one_or_more(value: str | None) -> str | list[str] | None:
    listed = _with_commas(value)
    return listed if listed is None or len(listed) > 1 else listed[0]


def _with_commas(value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Fields of ``SamplingParams``; a value that is not given has that class's default."""

    max_tokens: Annotated[
        int | None, _sampling(help="Tokens to generate at most. [dim]Default: 128; in a chat 512.[/]")
    ] = None
    min_tokens: Annotated[int | None, _sampling(help="No end of text before so many tokens.")] = None
    temperature: Annotated[float | None, _sampling("--temperature", "-t", help="0 is greedy.")] = None
    top_p: Annotated[float | None, _sampling(help="Keep the likeliest tokens that sum up to this.")] = None
    top_k: Annotated[int | None, _sampling(help="Keep so many of the likeliest tokens; 0 is off.")] = None
    min_p: Annotated[float | None, _sampling(help="Keep tokens this likely, relative to the likeliest.")] = (
        None
    )
    n: Annotated[int | None, _sampling("-n", help="Completions a prompt; they share its blocks.")] = None
    presence_penalty: Annotated[float | None, _sampling(help="-2 to 2, for tokens already produced.")] = None
    frequency_penalty: Annotated[float | None, _sampling(help="-2 to 2, for each time produced.")] = None
    repetition_penalty: Annotated[
        float | None, _sampling(help="Divides logits of tokens seen; 1 is off.")
    ] = None
    stop: Annotated[list[str] | None, _sampling(help="Text that ends the output; repeatable.")] = None
    stop_token_id: Annotated[list[int] | None, _sampling(help="Token that ends it; repeatable.")] = None
    include_stop: Annotated[
        bool, _sampling("--include-stop", help="Leave the stop string in the output.")
    ] = False
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on after the end of the text.")] = False
    logprobs: Annotated[
        int | None, _sampling(help="Likeliest tokens to report with their log-probabilities (--json).")
    ] = None
    prompt_logprobs: Annotated[int | None, _sampling(help="The same for the prompt's tokens.")] = None
    logit_bias: Annotated[
        list[str] | None, _sampling(help="TOKEN_ID:ADDEND, added to a logit; repeatable.")
    ] = None
    allowed_token_id: Annotated[list[int] | None, _sampling(help="Sample nothing but these; repeatable.")] = (
        None
    )
    bad_word: Annotated[list[str] | None, _sampling(help="Text not to produce; repeatable.")] = None
    keep_special_tokens: Annotated[
        bool, _sampling("--keep-special-tokens", help="Show special tokens in the text.")
    ] = False

    def params(self, **defaults: Any) -> "SamplingParams":
        """The parameters. ``defaults`` hold where no option was given.

        Raises InvalidRequestError (a ValueError) for a value out of bounds.
        """
        from jaxpaged import SamplingParams

        # An option that may be repeated has its own, singular name.
        plural = {"stop_token_id": "stop_token_ids", "allowed_token_id": "allowed_token_ids"}
        plural |= {"bad_word": "bad_words"}
        apart = ("include_stop", "keep_special_tokens", "logit_bias")
        given = {plural.get(n, n): v for n, v in vars(self).items() if n not in apart and v not in (None, [])}
        if self.logit_bias:
            given["logit_bias"] = dict(map(_bias_entry, self.logit_bias))
        given |= {
            "include_stop_str_in_output": self.include_stop,
            "skip_special_tokens": not self.keep_special_tokens,
        }
        return SamplingParams(**(defaults | given))


def _bias_entry(entry: str) -> tuple[int, float]:
    token_id, _, addend = entry.partition(":")
    try:
        return int(token_id), float(addend)
    except ValueError:
        raise ValueError(f"--logit-bias={entry!r}: must be TOKEN_ID:ADDEND, as in 42:-5.0") from None
