"""Attention of prompts and chunks on a GPU: the paged kernel beside flash attention over contiguous keys and values.

    python benchmarks/gpu/prefill.py --quick
    python benchmarks/gpu/prefill.py --full --budget-seconds 540 --out prefill.json --resume
    python benchmarks/gpu/prefill.py --dry-run

Many query tokens a row make attention a matter of arithmetic: the figure is floating-point operations of the products
that a causal mask leaves, over time. The peers, cuDNN and the kernel for Hopper that JAX comes with, compute the same
numbers, which lie in contiguous arrays for them; their masks begin at position 0, so chunks behind a cached prefix and
mixed batches have no peer. All in one run; each result is compared with plain JAX before it is timed.
Prints one table; the JSON is rewritten after every figure.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from benchmarks.gpu import device, inputs, report
from benchmarks.gpu.measure import Budget, Comparison, DeviceLostError, Setting, reason
from benchmarks.gpu.participants import OURS, config_step, implementation_step
from benchmarks.gpu.points import Point
from benchmarks.gpu.timing import Step
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig

RESULTS = Path(__file__).resolve().parents[1] / "results"
LAUNCHES = 8
# The other forms, with tiles as large as they have for many query tokens.
OTHER_FORMS = {"mma": MosaicConfig("mma", 64, 2, 2, 32), "wgmma": MosaicConfig("wgmma", 64, 2, 1, 64)}


@dataclass(frozen=True)
class Load:
    """A batch: a point's rows, and how many query tokens each has at its end."""

    name: str
    point: Point
    queries: tuple[int, ...]

    @property
    def is_prompts(self) -> bool:
        """Whether all rows are whole prompts of one length: what flash attention over contiguous arrays takes."""
        return self.point.is_uniform and self.queries == self.point.lengths

    @property
    def flops(self) -> int:
        """Of both products, masked scores not counted."""
        pairs = zip(self.point.lengths, self.queries, strict=True)
        scores = sum(new * (length - new) + new * (new + 1) // 2 for length, new in pairs)
        return 4 * self.point.num_heads * self.point.head_dim * scores

    def as_json(self) -> dict[str, Any]:
        """The shape; rows of one kind are counted."""
        kinds = list(dict.fromkeys(zip(self.point.lengths, self.queries, strict=True)))
        every = list(zip(self.point.lengths, self.queries, strict=True))
        rows = [{"rows": every.count(kind), "length": kind[0], "queries": kind[1]} for kind in kinds]
        shape = {k: v for k, v in self.point.as_json().items() if k not in ("batch", "context", "lengths")}
        return {"name": self.name, "rows": rows, **shape}


def loads(num_heads: int, num_kv_heads: int, head_dim: int, *, is_dry: bool = False) -> list[Load]:
    """Prompts of several lengths, several prompts, a chunk behind a long prefix, a chunk among rows that decode."""
    unit = 8 if is_dry else 512
    batches: dict[str, list[tuple[int, int]]] = {
        f"{unit}": [(unit, unit)],
        f"{4 * unit}": [(4 * unit, 4 * unit)],
        f"{16 * unit}": [(16 * unit, 16 * unit)],
        f"8 x {2 * unit}": [(2 * unit, 2 * unit)] * 8,
        f"{4 * unit} of {64 * unit}": [(64 * unit, 4 * unit)],
        f"{4 * unit} + 63 x 1": [(4 * unit, 4 * unit)] + [(8 * unit, 1)] * 63,
    }
    found = []
    for name, rows in batches.items():
        lengths, queries = zip(*rows, strict=True)
        found.append(Load(name, Point(lengths, num_heads, num_kv_heads, 16, head_dim), queries))
    return found[::5] if is_dry else found


HEADS = ((32, 8, 128), (64, 8, 128), (32, 8, 64), (16, 8, 256), (28, 4, 128))


def _cudnn(load: Load) -> Step:
    shape = load.point.batch, load.point.context, load.point.num_heads, load.point.head_dim

    def step(q: Any, kv: Any, _: Any) -> Any:
        out = jax.nn.dot_product_attention(q.reshape(shape), *kv, is_causal=True, implementation="cudnn")
        return out.reshape(q.shape)

    return step


def _jax_mosaic(load: Load) -> Step:
    """It does not scale: ``measure`` scales the first queries instead, which are compared."""
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention

    point = load.point
    shape = point.batch, point.context, point.num_heads, point.head_dim
    config = TuningConfig(64, 128 if point.head_dim <= 128 else 64, 2, causal=True)
    return lambda q, kv, _: attention(q.reshape(shape), *kv, config).reshape(q.shape)


PEERS: dict[str, Callable[[Load], Step]] = {"cudnn": _cudnn, "jax_mosaic": _jax_mosaic}


def queries_of(load: Load) -> jax.Array:
    """``[T, Hq, D]``."""
    shape = sum(load.queries), load.point.num_heads, load.point.head_dim
    return (0.7 * jax.random.normal(jax.random.key(2), shape)).astype(inputs.DTYPE)


def measure(load: Load, setting: Setting, forms: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of each participant at a load, or the reason why there is none; as they come."""
    comparison, q, sets = Comparison(), queries_of(load), setting.num_sets(load.point.kv_bytes)
    pools, batch = inputs.paged_sets(load.point, sets)
    batch = inputs.with_queries(load.point, batch, load.queries)
    plain = implementation_step("xla")(load.point)
    comparison(jax.jit(plain)(q, pools[0], batch))
    ours = {OURS: plain if setting.is_dry else implementation_step(OURS)(load.point)}
    ours |= {f"{OURS}_{form}": plain if setting.is_dry else config_step(OTHER_FORMS[form]) for form in forms}
    for name, step in ours.items():
        yield name, _timed(lambda step=step: step, load, q, pools, batch, comparison, setting)
    del pools, batch
    if not load.is_prompts:
        why = "NotImplementedError: its causal mask begins at position 0 of every row"
        yield from ((name, {"reason": why}) for name in PEERS)
        return
    whole, _ = inputs.contiguous_sets(load.point, sets)
    for name, make in PEERS.items():
        first = (q * load.point.head_dim**-0.5).astype(q.dtype) if name == "jax_mosaic" else q
        yield name, _timed(lambda make=make: make(load), load, first, whole, None, comparison, setting)


def _timed(
    make: Callable[[], Step],
    load: Load,
    q: jax.Array,
    sets: Any,
    shared: Any,
    comparison: Comparison,
    setting: Setting,
) -> dict[str, Any]:
    if setting.budget.left <= 0:
        return {"reason": "no time left"}
    try:
        timing = setting.time(make(), q, sets, shared, launches=LAUNCHES, check=comparison)
    except Exception as error:  # a participant that is missing, broken or refuses the shape ends no run
        return reason(error)
    speed = float(f"{load.flops / timing.seconds / 1e12:.4g}")
    return {**timing.as_json(), "tflops": speed, "error": comparison.error}


def table(entries: Sequence[dict[str, Any]]) -> str:
    """One line a load: ours in microseconds and TFLOP/s, then how many times as long the others take."""
    others = [*(f"{OURS}_{form}" for form in OTHER_FORMS), *PEERS]
    head = ["tokens", "heads", "D", "us", "TFLOP/s", "spread"]
    lines = [[*head, *(name.removeprefix(f"{OURS}_") for name in others)]]
    for entry in entries:
        load, mine = entry["load"], entry["results"].get(OURS, {})
        line = [load["name"], f"{load['num_heads']}/{load['num_kv_heads']}", str(load["head_dim"])]
        if "us" in mine:
            mark = "*" if mine["host_bound"] else ""
            line += [f"{mine['us']:.1f}{mark}", f"{mine['tflops']:.4g}", f"{mine['spread']:.1%}"]
        else:
            line += ["n/a"] * 3
        for name in others:
            value = report.ratio(entry, name)
            line.append(f"{value:.2f}x" if value else "n/a" if name in entry["results"] else "-")
        lines.append(line)
    return report.aligned(lines)


def run(args: argparse.Namespace, setting: Setting, found: dict[str, Any]) -> Iterator[None]:
    """All loads; yields after every figure."""
    heads = ((4, 2, 32),) if args.dry_run else HEADS[:1] if not args.full else HEADS
    forms = list(OTHER_FORMS) if args.full else []
    done = [entry["load"] for entry in found["loads"]]
    for load in (load for shape in heads for load in loads(*shape, is_dry=args.dry_run)):
        shape = load.as_json()
        if shape in done:
            continue
        if setting.budget.left <= 0:
            found["skipped"].append(shape)
            continue
        entry: dict[str, Any] = {"load": shape, "flops": load.flops, "results": {}}
        found["loads"].append(entry)
        try:
            for name, figures in measure(load, setting, forms):
                entry["results"][name] = figures
                told = f"{figures['us']:.1f} us" if "us" in figures else figures["reason"][:100]
                print(
                    f"[{setting.budget.left:4.0f} s left] {load.name} {name}: {told}",
                    file=sys.stderr,
                    flush=True,
                )
                yield
        except DeviceLostError:
            raise
        except Exception as error:  # no memory for the inputs, say
            entry["results"][OURS] = reason(error)
        entry["complete"] = all(
            figures.get("reason") != "no time left" for figures in entry["results"].values()
        )
        yield


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="32/8 heads of 128 (the default)")
    which.add_argument("--full", action="store_true", help="other heads and the kernel's other forms, too")
    which.add_argument(
        "--dry-run", action="store_true", help="tiny, on any device, 'xla' in the kernel's place"
    )
    parser.add_argument(
        "--memory-fraction", type=float, default=0.5, help="of what JAX has, for keys and values"
    )
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--commit", help="what runs, where the sources were copied without their repository")
    parser.add_argument("--resume", action="store_true", help="leave out the loads that --out has")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-prefill-<date>.json")
    return parser.parse_args(arguments)


def new_report(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What is known before anything is measured; with ``--resume``, the complete loads of earlier calls."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/gpu/prefill.py", *sys.argv[1:]]),
        "dry_run": args.dry_run,
        **device.describe(args.commit),
        "loads": [],
        "skipped": [],
    }
    if args.resume and out.exists():
        earlier = report.read(out)
        if earlier["hardware"]["devices"] != found["hardware"]["devices"]:
            raise SystemExit(f"{out} is of {earlier['hardware']['devices']}: give another --out")
        found["loads"] = [entry for entry in earlier["loads"] if entry.get("complete")]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 without a GPU (a dry run needs none), 2 if the GPU was lost on the way."""
    args = parse(arguments)
    device.prepare()
    missing = device.missing_gpu_reason()
    if missing and not args.dry_run:
        print(f"nothing was measured: {missing}")
        return 1
    name = "dry-run-prefill" if args.dry_run else f"gpu-prefill-{datetime.date.today().isoformat()}"
    out = args.out or RESULTS / f"{name}.json"
    found, status = new_report(args, out), 0
    max_bytes = int(args.memory_fraction * device.memory_bytes())
    # Copy bandwidth is no measure of what is bound by arithmetic.
    setting = Setting(1.0, max_bytes, Budget(args.budget_seconds), args.dry_run)
    try:
        for _ in run(args, setting, found):
            report.save(found, out)
    except DeviceLostError as error:
        print(f"the GPU was lost, run again with --resume: {error}")
        status = 2
    report.save(found, out)
    if args.dry_run:
        print(f"DRY RUN: implementation 'xla' in the place of {OURS!r}; none of this is a figure of a GPU.")
    print(f"{found['hardware']['devices'][0]}, JAX {found['versions'].get('jax')}, commit {found['commit']}")
    print(table(found["loads"]))
    print("x: their time over ours. *: the host may have been the bound. FLOPs: of what a causal mask leaves")
    print("\n".join(report.reasons(found["loads"])))
    if found["skipped"]:
        print(f"not measured for lack of time: {len(found['skipped'])} loads")
    print(f"written to {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
