"""This engine beside its peers, in one run, on the same cores: prints one table, writes one JSON.

Command line::

    python benchmarks/run.py --peers-dir peers --sizes small medium --workloads W1 W2 W3 --cores 0

Participants take turns (A B C A B C ...), each turn a process of its own, because shared machines drift; the figure of
each is the median over all turns and repeats, the ratio is that of the medians. Without ``--peers-dir`` only
this engine runs, and there is no ratio to print.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import run_peers, workloads
from jaxpaged.serve.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "jaxpaged"


def take_turns(
    participants: dict[str, Path], checkpoint: Path, workload: str, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All turns of all participants on one workload, merged: name to figures."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in participants}
    for turn in range(args.turns):
        for name, python in participants.items():
            print(f"  {workload} turn {turn + 1}/{args.turns}: {name}", file=sys.stderr, flush=True)
            try:
                result = run_peers.run_peer(
                    name, python, checkpoint, workload, args.core_list, args.dtype, args.repeats
                )
            except run_peers.PeerError as error:
                result = {"peer": name, "workload": workload, "error": str(error)[-500:]}
            turns[name].append(result)
    return {name: merge(results) for name, results in turns.items()}


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one participant over its turns: seconds of all repeats, medians of the rest."""
    good = [result for result in results if "error" not in result]
    if not good:
        return results[-1]
    merged = dict(good[-1])
    merged["seconds"] = [second for result in good for second in result["seconds"]]
    median_seconds = statistics.median(merged["seconds"])
    merged["output_tokens_per_second"] = round(merged["output_tokens"] / median_seconds, 1)
    for name in ("ttft_ms_mean", "tpot_ms_mean", "peak_rss_mib", "startup_s"):
        values = [result[name] for result in good if result.get(name) is not None]
        merged[name] = round(statistics.median(values), 2) if values else None
    return merged


def table(found: list[dict[str, Any]]) -> str:
    """One line a participant, the ratio of this engine to it in the last column but one."""
    head = [
        "size",
        "load",
        "engine",
        "version",
        "tok/s",
        "ours/theirs",
        "TTFT ms",
        "TPOT ms",
        "peak MiB",
        "start s",
    ]
    lines = [head]
    for entry in found:
        ours = entry["results"].get(OURS, {}).get("output_tokens_per_second")
        for name, result in entry["results"].items():
            begin = [entry["size"], entry["workload"], name]
            if "error" in result:
                lines.append([*begin, "failed", *[""] * 6])
                continue
            speed = result["output_tokens_per_second"]
            ratio = f"{ours / speed:.2f}x" if ours and name != OURS else ""
            rest = [result[key] for key in ("ttft_ms_mean", "tpot_ms_mean", "peak_rss_mib", "startup_s")]
            lines.append([*begin, result["version"], speed, ratio, *("-" if x is None else x for x in rest)])
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(str(x).rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers-dir", type=Path, help="folder of the peers' environments (peers/README.md)")
    parser.add_argument("--peer", nargs="+", help="only these peers")
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=sorted(workloads.SIZES))
    parser.add_argument(
        "--workloads", nargs="+", default=list(workloads.WORKLOADS), choices=workloads.WORKLOADS
    )
    parser.add_argument("--cores", default="0", help="comma separated cores to pin to")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="in one process")
    parser.add_argument("--turns", type=int, default=1, help="processes of each participant")
    parser.add_argument("--checkpoints", type=Path, default=Path(".cache/checkpoints"))
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu-<date>.json")
    args = parser.parse_args()
    args.core_list = [int(core) for core in args.cores.split(",")]
    return args


def main() -> int:
    """Measure, print, write."""
    args = parse()
    peers = run_peers.installed_peers(args.peers_dir) if args.peers_dir else {}
    if args.peer:
        peers = {name: python for name, python in peers.items() if name in args.peer}
    participants = {OURS: Path(sys.executable), **peers}
    found = []
    for size in args.sizes:
        checkpoint = workloads.make_checkpoint(size, args.checkpoints / size)
        for workload in args.workloads:
            results = take_turns(participants, checkpoint, workload, args)
            found.append({"size": size, "workload": workload, "results": results})
            print(table(found[-1:]), flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "dtype": args.dtype,
        "cores": args.core_list,
        **environment(),
        "measurements": found,
    }
    path = args.json or RESULTS / f"cpu-{report['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(found)}\n\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
