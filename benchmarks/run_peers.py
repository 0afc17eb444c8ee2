"""Measure the installed peers, each in a process of its own environment, pinned to the same cores.

Command line::

    python benchmarks/run_peers.py --peers-dir DIR --checkpoint DIR --workload W1 W2 --cores 0

``DIR`` holds one virtual environment per peer, named ``vllm``, ``llamacpp`` and ``hf``; what is missing is
skipped. How to make them: ``benchmarks/peers/README.md``. Only figures taken in one run, alternating, make a
fair ratio: a benchmark calls :func:`run_peer` between its own repeats.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:  # as part of the repository, else as a script beside its neighbour
    from benchmarks import workloads
except ImportError:
    import workloads

ADAPTERS_DIR = Path(__file__).resolve().parent / "peers"
ALLOCATOR = "libtcmalloc_minimal.so.4"
TIMEOUT_S = 3600.0

# peer -> (virtual environment, adapter script)
PEERS: dict[str, tuple[str, str]] = {
    "jaxpaged": ("jaxpaged", "ours.py"),
    "vllm": ("vllm", "vllm_cpu.py"),
    "llamacpp": ("llamacpp", "llamacpp.py"),
    "hf_static": ("hf", "hf_static.py"),
    "hf_continuous": ("hf", "hf_continuous.py"),
}


class PeerError(RuntimeError):
    """A peer did not give its figures."""


def installed_peers(peers_dir: str | Path) -> dict[str, Path]:
    """Return the interpreter of each peer that has an environment under ``peers_dir``."""
    found = {}
    for name, (environment, _) in PEERS.items():
        python = (
            Path(peers_dir).absolute() / environment / "bin" / "python"
        )  # a link: resolving it leaves the venv
        if python.exists():
            found[name] = python
    return found


def _allocator(python: Path) -> str | None:
    """Return tcmalloc, from the environment's own ``lib`` folder or from the system, if there is one."""
    own = python.parent.parent / "lib" / ALLOCATOR
    if own.exists():
        return str(own)
    return ctypes.util.find_library("tcmalloc_minimal")


def _environment(name: str, python: Path, cores: Sequence[int]) -> Mapping[str, str]:
    """Return the variables for a peer: as many threads as cores, nothing of our own interpreter."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[variable] = str(len(cores))
    if name == "vllm" and (allocator := _allocator(python)):
        env["LD_PRELOAD"] = allocator
    return env


def run_peer(
    name: str,
    python: str | Path,
    checkpoint: str | Path,
    workload: str,
    cores: Sequence[int],
    dtype: str = "float32",
    repeats: int = 3,
    *,
    tokens_json: str | Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Run one peer on one workload and return its figures.

    Raises :class:`PeerError`, with the end of what the peer wrote, if it fails or exceeds ``timeout_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        requests = workloads.write_workloads(Path(folder) / "workloads.json")
        command = [str(python), str(ADAPTERS_DIR / PEERS[name][1])]
        command += [
            "--checkpoint",
            str(checkpoint),
            "--workloads-json",
            str(requests),
            "--workload",
            workload,
        ]
        command += ["--dtype", dtype, "--repeats", str(repeats), "--cores", ",".join(map(str, cores))]
        if tokens_json:
            command += ["--tokens-json", str(tokens_json)]
        env = _environment(name, Path(python), cores)
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, check=False, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{name} took longer than {timeout_s:.0f} s on {workload}") from error
    if done.returncode != 0 or not done.stdout.strip():
        raise PeerError(f"{name} failed on {workload} (status {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peers(
    peers: Mapping[str, str | Path],
    checkpoint: str | Path,
    workload_names: Sequence[str],
    cores: Sequence[int],
    dtype: str = "float32",
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Run peers one after the other; one that fails is reported under ``error`` and stops no other."""
    results = []
    for workload in workload_names:
        for name, python in peers.items():
            try:
                results.append(run_peer(name, python, checkpoint, workload, cores, dtype, repeats))
            except PeerError as error:
                results.append({"peer": name, "workload": workload, "dtype": dtype, "error": str(error)})
    return results


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    columns = {
        "workload": "workload",
        "peer": "peer",
        "version": "version",
        "output_tokens_per_second": "output tokens/s",
        "ttft_ms_mean": "first token ms",
        "tpot_ms_mean": "per token ms",
        "peak_rss_mib": "peak MiB",
        "startup_s": "start-up s",
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['workload']} | {result['peer']} | failed" + " |" * (len(columns) - 2))
        else:
            lines.append("| " + " | ".join(str(result[key]) for key in columns) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure the installed peers and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--peers-dir", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--workload", nargs="+", choices=workloads.WORKLOADS, default=["W2"])
    parser.add_argument(
        "--peer", nargs="+", choices=sorted(PEERS), help="all that are installed, if not given"
    )
    parser.add_argument("--cores", default="0", help="comma separated cores to pin to")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    peers = installed_peers(args.peers_dir)
    if args.peer:
        peers = {name: python for name, python in peers.items() if name in args.peer}
    cores = [int(core) for core in args.cores.split(",")]
    results = run_peers(peers, args.checkpoint, args.workload, cores, args.dtype, args.repeats)
    print(json.dumps(results, indent=1) if args.json else format_table(results))
    errors = [result["error"] for result in results if "error" in result]
    print(*errors, sep="\n\n", file=sys.stderr, end="\n" if errors else "")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
