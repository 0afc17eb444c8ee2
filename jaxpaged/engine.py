"""The engine as users hold it: ``generate``, ``stream``, ``add_request`` / ``step`` / ``abort_request``."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from jaxpaged.assembly import assemble, check_types, keep_compiled_programs, resolve, with_weights
from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.block_trace import BlockTrace, block_states
from jaxpaged.call_arguments import listed_prompts, one_each, sampling_params_each
from jaxpaged.core import EngineCore
from jaxpaged.delivery import Delivery
from jaxpaged.errors import EngineClosedError, InvalidRequestError, UnknownRequestError
from jaxpaged.generation import Generation
from jaxpaged.intake import Handling, Intake, Prompt, eos_token_ids
from jaxpaged.memory import MemoryReport
from jaxpaged.models import Decoder
from jaxpaged.outputs import EngineStats, RequestOutput
from jaxpaged.pallas_kernels import AttentionVariant
from jaxpaged.records import IterationRecord, RecordListener, RequestRecord
from jaxpaged.request import Request
from jaxpaged.sampling_params import RequestOutputKind, SamplingParams
from jaxpaged.tokenizer import Tokenizer


class Engine:
    """Paged-KV inference of one model on one device.

    ::

        with Engine("path/to/hf-checkpoint") as engine:
            for out in engine.generate(["def main("], SamplingParams(max_tokens=64, temperature=0.0)):
                print(out.outputs[0].text)

    Args:
      model: folder of a Hugging Face checkpoint, or a ``Decoder``.
      params: weights for a given ``Decoder``: its ``nnx.State`` or the pure dict of it. They are not copied.
      tokenizer: a ``Tokenizer``, or None to take the checkpoint's (a ``Decoder`` then works on token ids).
      variant: attention variant laid over the model's own: its fields that are not None win.
      compilation_cache_dir: where XLA keeps compiled programs from one process to the next; None leaves
        JAX's configuration alone.
      **arguments: fields of ``EngineConfig``, which says what each is; names as in vLLM. Sizes: ``dtype``,
        ``max_model_len``, ``block_size``, ``max_num_seqs``, ``max_num_batched_tokens``. Memory: ``num_blocks``,
        ``gpu_memory_utilization``, ``kv_cache_dtype``, ``kv_cache_dtype_skip_layers``, ``enable_prefix_caching``,
        ``swap_space``, ``num_host_blocks``, ``preemption_mode``, ``watermark``, ``memory_warning``,
        ``memory_critical``. Scheduling: ``scheduling_policy``, ``tenant_weights``, ``async_scheduling``,
        ``num_scheduler_steps``. Results: ``seed``, ``max_logprobs``, ``logprobs_mode``, ``deterministic``. Programs:
        ``attention``, ``warmup``.

    An engine belongs to one thread.

    Raises:
      ValueError: a wrong argument or checkpoint; the message names it and its value.
      NotImplementedError: a named ``attention`` cannot run here: the device, a dtype, a size, the variant or
        ``deterministic``.
      MemoryError: the KV pool would not hold one sequence of ``max_model_len``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Decoder,
        params: Any = None,
        *,
        tokenizer: Tokenizer | None = None,
        variant: AttentionVariant | None = None,
        compilation_cache_dir: str | os.PathLike[str] | None = None,
        **arguments: Any,
    ) -> None:
        self._core: EngineCore | None = None
        self._delivery = Delivery()
        self._ids = itertools.count()
        device = jax.local_devices()[0]
        check_types(model, params, tokenizer, variant, compilation_cache_dir)
        if compilation_cache_dir is not None:
            keep_compiled_programs(compilation_cache_dir)
        folder = None if isinstance(model, Decoder) else Path(model)
        self.model_config, self.config, model = resolve(model, arguments, variant, device)
        if folder is None:
            model = with_weights(model, params)
        if tokenizer is None and folder is not None:
            tokenizer = Tokenizer.from_path(folder)
        self.tokenizer = tokenizer
        self._core = assemble(model, self.config, variant, device)
        self._intake = Intake(
            self.config,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=eos_token_ids(self.model_config.eos_token_ids, tokenizer),
            tokenizer=tokenizer,
            space=self._core.scheduler.space,
        )
        if self.config.warmup:
            self.warm_up()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **arguments: Any) -> Self:
        """The engine of a checkpoint folder; the same as ``Engine(path, ...)``."""
        return cls(path, **arguments)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every bucket now; from then on a shape without a program is a ``RecompileError``.

        Args:
          progress: called with how many programs are there and how many there will be, before the first is compiled
            and after each; from threads that compile, but never twice at once.

        Raises:
          BaseException: what ``progress`` raised, once the programs under way are compiled. No others were begun; the
            engine compiles what it misses when a step needs it.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._live.runner.warm_up(max_workers=cores, progress=progress)

    @property
    def _live(self) -> EngineCore:
        if self._core is None:
            raise EngineClosedError("this engine was closed; make a new one")
        return self._core

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str | None = None,
        deadline: float | None = None,
        max_queue_time: float | None = None,
    ) -> None:
        """Queues a request; ``step`` returns its outputs.

        Args:
          request_id: unique among live requests.
          prompt: text, token ids, or a mapping with ``"prompt"`` or ``"prompt_token_ids"``.
          params: None for the defaults; ``BeamSearchParams`` for a beam search, which has one output, at its end.
          priority: smaller goes first, where the ``scheduling_policy`` looks at it.
          tenant: on whose behalf it comes; tenants get fair shares of the engine (``tenant_weights``).
          cache_salt: requests with different salts share no cached prefix.
          deadline: seconds from now after which it ends, with what it has; finish reason "timeout".
          max_queue_time: seconds it may wait before it first runs; then it ends likewise.

        Raises:
          InvalidRequestError: something is wrong with the request; nothing has changed.
        """
        handling = Handling(
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            deadline=deadline,
            max_queue_time=max_queue_time,
        )
        params = SamplingParams() if params is None else params
        self._admit(self._intake.generation(request_id, prompt, params, handling))

    def fork(
        self,
        request_id: str,
        new_request_id: str,
        *,
        at: int | None = None,
        append_token_ids: Sequence[int] = (),
        params: SamplingParams | BeamSearchParams | None = None,
        index: int = 0,
    ) -> None:
        """Branches a live request: a new one whose prompt is the first tokens of it, for tree search.

        What is computed of these tokens is shared, not copied: the new request holds the same blocks, and whoever
        writes to a partly filled one first copies that block alone. The old request goes on as it would have.

        Args:
          request_id: the live request to branch from.
          new_request_id: unique among live requests.
          at: how many of its tokens, prompt and output, the new request begins with; None for all so far.
          append_token_ids: tokens put behind these.
          params: of the new request; None for those of the old one.
          index: which of the old request's completions. A beam search has none to branch from.

        Raises:
          UnknownRequestError: no live request has this id.
          InvalidRequestError: something is wrong with the new request; nothing has changed.
        """
        found = self._live.generations.get(request_id)
        if found is None:
            raise UnknownRequestError("request_id", request_id, "no live request has this id")
        generation, parent = self._intake.fork(found, new_request_id, at, append_token_ids, params, index)
        self._live.fork(generation, parent)
        self._intake.draw_seeds(generation)

    def pin_prefix(
        self, prompt: Prompt, *, pin_id: str, ttl: float | None = None, cache_salt: str | None = None
    ) -> int:
        """Keeps the full blocks of a prompt in the pool, from when they are first computed.

        A pin takes blocks that requests then cannot have, so it gives way, the one that ends first, before a
        request that runs alone would fail. Setting a pin again begins its time anew.

        Args:
          prompt: as in ``add_request``.
          pin_id: its name.
          ttl: seconds until it ends by itself; None for good.
          cache_salt: as in ``add_request``.

        Returns:
          How many of its blocks are in the pool already.

        Raises:
          InvalidRequestError: something is wrong with an argument, or all pins together would take more than half
            of the pool.
        """
        _ = self._live  # a closed engine raises
        return self._intake.pin(prompt, pin_id, ttl, cache_salt)

    def unpin_prefix(self, pin_id: str) -> None:
        """Ends a pin; its blocks stay findable until they are needed.

        Raises:
          InvalidRequestError: there is none of this name: it never was, has expired or has given way.
        """
        if not self._live.scheduler.space.pins.remove(pin_id):
            raise InvalidRequestError("pin_id", pin_id, "no prefix is pinned under this name")

    def _admit(self, generation: Generation) -> None:
        self._live.add(generation)
        self._intake.draw_seeds(generation)

    def step(self) -> list[RequestOutput]:
        """Runs one step over all requests and returns what is new, at most one output a request.

        What a live ``stream`` waits for goes there instead.
        """
        core = self._live
        if not self._delivery.pending:
            self._delivery.deliver(core.step())
        return self._delivery.take()

    def abort_request(self, request_id: str) -> None:
        """Ends a request; its last output, with finish reason "abort", comes next from ``step`` or its stream.

        Raises:
          UnknownRequestError: no live request has this id.
        """
        output = self._live.abort(request_id)
        if output is not None:
            self._delivery.deliver([output])

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another ``step`` has anything to do or to return."""
        return bool(self._delivery.pending) or self._live.has_unfinished

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, all of them together, and returns their outputs in the same order.

        Args:
          prompts: one prompt or a sequence of them (text, token ids, or mappings as in ``add_request``).
          sampling_params: one for all, or one each; None for the defaults.
          use_tqdm: show a progress bar.

        Raises:
          InvalidRequestError: a prompt or parameter is wrong; then none of them has begun.
          Exception: what ended one of the requests, if a step failed; the others are aborted.
        """
        listed = listed_prompts(prompts)
        final, given = RequestOutputKind.FINAL_ONLY, sampling_params_each(sampling_params, len(listed))
        every = [params.clone(output_kind=final) for params in given]
        return self._complete(listed, every, "generate", use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continues prompts by beam search, all of them together, and returns their outputs in the same order.

        The completions of an output are the hypotheses, best first; ``cumulative_logprob`` is the model's own. Beams
        are rows of the batch like any request, and share the blocks of what they have in common.

        Args:
          prompts, use_tqdm: as in ``generate``.
          params: one for all, or one each.

        Raises:
          InvalidRequestError: a prompt or parameter is wrong, or ``beam_width`` needs a higher ``max_logprobs`` of the
            engine; then none of them has begun.
          Exception: what ended one of the searches, if a step failed; the others are aborted.
        """
        listed = listed_prompts(prompts)
        every = one_each("params", params, len(listed), BeamSearchParams)
        return self._complete(listed, every, "beam search", use_tqdm)

    def _complete(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | BeamSearchParams],
        title: str,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Runs requests that give one output each; nobody else's output is lost."""
        core = self._live
        generations = [
            self._intake.generation(self._new_id(), prompt, each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        return self._delivery.complete(core, generations, self._admit, title, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Iterator[RequestOutput]:
        """Completes one prompt and yields an output for every step that brings something new.

        Outputs hold what is new (``output_kind`` DELTA) unless the parameters ask for another kind. Dropping the
        iterator aborts the request. The prompt is checked before this returns.

        Raises:
          InvalidRequestError: the prompt or a parameter is wrong.
        """
        (params,) = sampling_params_each(sampling_params, 1)
        if params.output_kind is RequestOutputKind.CUMULATIVE:
            params = params.clone(output_kind=RequestOutputKind.DELTA)
        name = self._new_id() if request_id is None else request_id
        generation = self._intake.generation(name, prompt, params)
        stream = self._delivery.stream(lambda: self._live, generation, self._admit)
        next(stream)  # begun, so that dropping it ends the request even if nobody ever asks for an output
        return stream

    def _new_id(self) -> str:
        generations = self._live.generations
        return next(name for i in self._ids if (name := f"request-{i}") not in generations)

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters and times."""
        return self._live.books.stats()

    def iteration_records(self) -> list[IterationRecord]:
        """What each of the latest thousand steps was like, the newest last; copies."""
        return self._live.books.records.iterations()

    def request_records(self) -> list[RequestRecord]:
        """What each of the thousand completions that ended last was like, the newest last; copies."""
        return self._live.books.records.requests()

    def add_listener(self, listener: RecordListener) -> None:
        """Tells ``listener`` of every iteration and request record from now on, as it comes."""
        self._live.books.records.listeners.append(listener)

    def trace_blocks(self, max_steps: int = 2000) -> BlockTrace:
        """A trace that notes what every block is after each step from now on, a byte a block.

        It goes on until ``stop_tracing``, or until the next call begins another one, and costs 0.01 to 0.03
        microseconds a block and step. ``jaxpaged.plot.block_map`` draws it.

        Args:
          max_steps: samples to keep; of a longer run every second one stays, then every fourth, and so on.

        Raises:
          InvalidRequestError: ``max_steps`` is no integer of at least 2.
        """
        books = self._live.books
        books.trace = BlockTrace(self._live.scheduler.space.num_blocks, max_steps)
        return books.trace

    def stop_tracing(self) -> None:
        """Ends ``trace_blocks``; what was noted stays in the trace."""
        self._live.books.trace = None

    def measure_attention(self, repeats: int = 3) -> float | None:
        """Seconds that paged attention of the model's first layer takes for one token of each request that runs.

        For monitoring: inside of a compiled step it cannot be seen. It is run by itself on the pool as it is, which
        it only reads, after the step that may be under way has ended. Counted from the launch, so some tens of
        microseconds are not the attention's. The first call compiles its program, be the engine warm or not, and
        even when nothing runs.

        Args:
          repeats: runs, of whose times it is the median.

        Returns:
          None when nothing runs.

        Raises:
          InvalidRequestError: ``repeats`` is no positive integer.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise InvalidRequestError("repeats", repeats, "must be a positive integer")
        return self._live.measure_attention(repeats)

    def memory_report(self) -> MemoryReport:
        """Where memory goes, and what the size of the pool follows from."""
        return self._live.memory

    def block_tables(self) -> dict[str, list[list[int]]]:
        """Block ids of every live request, one list for each of its completions."""
        live = self._live.generations.items()
        return {name: [list(c.request.table) for c in generation.completions] for name, generation in live}

    def block_states(self) -> bytes:
        """What each block of the pool is now, one byte a block, by id; ``jaxpaged.block_trace`` names the values."""
        space = self._live.scheduler.space
        return block_states(space.allocator, space.cache, space.pins.blocks)

    def live_requests(self) -> list[Request]:
        """Every live completion as the scheduler has it: to be read, not to be changed, until the next step."""
        return [c.request for generation in self._live.generations.values() for c in generation.completions]

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; what runs goes on."""
        self._live.scheduler.space.forget_everything()

    def check_invariants(self) -> None:
        """Asserts every invariant of the host state; for tests and debugging."""
        self._live.check_invariants()

    def close(self) -> None:
        """Aborts what is left and frees the KV pool and the compiled programs; closing twice is fine."""
        if self._core is None:
            return
        for name in list(self._core.generations):
            self._core.abort(name)
        self._core.runner.close()
        self._core = None
        self._delivery.clear()

    def __enter__(self) -> Self:
        _ = self._live  # a closed engine raises
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
