"""Measures tile sizes of the paged attention kernel and writes the table that calls on this kind of device read.

    python benchmarks/gpu/tune_paged_attention.py --budget-seconds 540
    python benchmarks/gpu/tune_paged_attention.py --budget-seconds 540 --resume

For each shape and each form of the kernel: every tile size with every number of stages at two thread blocks a
multiprocessor, then the best few with every number of thread blocks. Each result is compared with the ``xla``
implementation before it is timed; one that differs or does not compile is left out and counted.
The table is rewritten after every shape.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import device, inputs, report
from benchmarks.gpu.bandwidth import copy_bandwidth
from benchmarks.gpu.measure import Budget, Comparison, DeviceLostError, Setting, reason
from benchmarks.gpu.participants import call_shape, config_step, implementation_step
from benchmarks.gpu.points import HEADS, Point, uniform
from benchmarks.gpu.timing import Step, compiled_program
from jaxpaged.pallas_kernels.paged_attention.tuning import CallShape, MosaicConfig, table_name

PACKAGE = Path(__file__).resolve().parents[2] / "pallas_kernels" / "paged_attention"
FORMS = ("mma", "wgmma", "prefill")  # the last for many query tokens only
TILES = {"mma": (32, 64, 128), "wgmma": (64, 128), "prefill": (64, 128)}
STAGES = (2, 3, 4)
CTAS_PER_SM = (1, 2, 3, 4)
FIRST_CTAS = 2
KEPT = 2  # configurations of each form that go on to the second round
# Rows and context of a decode batch: one long row, few, many, many short ones.
LOADS = ((64, 4096), (1, 131072), (1, 8192), (8, 8192), (8, 32768), (256, 1024))
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Shape:
    """What is tuned for: a decode batch, or ``queries`` tokens at the end of every row."""

    point: Point
    queries: int = 1

    def call_shape(self) -> CallShape:
        """As the kernel's call sees it."""
        shape: CallShape = call_shape(self.point, self.queries)
        return shape

    @property
    def name(self) -> str:
        """For people."""
        p = self.point
        heads = f"{p.num_heads}/{p.num_kv_heads} block {p.block_size}"
        return f"{p.batch} x {p.context}, {self.queries} queries, {heads}"


def shapes(block_sizes: Sequence[int], heads: Sequence[tuple[int, int]], kind: str) -> list[Shape]:
    """The first block size and heads with all loads first, then the rest."""
    found = []
    for size, pair in itertools.product(block_sizes, heads):
        if kind in ("decode", "all"):
            found += [Shape(uniform(*load, pair, size)) for load in LOADS]
        if kind in ("prefill", "all"):
            found.append(Shape(uniform(1, 2 * PREFILL_TOKENS, pair, size), PREFILL_TOKENS))
    return found


def first_round(form: Any, queries: int) -> list[MosaicConfig]:
    """Every tile size with every number of stages."""
    if form == "prefill" and queries == 1:
        return []
    tiles_m = {"mma": (32, 64) if queries > 1 else (16,), "wgmma": (64,), "prefill": (128,)}[form]
    ctas = 1 if queries > 1 else FIRST_CTAS
    product = itertools.product(TILES[form], STAGES, tiles_m)
    return [MosaicConfig(form, tile_kv, stages, ctas, tile_m) for tile_kv, stages, tile_m in product]


def second_round(best: Sequence[MosaicConfig]) -> list[MosaicConfig]:
    """The best of the first, with other numbers of thread blocks; of prefill there is one, always."""
    several = [config for config in best if config.form != "prefill"]
    others = ((config, ctas) for config in several for ctas in CTAS_PER_SM if ctas != config.ctas_per_sm)
    return [replace(config, ctas_per_sm=ctas) for config, ctas in others]


