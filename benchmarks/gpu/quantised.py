"""Decoding from pools of codes and scales beside bfloat16: bytes a token, time, and share of copy bandwidth.

    python benchmarks/gpu/quantised.py --out quantised.json
    python benchmarks/gpu/quantised.py --dry-run

All in one run, on the same numbers: a pool of bfloat16 and the same in every format. Bytes are those that must be read,
codes and scales of every token once. What a format promises is that its share of copy bandwidth is that of bfloat16
within ten points, and its time less by as much as its bytes are.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from benchmarks.gpu import device, inputs, points, report
from benchmarks.gpu.bandwidth import copy_bandwidth
from benchmarks.gpu.measure import Budget, Comparison, Setting, figures, reason
from benchmarks.gpu.participants import OURS, form_step, implementation_step
from benchmarks.gpu.points import BARS, Point
from benchmarks.gpu.timing import Step
from jaxpaged.pallas_kernels import KVPool
from jaxpaged.pallas_kernels.quantisation import FORMATS, KVFormat, quantise

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Points of share that a format may lose to bfloat16.
ALLOWED_LOSS = 0.10


def kv_bytes(point: Point, kind: KVFormat | None) -> int:
    """Keys and values of all rows, each counted once, with their scales."""
    if kind is None:
        return point.kv_bytes
    vector = point.head_dim // kind.per_byte + 4
    return 2 * sum(point.lengths) * point.num_kv_heads * vector


def quantised_pool(pool: KVPool, kind: KVFormat | None) -> KVPool:
    """The pool in a format, or as it is."""
    if kind is None:
        return pool
    make = jax.jit(quantise, static_argnums=1)
    (k, k_scale), (v, v_scale) = make(pool.k, kind), make(pool.v, kind)
    return KVPool(k, v, pool.num_layers, k_scale, v_scale)


def measure(point: Point, setting: Setting, forms: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    """One entry for every format and form; ``xla`` gives the result that the others must have."""
    wide, batch = inputs.paged_sets(point, setting.num_sets(point.kv_bytes))
    for name, kind in {"bfloat16": None, **FORMATS}.items():
        pools = [quantised_pool(pool, kind) for pool in wide]
        num_bytes, comparison = kv_bytes(point, kind), Comparison()
        steps: dict[str, Step] = {"xla": implementation_step("xla")(point)}
        for form in [] if setting.is_dry else forms:
            steps[OURS if form is None else f"{OURS}_{form}"] = (
                implementation_step(OURS) if form is None else form_step(form)
            )(point)
        for who, step in steps.items():
            entry: dict[str, Any] = {"point": point.as_json(), "kv": name, "who": who, "kv_bytes": num_bytes}
            try:
                timing = setting.time(
                    step,
                    inputs.queries(point),
                    pools,
                    batch,
                    launches=1 if who == "xla" else 32,
                    check=comparison,
                )
                entry |= figures(timing, num_bytes, setting.copy_bandwidth) | {"error": comparison.error}
            except Exception as error:  # a format that is refused ends no run
                entry |= reason(error)
            yield entry


def judge(entries: Sequence[dict[str, Any]], is_dry: bool) -> list[dict[str, Any]]:
    """For each format at each point whether the kernel's share is near that of bfloat16."""
    mine = [entry for entry in entries if entry["who"] == OURS and "share" in entry]
    wide = {str(entry["point"]): entry for entry in mine if entry["kv"] == "bfloat16"}
    found = []
    for entry in mine:
        base = wide.get(str(entry["point"]))
        if base is None or entry is base:
            continue
        lost = base["share"] - entry["share"]
        found.append(
            {
                "point": entry["point"],
                "kv": entry["kv"],
                "bytes": entry["kv_bytes"] / base["kv_bytes"],
                "time": entry["us"] / base["us"],
                "share_lost": lost,
                "verdict": report.verdict(lost <= ALLOWED_LOSS, is_dry),
            }
        )
    return found


def table(entries: Sequence[dict[str, Any]]) -> str:
    """One line an entry."""
    lines = [["rows", "context", "block", "kv", "who", "MiB", "us", "share"]]
    for entry in entries:
        shape = entry["point"]
        told = (
            [f"{entry['us']:.1f}", f"{entry['share']:.1%}"] if "us" in entry else ["-", entry["reason"][:60]]
        )
        size = f"{entry['kv_bytes'] / 2**20:.0f}"
        where = [shape["batch"], shape["context"], shape["block_size"]]
        lines.append([*map(str, where), entry["kv"], entry["who"], size, *told])
    return report.aligned(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 without a GPU; a dry run needs none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on any device, without the kernel")
    parser.add_argument("--forms", nargs="*", default=[], choices=["mma", "wgmma"], help="these too")
    parser.add_argument("--memory-fraction", type=float, default=0.5, help="of what JAX has, for bfloat16")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--commit", help="what runs, where the sources were copied without their repository")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-quantised-<date>.json")
    args = parser.parse_args(arguments)
    device.prepare()
    missing = device.missing_gpu_reason()
    if missing and not args.dry_run:
        print(f"nothing was measured: {missing}")
        return 1
    today = datetime.date.today().isoformat()
    name = "dry-run-quantised" if args.dry_run else f"gpu-quantised-{today}"
    out = args.out or RESULTS / f"{name}.json"
    bandwidth = copy_bandwidth(2**22 if args.dry_run else 2**30)
    max_bytes = int(args.memory_fraction * device.memory_bytes())
    budget = Budget(args.budget_seconds)
    setting = Setting(bandwidth["bytes_per_second"], max_bytes, budget, args.dry_run)
    found: dict[str, Any] = {
        "date": today,
        "command": " ".join(["python", "benchmarks/gpu/quantised.py", *sys.argv[1:]]),
        "dry_run": args.dry_run,
        **device.describe(args.commit),
        "copy_bandwidth": bandwidth,
        "entries": [],
        "verdicts": [],
    }
    bars = [bar.point for bar in BARS]
    # Larger blocks: fewer copies of scales for as many keys.
    shapes = [*bars, *(replace(point, block_size=64) for point in bars)]
    for point in points.dry_plan().points[:1] if args.dry_run else shapes:
        if point.kv_bytes > max_bytes or budget.left <= 0:
            continue
        for entry in measure(point, setting, [None, *args.forms]):
            found["entries"].append(entry)
            found["verdicts"] = judge(found["entries"], args.dry_run)
            report.save(found, out)
    print(table(found["entries"]))
    for line in found["verdicts"]:
        print(
            f"{line['kv']}: {line['bytes']:.2f} of the bytes, {line['time']:.2f} of the time: {line['verdict']}"
        )
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
