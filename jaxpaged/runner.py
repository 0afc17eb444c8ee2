"""Runs steps on the device: one compiled program per bucket over a donated KV pool.

The program of a bucket takes the weights, the engine's device state and one packed buffer. The state (KV pool and
sampler state) is donated and handed back, so it is updated in place and nothing else may hold it.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention_probe import AttentionProbe
from jaxpaged.batch import BatchBuilder
from jaxpaged.errors import RecompileError
from jaxpaged.host_pool import HostPool
from jaxpaged.models import Parameters
from jaxpaged.outputs import CompileEvent
from jaxpaged.pallas_kernels import copy_blocks, gather_blocks, scatter_blocks
from jaxpaged.program import DeviceState, Programs, StepOutput
from jaxpaged.request import Request
from jaxpaged.sampler import set_bias_row, set_row
from jaxpaged.step_plan import Move, MoveKind

logger = logging.getLogger(__name__)

MOVE_WIDTH = 16  # blocks of one launch
MAX_COMPILE_EVENTS = 100
MAX_STAGED = 8  # launches whose blocks wait on the device for the step that takes them


class BlocksLostError(RuntimeError):
    """Host blocks could not be brought back; ``blocks`` are those of the pool that they were to fill."""

    def __init__(self, blocks: frozenset[int]) -> None:
        super().__init__(f"{len(blocks)} blocks of KV memory did not come back from the host")
        self.blocks = blocks


class Runner:
    """Owns weights, device state and compiled programs.

    Args:
      functions: what to compile.
      weights: parameters, flat.
      operands: arrays of the user's attention variant.
      builder: knows the buckets and their layouts.
      new_state: makes an empty device state.
      host_pool: where blocks are swapped to, or None.
    """

    def __init__(
        self,
        functions: Programs,
        weights: Parameters,
        operands: tuple[jax.Array, ...],
        builder: BatchBuilder,
        new_state: Callable[[], DeviceState],
        host_pool: HostPool | None = None,
    ) -> None:
        self.host_pool = host_pool
        self._staged: dict[tuple[int, ...], Future[tuple[jax.Array, ...]]] = {}
        self._functions = functions
        self._weights: Parameters | None = weights
        self._operands = operands
        self._builder = builder
        self._new_state = new_state
        self._state: DeviceState | None = new_state()
        self._programs: dict[tuple[int, int], Any] = {}  # by bucket and number of steps
        self._small: dict[str, Any] = {}
        self._probe: AttentionProbe | None = None
        self.forbid_compile = False
        self.num_compiles = 0
        self.compile_seconds = 0.0
        self.compile_events: deque[CompileEvent] = deque(maxlen=MAX_COMPILE_EVENTS)
        self._counting = threading.Lock()  # programs are compiled by several threads

    @property
    def state(self) -> DeviceState:
        """The live device state; it dies with the next step."""
        assert self._state is not None, "closed"
        return self._state

    @property
    def device_memory_in_use(self) -> int | None:
        """Bytes that the device of the pool says are in use, by whomever; None where it does not say."""
        device = min(self.state.pool.arrays[0].devices(), key=lambda device: device.id)
        in_use = (device.memory_stats() or {}).get("bytes_in_use")
        return None if in_use is None else int(in_use)

    @property
    def state_is_lost(self) -> bool:
        """Whether a program that failed had already taken the donated state, or has left its error in the new one."""
        try:
            jax.block_until_ready(self.state)
        except Exception:  # also what deleted arrays raise
            return True
        return False

    def reset_state(self) -> None:
        """Starts over with an empty pool."""
        for array in jax.tree.leaves(self._state):
            if not array.is_deleted():
                array.delete()
        self._state = self._new_state()

    def warm_up(self, *, max_workers: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every bucket and the small programs, in parallel; afterwards compiling is an error.

        ``progress(done, total)`` is called before the first program and after each, never twice at once. When it
        raises, what is being compiled is finished and nothing else is begun.
        """
        started = time.perf_counter()
        names = [name for name in _SMALL_PROGRAMS if self.host_pool or name not in _SWAP_PROGRAMS]
        tasks = [partial(self._program, *program) for program in reversed(self._builder.programs)]
        tasks += [partial(self._small_program, name) for name in names]
        _run_all(tasks, max_workers, progress or (lambda done, total: None))
        self.forbid_compile = True
        seconds = time.perf_counter() - started
        logger.info("warm-up: %d programs in %.1f s", len(self._programs) + len(self._small), seconds)

    def _program(self, bucket: int, num_steps: int = 1) -> Any:
        program = self._programs.get((bucket, num_steps))
        if program is None:
            layout = self._builder.layout(bucket)
            buffer = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
            shape = f"bucket of {bucket} tokens, {layout.num_rows} rows, {num_steps} steps"
            function: partial[Any]
            if num_steps == 1:
                function = partial(self._functions.step, layout=layout)
            else:
                function = partial(self._functions.decode_steps, layout=layout, num_steps=num_steps)
            jitted = jax.jit(function, donate_argnums=1)
            program = self._compile(jitted, shape, self._weights, self.state, buffer, self._operands)
            self._programs[bucket, num_steps] = program
        return program

    def _small_program(self, name: str) -> Any:
        program = self._small.get(name)
        if program is None:
            function, shapes = _SMALL_PROGRAMS[name]
            arguments = shapes(self.state)
            jitted = jax.jit(function, donate_argnums=() if name == "gather_blocks" else 0)
            program = self._compile(jitted, name, self.state, *arguments)
            self._small[name] = program
        return program

    def _compile(self, jitted: Any, shape: str, *arguments: Any) -> Any:
        if self.forbid_compile:
            raise RecompileError(f"{shape}: not compiled in the warm-up, and compiling is forbidden since")
        started = time.perf_counter()
        program = jitted.lower(*arguments).compile(self._functions.compiler_options)
        seconds = time.perf_counter() - started
        with self._counting:
            self.compile_events.append(CompileEvent(time.monotonic(), shape, seconds))
            self.num_compiles += 1
            self.compile_seconds += seconds
        logger.info("compiled %s in %.2f s", shape, seconds)
        return program

    def execute(self, bucket: int, buffer: np.ndarray) -> StepOutput:
        """Runs one step; returns at once, the arrays arrive later, the tokens by themselves."""
        program = self._program(bucket)
        output, self._state = program(self._weights, self.state, buffer, self._operands)
        output.sampled.tokens.copy_to_host_async()
        return output

    def execute_decode_steps(self, bucket: int, buffer: np.ndarray, num_steps: int) -> jax.Array:
        """Runs several steps of decode rows in one program; returns tokens int32 ``[num_steps, B]``."""
        program = self._program(bucket, num_steps)
        tokens, self._state = program(self._weights, self.state, buffer, self._operands)
        tokens.copy_to_host_async()
        return tokens

    def move_blocks(self, moves: Sequence[Move]) -> None:
        """Copies, swaps out and swaps in, in this order; before the step that they are for.

        Raises:
          BlocksLostError: a load failed; this and what comes after it has not happened.
        """
        for kind, group in itertools.groupby(moves, key=lambda move: move.kind):
            # Of two stores to one host block with nothing between them only the second counts.
            pairs = list({move.target: (move.source, move.target) for move in group}.values())
            parts = [pairs[at : at + MOVE_WIDTH] for at in range(0, len(pairs), MOVE_WIDTH)]
            if kind is MoveKind.COPY:
                for part in parts:  # targets are new blocks, never also sources
                    self._state = self._small_program("copy_blocks")(self.state, _padded(part))
            elif kind is MoveKind.SWAP_OUT:
                for part in parts:
                    self._swap_out(part)
            else:
                loads = [self._load(tuple(source for source, _ in part)) for part in parts]
                for part, load in zip(parts, loads, strict=True):
                    try:
                        blocks = load.result()
                    except Exception as error:
                        raise BlocksLostError(frozenset(target for _, target in part)) from error
                    targets = _padded(part)[1]
                    self._state = self._small_program("scatter_blocks")(self.state, targets, *blocks)

    def _swap_out(self, pairs: list[tuple[int, int]]) -> None:
        assert self.host_pool is not None, "nowhere to swap to"
        sources, targets = _padded(pairs)[0], [target for _, target in pairs]
        for old in [old for old in self._staged if not set(old).isdisjoint(targets)]:
            self._staged.pop(old).cancel()  # what was staged of them is no longer what they hold
        self.host_pool.store(targets, *self._small_program("gather_blocks")(self.state, sources))

    def _load(self, blocks: tuple[int, ...]) -> "Future[tuple[jax.Array, ...]]":
        assert self.host_pool is not None, "nowhere to swap from"
        staged = self._staged.pop(blocks, None)
        return self.host_pool.load(blocks, MOVE_WIDTH) if staged is None else staged

    def stage(self, blocks: Sequence[int]) -> None:
        """Starts to bring host blocks to the device that a later step will swap in, while this one runs."""
        if self.host_pool is None:
            return
        parts = [tuple(blocks[at : at + MOVE_WIDTH]) for at in range(0, len(blocks), MOVE_WIDTH)]
        parts = parts[:MAX_STAGED]
        for old in [old for old in self._staged if old not in parts]:
            self._staged.pop(old).cancel()
        for part in parts:
            if part not in self._staged:
                self._staged[part] = self.host_pool.load(part, MOVE_WIDTH)

    def set_sampler_row(self, row: int, counts: np.ndarray, prompt: np.ndarray, bias: np.ndarray) -> None:
        """Replaces a row of the sampler state; arrays ``[V]`` as in ``sampler.set_row``."""
        self._state = self._small_program("set_row")(self.state, np.int32(row), counts, prompt, bias)

    def set_sampler_bias(self, row: int, bias: np.ndarray) -> None:
        """Replaces the bias of a row of the sampler state, float32 ``[V]``."""
        self._state = self._small_program("set_bias_row")(self.state, np.int32(row), bias)

    def memory_analysis(self, bucket: int) -> Any:
        """XLA's account of a bucket's program: aliased, temporary and argument bytes."""
        return self._program(bucket).memory_analysis()

    def measure_attention(self, requests: Sequence[Request], repeats: int) -> float | None:
        """Seconds of paged attention for one token of each request, ``AttentionProbe``; None if there are none.

        The first call compiles, also where compiling is an error: no step waits for this program.
        """
        if self.state_is_lost:  # the next step finds that out; where it is not lost it is there now
            return None
        if self._probe is None:
            assert self._weights is not None, "closed"
            builder = self._builder
            width = builder.layout(builder.buckets[-1]).table_width
            self._probe = AttentionProbe(
                self._functions,
                self._weights,
                self._operands,
                self.state.pool,
                num_rows=builder.max_num_seqs,
                table_width=width,
            )
        return self._probe.measure(self.state.pool, requests, repeats) if requests else None

    def close(self) -> None:
        """Frees the device memory of pool, sampler state and programs; the weights if nobody else has them."""
        if self._state is not None:
            for array in jax.tree.leaves(self._state):
                array.delete()
        for staged in self._staged.values():
            staged.cancel()
        self._staged.clear()
        if self.host_pool is not None:
            self.host_pool.close()
        self._state = None
        self._weights = None
        self._programs.clear()
        self._small.clear()
        self._probe = None


