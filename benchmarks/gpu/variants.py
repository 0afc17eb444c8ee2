"""What attention variants cost over none, and how a batch of rows of very different length does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import inputs
from benchmarks.gpu.measure import Comparison, Setting, figures, measure_point, reason
from benchmarks.gpu.participants import OURS, XLA, Participant, implementation_step
from benchmarks.gpu.points import Point
from benchmarks.gpu.report import verdict
from jaxpaged.pallas_kernels import AttentionVariant
from jaxpaged.pallas_kernels.paged_attention.cases import alibi

MOST_OVER_PLAIN = 1.10
SHORT_WINDOW = 1024


def variants_for(point: Point) -> dict[str, AttentionVariant]:
    """The variants that are timed. A window as long as the context masks and saves nothing; a short one does."""
    sinks = jnp.linspace(-1.0, 1.0, point.num_heads)
    return {
        "plain": AttentionVariant(),
        "alibi": alibi(point.num_heads),
        "soft_cap": AttentionVariant(logit_soft_cap=30.0),
        "window_of_all": AttentionVariant(sliding_window=point.context),
        "sinks": AttentionVariant(sinks=sinks),
        "all_four": AttentionVariant(
            logit_soft_cap=30.0,
            sliding_window=point.context,
            sinks=sinks,
            score_mod=alibi(point.num_heads).score_mod,
        ),
        "short_window": AttentionVariant(sliding_window=min(SHORT_WINDOW, point.context // 2)),
    }


def measure_variants(point: Point, setting: Setting, implementation: str) -> Iterator[dict[str, Any]]:
    """One entry a variant, with its time over that of ``plain``; each result is compared with ``xla``'s."""
    pools, batch = inputs.paged_sets(point, setting.num_sets(point.kv_bytes))
    q = inputs.queries(point)
    plain: float | None = None
    chosen = variants_for(point)
    for name in list(chosen)[:2] if setting.is_dry else chosen:
        variant = chosen[name]
        if setting.budget.left <= 0:
            return
        entry: dict[str, Any] = {"variant": name, "point": point.as_json()}
        where = f"{name} at {point.batch} x {point.context}"
        step = implementation_step(implementation, variant)(point)
        try:
            comparison = Comparison()
            comparison(jax.jit(implementation_step("xla", variant)(point))(q, pools[0], batch))
            timing = setting.time(step, q, pools, batch, check=comparison)
        except Exception as error:  # one variant that fails ends no run
            entry |= reason(error)
            yield {**entry, "text": f"{where}: n/a, {entry['reason']}"}
            continue
        plain = timing.seconds if name == "plain" else plain
        entry |= figures(timing, point.kv_bytes, setting.copy_bandwidth) | {"error": comparison.error}
        text = f"{where}: {entry['us']:.1f} us"
        if plain:
            entry["over_plain"] = round(timing.seconds / plain, 4)
            text += f", {entry['over_plain']:.2f}x of plain"
            if name not in ("plain", "all_four", "short_window"):
                said = verdict(entry["over_plain"] <= MOST_OVER_PLAIN, setting.is_dry)
                text += f" (bar {MOST_OVER_PLAIN:.2f}x: {said})"
        yield {**entry, "text": text}


def measure_ragged(point: Point, ours: Participant, setting: Setting) -> Iterator[dict[str, Any]]:
    """One entry a participant on a batch with one long row and many short ones."""
    shape = f"1 x {point.context} and {point.batch - 1} x {min(point.lengths)} to {sorted(point.lengths)[-2]}"
    for name, found in measure_point(point, (XLA, ours), setting):
        if "us" in found:
            text = f"{shape}, {name}: {found['us']:.1f} us, {found['share']:.1%} of copy bandwidth"
        else:
            text = f"{shape}, {name}: n/a, {found['reason']}"
        yield {"participant": name, "is_ours": name == OURS, "point": point.as_json(), **found, "text": text}
