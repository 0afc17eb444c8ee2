"""Times of the edges of ``edge_programs`` on a GPU: as XLA makes them and with a kernel, in one run.

Each step takes the result of the one before, as ``timing.py`` wants it; what is added for that is the same in
both forms. The products around an edge are part of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import edge_programs as edges
from benchmarks.gpu import sampling_trips
from benchmarks.gpu.timing import Step, time_jax

TOKENS = (64, 2048)
ROWS = (64, 256)
NUM_SETS = 4


class Race(NamedTuple):
    """Two forms of one edge: steps, what they start with, what they take in turn, what they share."""

    name: str
    steps: dict[str, Step]
    carry: Any
    sets: list[Any]
    shared: Any


def measure() -> Iterator[dict[str, Any]]:
    """An entry for each edge and size; ``ratio`` is the kernel's time over XLA's."""
    for race in races():
        entry: dict[str, Any] = {"edge": race.name}
        for form, step in race.steps.items():
            timing = time_jax(step, race.carry, race.sets, race.shared)
            entry[form] = timing.as_json()
        entry["ratio"] = round(entry["kernel"]["us"] / entry["xla"]["us"], 3)
        text = f"{race.name}: XLA {entry['xla']['us']:.1f} us, kernel {entry['kernel']['us']:.1f} us"
        yield {**entry, "text": f"{text}, {entry['ratio']:.2f}x"}


def races() -> Iterator[Race]:
    """All of them, with arrays."""
    for num_tokens in TOKENS:
        yield _rope_scatter(num_tokens)
        yield _residual_norm(num_tokens)
    for num_rows in ROWS:
        for setting in sampling_trips.SETTINGS:
            if sampling_trips.FILTER & setting.flags:
                yield _cutoff(num_rows, setting)


def _rope_scatter(num_tokens: int) -> Race:
    def step_of(edge: edges.Edge) -> Step:
        def step(carry: Any, new: Any, weights: Any) -> Any:
            (q, pool), (x, positions, slots) = carry, new
            return edge.function(weights, pool, x + q.reshape(x.shape) * 2.0**-10, positions, slots)

        return step

    forms = {"xla": edges.rope_scatter_xla(num_tokens), "kernel": edges.rope_scatter_kernel(num_tokens)}
    weights, pool, x, positions, _ = forms["xla"].args
    slots = edges.BLOCK_SIZE + np.random.default_rng(0).permutation((edges.NUM_BLOCKS - 1) * edges.BLOCK_SIZE)
    sets = [
        (_random(x, seed), _ones(positions), jnp.asarray(slots[:num_tokens], jnp.int32))
        for seed in range(NUM_SETS)
    ]
    q = jnp.zeros((num_tokens, edges.MODEL.num_heads, edges.MODEL.head_dim), edges.DTYPE)
    steps = {name: step_of(edge) for name, edge in forms.items()}
    return Race(
        f"rotary embedding + scatter, {num_tokens}", steps, (q, _ones(pool)), sets, _random(weights, 9)
    )


def _residual_norm(num_tokens: int) -> Race:
    def step_of(edge: edges.Edge) -> Step:
        def step(carry: Any, x: Any, weights: Any) -> Any:
            total, wide = edge.function(weights, x + carry[0] * 2.0**-10, carry[1])
            return total, wide[:, : edges.MODEL.hidden_size]

        return step

    forms = {"xla": edges.residual_norm_xla(num_tokens), "kernel": edges.residual_norm_kernel(num_tokens)}
    weights, x, o = forms["xla"].args
    steps = {name: step_of(edge) for name, edge in forms.items()}
    sets = [_random(x, seed) for seed in range(NUM_SETS)]
    return Race(
        f"residual + RMSNorm, {num_tokens}", steps, (_ones(x), _random(o, 8)), sets, _random(weights, 9)
    )


def _cutoff(num_rows: int, setting: sampling_trips.SamplingSetting) -> Race:
    def step_of(implementation: str) -> Step:
        program = edges.cutoff(num_rows, implementation).function

        def step(carry: Any, new: Any, shared: Any) -> Any:
            logits, row_max = new
            return program(logits, jnp.where(carry == jnp.inf, carry, row_max), *shared)

        return step

    rows = jnp.asarray(sampling_trips.made_up_logits(edges.MODEL.vocab_size, num_rows))
    sets = [(rolled, rolled.max(axis=-1)) for rolled in (jnp.roll(rows, seed, 1) for seed in range(NUM_SETS))]
    of_row = jnp.ones(num_rows, jnp.float32)
    shared = (of_row, jnp.full(num_rows, setting.top_k, jnp.int32), setting.top_p * of_row, 0 * of_row)
    steps = {"xla": step_of("xla"), "kernel": step_of("mosaic_gpu")}
    return Race(f"cutoff, {num_rows} rows, {setting.name}", steps, of_row, sets, shared)


def _random(tree: Any, seed: int) -> Any:
    draw = lambda a: 0.02 * jax.random.normal(jax.random.key(seed), a.shape, a.dtype)  # noqa: E731
    return jax.tree.map(draw, tree)


def _ones(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tree)
