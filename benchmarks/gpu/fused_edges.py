"""Edges between the products of a decoder layer, and sampling: what XLA makes of them, and what a kernel would.

    python -m benchmarks.gpu.fused_edges --target h200 --out edges.json     # without a GPU: launches and bytes
    python -m benchmarks.gpu.fused_edges --time                             # on a GPU: microseconds

Without a GPU the programs are compiled for one that is not there (``tests/gpu_compile``), and the optimised HLO is
read: kernels, and the bytes that they read and write, but for weights (``hlo_traffic.py``). The floor is one kernel for
the edge, between products that read and write every array once. No autotuning takes place without a GPU, so the
products may be split otherwise on one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from benchmarks.gpu import edge_programs as edges
from benchmarks.gpu import sampling_trips
from benchmarks.gpu.device import missing_gpu_reason
from benchmarks.gpu.edge_programs import MODEL, Edge
from benchmarks.gpu.hlo_traffic import Reader
from jaxpaged.pallas_kernels.kept_cutoff.mosaic_gpu import capacity_of
from jaxpaged.serve.environment import commit, versions
from tests.gpu_compile.targets import TARGETS, compile_for, missing_reason

TOKENS = {"decode": 64, "prefill": 2048}
ROWS = (64, 256)

ITEM = 2  # bytes of bfloat16
HIDDEN = MODEL.hidden_size * ITEM
HEAD = MODEL.head_dim * ITEM
QKV = (MODEL.num_heads + 2 * MODEL.num_kv_heads) * HEAD
KV = 2 * MODEL.num_kv_heads * HEAD
MLP = MODEL.intermediate_size * ITEM
TABLES = 4 * MODEL.head_dim  # cos and sin, float32, of one token
SLOT = 4


class Account(NamedTuple):
    """One edge.

    Attributes:
      xla, kernel: the programs for a number of tokens; no kernel was written where XLA is at the floor.
      moved: by each Mosaic GPU kernel, bytes of one token read and written.
      floor: launches and bytes of one token at the least, the two products included.
    """

    xla: Callable[[int], Edge]
    kernel: Callable[[int], Edge] | None
    moved: Mapping[str, tuple[int, int]]
    floor: tuple[int, int]


ACCOUNTS = {
    "rotary embedding + scatter": Account(
        edges.rope_scatter_xla,
        edges.rope_scatter_kernel,
        {"cache_scatter": (KV + SLOT, KV), "rope_scatter": (QKV + TABLES + SLOT, QKV)},
        (3, HIDDEN + QKV + TABLES + QKV + TABLES + SLOT + QKV),
    ),
    "residual + RMSNorm": Account(
        edges.residual_norm_xla,
        edges.residual_norm_kernel,
        {"residual_norm": (2 * HIDDEN, 2 * HIDDEN)},
        (3, 2 * HIDDEN + 4 * HIDDEN + HIDDEN + 2 * MLP),
    ),
    "SwiGLU": Account(edges.swiglu_xla, None, {}, (3, HIDDEN + 2 * MLP + 3 * MLP + MLP + HIDDEN)),
}


def layer_accounts(target: str) -> Iterator[dict[str, Any]]:
    """An entry for each edge of a layer and size of batch."""
    for name, account in ACCOUNTS.items():
        for phase, num_tokens in TOKENS.items():
            moved = {
                k: (num_tokens * read, num_tokens * written) for k, (read, written) in account.moved.items()
            }
            entry = {"edge": name, "phase": phase, "num_tokens": num_tokens}
            for form, make in (("xla", account.xla), ("kernel", account.kernel)):
                if make is not None:
                    reader = Reader(_compiled(target, make(num_tokens)), kernels=moved, weights=("weights",))
                    entry[form] = _counted(reader)
            floor_launches, floor_bytes = account.floor
            yield {**entry, "floor": {"launches": floor_launches, "bytes": floor_bytes * num_tokens}}


def sampling_accounts(target: str) -> Iterator[dict[str, Any]]:
    """An entry for each number of rows and kind of sampling, with the passes over the logits that its bytes are."""
    for num_rows in ROWS:
        text = _compiled(target, edges.sampling_xla(num_rows))
        logits = num_rows * MODEL.vocab_size * 4
        for setting in sampling_trips.SETTINGS:
            trips = sampling_trips.count(setting, MODEL.vocab_size)
            entry = _counted(Reader(text, flags=setting.flags, trips=trips))
            entry["passes"] = round(entry["bytes"] / logits, 1)
            yield {
                "edge": "sampling",
                "setting": setting.name,
                "num_rows": num_rows,
                "trips": list(trips),
                "xla": entry,
                "floor": {"launches": 1, "bytes": logits, "passes": 1},
            }


def cutoff_accounts(target: str) -> Iterator[dict[str, Any]]:
    """An entry for each number of rows and filter: the search alone, by XLA and in one kernel."""
    capacity = capacity_of(TARGETS[target].gpu)
    for num_rows in ROWS:
        texts = {name: _compiled(target, edges.cutoff(num_rows, name)) for name in ("xla", "mosaic_gpu")}
        logits = num_rows * MODEL.vocab_size * 4
        for setting in sampling_trips.SETTINGS:
            trips = sampling_trips.count(setting, MODEL.vocab_size)
            if not trips:
                continue
            reads = sampling_trips.kernel_reads(setting, MODEL.vocab_size, capacity)
            moved = {"kept_cutoff": (round(reads * logits), 512 * num_rows)}
            entries = {
                "xla": _counted(Reader(texts["xla"], trips=trips)),
                "kernel": _counted(Reader(texts["mosaic_gpu"], kernels=moved)),
                "floor": {"launches": 1, "bytes": logits},
            }
            for entry in entries.values():
                entry["passes"] = round(entry["bytes"] / logits, 1)
            yield {"edge": "cutoff", "setting": setting.name, "num_rows": num_rows, **entries}


def _compiled(target: str, edge: Edge) -> str:
    return compile_for(target, edge.function, edge.args, edge.donated).as_text() or ""


def _counted(reader: Reader) -> dict[str, Any]:
    traffic = reader.traffic()
    return {"launches": len(traffic.launches), "bytes": traffic.num_bytes}


def line_of(entry: dict[str, Any]) -> str:
    """One line of the table."""
    where = entry.get("phase") or f"{entry['num_rows']} rows, {entry['setting']}"
    forms = [
        f"{form} {entry[form]['launches']} launches {entry[form]['bytes'] / 2**20:.1f} MiB"
        for form in ("xla", "kernel", "floor")
        if form in entry
    ]
    return f"{entry['edge']}, {where}: {'; '.join(forms)}"


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="h200", choices=list(TARGETS))
    parser.add_argument("--time", action="store_true", help="measure on a GPU instead")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    options = parser.parse_args()
    if options.time:
        if reason := missing_gpu_reason():
            print(f"nothing was timed: {reason}")
            return 0
        from benchmarks.gpu import edge_times

        found: Iterator[dict[str, Any]] = edge_times.measure()
    else:
        if reason := missing_reason():
            print(f"nothing was compiled: {reason}")
            return 0
        found = (
            e for part in (layer_accounts, sampling_accounts, cutoff_accounts) for e in part(options.target)
        )
    entries = []
    for entry in found:
        entries.append(entry)
        print(entry.get("text") or line_of(entry), flush=True)
    if options.out:
        what = "microseconds" if options.time else "kernels and bytes of compiled programs, nothing was run"
        where = jax.local_devices()[0].device_kind if options.time else f"{options.target}, not there"
        result = {"what": what, "target": where, "versions": versions(), "commit": commit(), "edges": entries}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