def prepare_inputs(shape: Shape, setting: Setting) -> tuple[jax.Array, Any, Any]:
    """Queries, pools and batch."""
    pools, batch = inputs.paged_sets(shape.point, setting.num_sets(shape.point.kv_bytes))
    if shape.queries == 1:
        return inputs.queries(shape.point), pools, batch
    batch = inputs.with_queries(shape.point, batch, [shape.queries] * shape.point.batch)
    q = jax.random.normal(jax.random.key(2), (len(batch.rows), shape.point.num_heads, shape.point.head_dim))
    return (0.7 * q).astype(inputs.DTYPE), pools, batch


class Sweep:
    """One shape: its inputs, the right result, and the configurations that were timed."""

    def __init__(
        self, shape: Shape, setting: Setting, step_of: Callable[[MosaicConfig], Step], workers: int
    ) -> None:
        self.shape, self.setting, self.step_of, self.workers = shape, setting, step_of, workers
        self.launches = 1 if setting.is_dry else 16 if shape.queries == 1 else 4
        self.q, self.pools, self.batch = prepare_inputs(shape, setting)
        plain = implementation_step("xla")(shape.point)
        self.expected = np.asarray(jax.jit(plain)(self.q, self.pools[0], self.batch), np.float32)
        self.timed: dict[MosaicConfig, float] = {}
        self.refused: dict[str, int] = {}

    def try_all(self, configs: Sequence[MosaicConfig]) -> None:
        """Compiles all configurations side by side and checks their results; then times one after the other."""
        configs = configs[:2] if self.setting.is_dry else configs
        with ThreadPoolExecutor(self.workers) as pool:
            built = [(config, pool.submit(self._build, config)) for config in configs]
        for config, future in built:
            if self.setting.budget.left <= 0:
                return
            try:
                timing = self.setting.time(
                    self.step_of(config),
                    self.q,
                    self.pools,
                    self.batch,
                    launches=self.launches,
                    program=future.result(),
                )
            except Exception as failed:  # too much shared memory, say
                why = reason(failed)["reason"]
                self.refused[why] = self.refused.get(why, 0) + 1
            else:
                self.timed[config] = timing.seconds

    def _build(self, config: MosaicConfig) -> Callable[..., Any]:
        """The program to time. Raises WrongResultError if its first launch gives another result."""
        if self.setting.budget.left <= 0:
            raise TimeoutError("no time left")
        program = compiled_program(self.step_of(config), self.launches)
        first, _ = program(self.q, self.pools[: self.launches], self.batch)
        Comparison(self.expected.reshape(len(self.expected), -1))(first)
        return program

    def best(self, form: str, count: int = 1) -> list[MosaicConfig]:
        """The fastest configurations of a form."""
        mine = [config for config in self.timed if config.form == form]
        return sorted(mine, key=self.timed.__getitem__)[:count]

    def run(self, forms: Sequence[str]) -> None:
        """Both rounds of every form."""
        for form in forms:
            self.try_all(first_round(form, self.shape.queries))
            self.try_all(second_round(self.best(form, KEPT)))

    def entry(self) -> dict[str, Any]:
        """The line of the table: the shape, the fastest sizes, and what each form reached."""
        winner = min(self.timed, key=self.timed.__getitem__)
        microseconds = {form: round(1e6 * self.timed[best], 2) for form in FORMS for best in self.best(form)}
        return {
            **asdict(self.shape.call_shape()),
            "dtype": jnp.dtype(inputs.DTYPE).name,
            "config": asdict(winner),
            "microseconds": round(1e6 * self.timed[winner], 2),
            "best_of_form": microseconds,
            "num_timed": len(self.timed),
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from benchmarks.gpu.paged_attention import head_pairs, numbers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-sizes", type=numbers, default=(16, 64, 32, 128))
    parser.add_argument("--heads", type=head_pairs, default=HEADS)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--kind", default="all", choices=("decode", "prefill", "all"))
    parser.add_argument("--memory-fraction", type=float, default=0.6)
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--workers", type=int, default=6, help="threads that compile side by side")
    parser.add_argument("--commit", help="what runs, where the sources were copied without their repository")
    parser.add_argument("--resume", action="store_true", help="keep the shapes that the table has")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny, on any device, 'xla' in the kernel's place"
    )
    parser.add_argument("--out", type=Path, help="default: tuned_<device>.json, where calls look for it")
    args = parser.parse_args(arguments)
    if args.dry_run and args.out is None:
        parser.error("--dry-run needs --out: its table must not be taken for a measured one")
    return args


