"""The bandwidth table of paged attention on a GPU: this project's kernel beside its peers, on the same data.

    python benchmarks/gpu/paged_attention.py --quick
    python benchmarks/gpu/paged_attention.py --full --budget-seconds 540 --out table.json
    python benchmarks/gpu/paged_attention.py --full --budget-seconds 540 --out table.json --resume

Decoding reads every key and value once, so the figure is bytes of keys and values over time, as a share of the
copy bandwidth measured in the same run. Prints one table; the JSON is rewritten after every figure, so a run that
is cut short leaves all it had. ``--resume`` takes up such a file: each call measures copy bandwidth anew, and
ratios are always of figures of one call.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import device, points, report
from benchmarks.gpu.bandwidth import copy_bandwidth
from benchmarks.gpu.measure import Budget, DeviceLostError, Setting, measure_point, reason
from benchmarks.gpu.participants import OURS, PEERS, XLA, Participant, config_of, ours
from benchmarks.gpu.points import Grid, Plan, Point
from benchmarks.gpu.scatter import measure_scatter
from benchmarks.gpu.variants import measure_ragged, measure_variants

SECTIONS = ("points", "variants", "ragged", "scatter")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def numbers(text: str) -> tuple[int, ...]:
    """``1,8`` -> ``(1, 8)``."""
    return tuple(int(part) for part in text.split(","))


def head_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """``32/8,16/16`` -> ``((32, 8), (16, 16))``."""
    pairs = (part.split("/") for part in text.split(","))
    return tuple((int(num_heads), int(num_kv_heads)) for num_heads, num_kv_heads in pairs)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="the points with a bar and a few more (the default)"
    )
    which.add_argument("--full", action="store_true", help="the whole grid, points with a bar first")
    which.add_argument(
        "--dry-run", action="store_true", help="tiny, on any device, 'xla' in the kernel's place"
    )
    parser.add_argument("--batches", type=numbers, default=points.BATCHES)
    parser.add_argument("--contexts", type=numbers, default=points.CONTEXTS)
    parser.add_argument("--heads", type=head_pairs, default=points.HEADS)
    parser.add_argument("--block-sizes", type=numbers, default=points.BLOCK_SIZES)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument(
        "--peers", nargs="*", default=[p.name for p in PEERS], choices=[p.name for p in PEERS]
    )
    parser.add_argument(
        "--both-forms", action="store_true", help="in --full too; otherwise in the others only"
    )
    parser.add_argument(
        "--memory-fraction", type=float, default=0.6, help="of what JAX has, for keys and values"
    )
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--commit", help="what runs, where the sources were copied without their repository")
    parser.add_argument("--resume", action="store_true", help="leave out the points that --out has")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<date>.json")
    args = parser.parse_args(arguments)
    args.both_forms = args.both_forms or not (args.full or args.dry_run)
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """What to measure, in order."""
    if args.dry_run:
        return points.dry_plan()
    bars = [bar.point for bar in points.BARS]
    if not args.full:
        return Plan(list(dict.fromkeys([*bars, *points.QUICK])))
    grid = Grid(args.batches, args.contexts, args.heads, args.block_sizes)
    return Plan(list(dict.fromkeys([*bars, *grid.points()])))


def new_report(args: argparse.Namespace) -> dict[str, Any]:
    """What is known before anything is measured; with ``--resume``, the points of the earlier calls."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/gpu/paged_attention.py", *sys.argv[1:]]),
        "dry_run": args.dry_run,
        "finished": False,
        **device.describe(args.commit),
        **{name: [] for name in ("bars", "points", "variants", "ragged", "scatter")},
        "slower_than_peers": [],
        "skipped": [],
        "why_skipped": "",
    }
    if args.resume and args.out.exists():
        earlier = report.read(args.out)
        if earlier["hardware"]["devices"] != found["hardware"]["devices"]:
            raise SystemExit(f"{args.out} is of {earlier['hardware']['devices']}: give another --out")
        for name in ("points", "variants", "ragged", "scatter"):
            found[name] = earlier[name]
    return found


def participants_at(point: Point, args: argparse.Namespace) -> tuple[list[Participant], dict[str, Any]]:
    """Who is measured at a point, and the tile sizes that the kernel's call takes there.

    ``xla`` is always first: its result is what the others' are compared with.
    """
    config: dict[str, Any] = {} if args.dry_run else asdict(config_of(point))
    forms = [form for form in ("mma", "wgmma") if args.both_forms and form != config.get("form")]
    mine = [ours(form, dry_run=args.dry_run) for form in (None, *forms)]
    return [XLA, *mine, *(peer for peer in PEERS if peer.name in args.peers and peer is not XLA)], config