def _run_all(
    tasks: Sequence[Callable[[], object]], max_workers: int, progress: Callable[[int, int], None]
) -> None:
    """Runs tasks in threads, in order; after an error, be it of ``progress``, none is begun any more."""
    stopped, reporting, done = threading.Event(), threading.Lock(), itertools.count(1)

    @contextmanager
    def stopping() -> Iterator[None]:
        try:
            yield
        except BaseException:
            stopped.set()
            raise

    def run(task: Callable[[], object]) -> None:
        if stopped.is_set():
            return
        with stopping():
            task()
        with reporting, stopping():
            if not stopped.is_set():
                progress(next(done), len(tasks))

    progress(0, len(tasks))
    with ThreadPoolExecutor(max_workers) as workers, stopping():  # an interrupt of this thread stops them too
        for future in [workers.submit(run, task) for task in tasks]:
            future.result()


def _padded(pairs: list[tuple[int, int]]) -> np.ndarray:
    """Sources and targets, int32 ``[2, MOVE_WIDTH]``, padded with the dummy block."""
    padded = np.zeros((2, MOVE_WIDTH), np.int32)
    padded[:, : len(pairs)] = np.array(pairs, np.int32).T
    return padded


def _copy(state: DeviceState, pairs: jax.Array) -> DeviceState:
    pool: Any = state.pool
    return state._replace(pool=copy_blocks(pool, pairs[0], pairs[1]))