def new_table(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The table without entries, or with those of an earlier call."""
    table = {
        "date": datetime.date.today().isoformat(),
        "dry_run": args.dry_run,
        "device": jax.local_devices()[0].device_kind,
        **device.describe(args.commit),
        "copy_bandwidth": copy_bandwidth(2**22 if args.dry_run else 2**30)["bytes_per_second"],
        "refused": {},
        "entries": [],
    }
    if args.resume and path.exists():
        table["entries"] = report.read(path)["entries"]
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print, write. Returns 1 without a GPU (a dry run needs none), 2 if the GPU was lost on the way."""
    args = parse(arguments)
    device.prepare()
    missing = device.missing_gpu_reason()
    if missing and not args.dry_run:
        print(f"nothing was tuned: {missing}")
        return 1
    path = args.out or PACKAGE / table_name(jax.local_devices()[0].device_kind)
    budget, table = Budget(args.budget_seconds), new_table(args, path)
    setting = Setting(
        table["copy_bandwidth"], int(args.memory_fraction * device.memory_bytes()), budget, args.dry_run
    )
    todo = (
        [Shape(Point((64,), 4, 2, 16, 32))]
        if args.dry_run
        else shapes(args.block_sizes, args.heads, args.kind)
    )
    plain = implementation_step("xla")(todo[0].point)
    done = [tuple(entry[name] for name in asdict(todo[0].call_shape())) for entry in table["entries"]]
    status = 0
    for shape in todo:
        if tuple(asdict(shape.call_shape()).values()) in done or shape.point.kv_bytes > setting.max_bytes:
            continue
        if budget.left <= 0:
            print(f"out of time before {shape.name}")
            break
        try:
            sweep = Sweep(shape, setting, (lambda _: plain) if args.dry_run else config_step, args.workers)
            sweep.run(args.forms)
            table["entries"] += [sweep.entry()] if sweep.timed else []
            table["refused"][shape.name] = sweep.refused
            print(line_of(shape, sweep, setting), flush=True)
        except DeviceLostError as error:
            print(f"the GPU was lost at {shape.name}, run again with --resume: {error}")
            status = 2
            break
        except Exception as error:  # no memory for the inputs, say
            table["refused"][shape.name] = reason(error)
        report.save(table, path)
    report.save(table, path)
    label = "DRY RUN, 'xla' in the kernel's place: " if args.dry_run else ""
    print(f"{label}{len(table['entries'])} shapes written to {path}")
    return status


def line_of(shape: Shape, sweep: Sweep, setting: Setting) -> str:
    """What was found for a shape, and how much of copy bandwidth it is."""
    if not sweep.timed:
        return f"{shape.name}: nothing ran: {sweep.refused}"
    entry = sweep.entry()
    speed = shape.point.kv_bytes / entry["microseconds"] * 1e6
    config = " ".join(f"{name}={value}" for name, value in entry["config"].items())
    share = (
        f"{speed / setting.copy_bandwidth:.1%} of copy bandwidth" if shape.queries == 1 else "compute-bound"
    )
    count = f"{entry['num_timed']} timed, {sum(sweep.refused.values())} refused"
    return (
        f"{shape.name}: {entry['microseconds']:.1f} us, {share}, {config}; {entry['best_of_form']}; {count}"
    )


if __name__ == "__main__":
    sys.exit(main())