def measure_points(
    plan: Plan, args: argparse.Namespace, setting: Setting, found: dict[str, Any]
) -> Iterator[None]:
    """The table; yields after every figure."""
    done = [entry["point"] for entry in found["points"] if entry.get("complete")]
    found["points"] = [entry for entry in found["points"] if entry.get("complete")]
    for point in plan.points:
        shape = point.as_json()
        if shape in done:
            continue
        if point.kv_bytes > setting.max_bytes or setting.budget.left <= 0:
            why = "time" if setting.budget.left <= 0 else "memory"
            if shape not in [skipped["point"] for skipped in found["skipped"]]:  # bars come up twice
                found["skipped"].append({"point": shape, "why": why})
            continue
        entry: dict[str, Any] = {"point": shape, "copy_bandwidth": setting.copy_bandwidth, "results": {}}
        found["points"].append(entry)
        try:
            participants, config = participants_at(point, args)
        except Exception as error:  # sizes for a shape that the kernel does not take
            entry["results"][OURS] = reason(error)
            entry["complete"] = True
            yield
            continue
        if config:
            entry["config"] = config
        for name, figures in measure_point(point, participants, setting):
            entry["results"][name] = figures
            if name == OURS and config:
                entry["results"][f"{OURS}_{config['form']}"] = {**figures, "same_as": OURS}
            _progress(point, name, figures, setting)
            yield
        entry["complete"] = {participant.name for participant in participants} <= entry["results"].keys()


def _progress(point: Point, name: str, figures: dict[str, Any], setting: Setting) -> None:
    what = f"{figures['us']:.1f} us, {figures['share']:.1%}" if "us" in figures else figures["reason"][:100]
    heads = f"{point.num_heads}/{point.num_kv_heads} block {point.block_size}"
    where = f"{point.batch} x {point.context} {heads}"
    print(f"[{setting.budget.left:4.0f} s left] {where} {name}: {what}", file=sys.stderr, flush=True)


def measure(plan: Plan, args: argparse.Namespace, setting: Setting, found: dict[str, Any]) -> Iterator[None]:
    """All sections; yields after every figure. Short sections come before the rest of a long table."""
    bars = Plan([bar.point for bar in plan.bars], plan.bars)
    if "points" in args.sections:
        yield from measure_points(bars, args, setting, found)
    implementation = "xla" if args.dry_run else OURS
    sections = {
        "variants": (measure_variants(point, setting, implementation) for point in plan.variants_at),
        "ragged": iter([measure_ragged(plan.ragged, ours(dry_run=args.dry_run), setting)]),
        "scatter": (measure_scatter(shape, setting) for shape in plan.scatters),
    }
    for name, groups in sections.items():
        if name in args.sections and not (args.resume and found[name]):
            for group in groups:
                for entry in group:
                    found[name].append(entry)
                    print(f"[{setting.budget.left:4.0f} s left] {entry['text']}", file=sys.stderr, flush=True)
                    yield
    if "points" in args.sections:
        yield from measure_points(plan, args, setting, found)


def conclude(plan: Plan, found: dict[str, Any]) -> None:
    """Fills in what follows from the figures: bars, peers that are faster, what was left out."""
    shares = {str(e["point"]): e["results"].get(OURS, {}).get("share") for e in found["points"]}
    found["bars"] = []
    for bar in plan.bars:
        share = shares.get(str(bar.point.as_json()))
        verdict = report.verdict(share is not None and share >= bar.share, found["dry_run"])
        found["bars"].append(
            {"name": bar.name, "wanted": bar.share, "share": share, "verdict": verdict if share else "open"}
        )
    found["slower_than_peers"] = report.slower_than_peers(found["points"])
    counts = {why: sum(p["why"] == why for p in found["skipped"]) for why in ("memory", "time")}
    found["why_skipped"] = ", ".join(f"{count} for lack of {why}" for why, count in counts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 without a GPU (a dry run needs none), 2 if the GPU was lost on the way."""
    args = parse(arguments)
    device.prepare()
    missing = device.missing_gpu_reason()
    if missing and not args.dry_run:
        print(f"nothing was measured: {missing}")
        return 1
    name = "dry-run" if args.dry_run else f"gpu-{datetime.date.today().isoformat()}"
    args.out = args.out or RESULTS / f"{name}.json"
    plan, found = plan_of(args), new_report(args)
    budget = Budget(args.budget_seconds)
    found["copy_bandwidth"] = copy_bandwidth(2**22 if args.dry_run else 2**30)
    max_bytes = int(args.memory_fraction * device.memory_bytes())
    setting = Setting(found["copy_bandwidth"]["bytes_per_second"], max_bytes, budget, args.dry_run)
    status = 0
    try:
        for _ in measure(plan, args, setting, found):
            conclude(plan, found)
            report.save(found, args.out)
        found["finished"] = budget.left > 0
    except DeviceLostError as error:
        found["device_lost"] = str(error)
        status = 2
    conclude(plan, found)
    report.save(found, args.out)
    print("\n".join(report.lines_of(found)))
    if status:
        print(f"the GPU was lost, run again with --resume: {found['device_lost']}")
    print(f"written to {args.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