def _gather(state: DeviceState, block_ids: jax.Array) -> tuple[jax.Array, ...]:
    return gather_blocks(state.pool, block_ids)


def _scatter(state: DeviceState, block_ids: jax.Array, *blocks: jax.Array) -> DeviceState:
    pool: Any = state.pool
    return state._replace(pool=scatter_blocks(pool, block_ids, *blocks))


def _set_row(
    state: DeviceState, row: jax.Array, counts: jax.Array, prompt: jax.Array, bias: jax.Array
) -> DeviceState:
    return state._replace(sampler=set_row(state.sampler, row, counts, prompt, bias))


def _set_bias_row(state: DeviceState, row: jax.Array, bias: jax.Array) -> DeviceState:
    return state._replace(sampler=set_bias_row(state.sampler, row, bias))


def _vocab(state: DeviceState, *dtypes: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    vocab_size = state.sampler.logit_bias.shape[1]
    row = jax.ShapeDtypeStruct((), jnp.int32)
    return (row, *(jax.ShapeDtypeStruct((vocab_size,), dtype) for dtype in dtypes))


def _ids() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((MOVE_WIDTH,), jnp.int32)


def _blocks(state: DeviceState) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((part.num_layers, MOVE_WIDTH, *array.shape[1:]), array.dtype)
        for part in state.pool.parts
        for array in part.arrays
    ]


_SWAP_PROGRAMS = ("gather_blocks", "scatter_blocks")
# Rare things that a step may need before it runs, with the shapes of their arguments after the state.
_SMALL_PROGRAMS: dict[str, tuple[Any, Any]] = {
    "copy_blocks": (_copy, lambda state: (jax.ShapeDtypeStruct((2, MOVE_WIDTH), jnp.int32),)),
    "gather_blocks": (_gather, lambda state: (_ids(),)),
    "scatter_blocks": (_scatter, lambda state: (_ids(), *_blocks(state))),
    "set_row": (_set_row, lambda state: _vocab(state, jnp.int32, jnp.bool_, jnp.float32)),
    "set_bias_row": (_set_bias_row, lambda state: _vocab(state, jnp.float32)),
}
