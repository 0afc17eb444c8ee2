"""What a run leaves: one JSON that is rewritten after every figure, and one table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.participants import OURS

PEER_COLUMNS = ("xla", "jax_pallas_triton", "cudnn_paged", "cudnn", "torch_sdpa")
FORM_COLUMNS = (f"{OURS}_mma", f"{OURS}_wgmma")
SMALL_BYTES = 2**20  # points with less are launches, not bandwidth


def save(report: dict[str, Any], path: Path) -> None:
    """Writes the report; a run that is killed leaves the one before, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    """What ``save`` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def verdict(is_met: bool, is_dry: bool) -> str:
    """What is said of a bar; nothing in a dry run."""
    return "no verdict in a dry run" if is_dry else "met" if is_met else "MISSED"


def aligned(lines: Sequence[Sequence[Any]]) -> str:
    """Columns of a table, the first line its head."""
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(str(x).rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)


def ratio(entry: dict[str, Any], peer: str) -> float | None:
    """How many times as long the peer takes at a point as this project's kernel."""
    mine, theirs = (entry["results"].get(name, {}).get("us") for name in (OURS, peer))
    return theirs / mine if mine and theirs else None


def points_table(entries: Sequence[dict[str, Any]]) -> str:
    """One line a point: time, bandwidth and its share; how many times as long the forms and the peers take."""
    head = ["rows", "context", "heads", "block", "KV MiB", "us", "TB/s", "share", "spread", "form"]
    lines = [[*head, *(name.removeprefix(OURS + "_") for name in FORM_COLUMNS), *PEER_COLUMNS]]
    for entry in entries:
        shape, mine = entry["point"], entry["results"].get(OURS, {})
        line = [shape["batch"], shape["context"], f"{shape['num_heads']}/{shape['num_kv_heads']}"]
        line += [shape["block_size"], f"{shape['kv_bytes'] / 2**20:.0f}"]
        if "us" in mine:
            speed = f"{mine['bytes_per_second'] / 1e12:.3f}"
            form = entry.get("config", {}).get("form", "-")
            mark = "*" if mine["host_bound"] else ""
            line += [f"{mine['us']:.1f}{mark}", speed, f"{mine['share']:.1%}", f"{mine['spread']:.1%}", form]
        else:
            line += ["n/a"] * 4 + ["-"]
        for name in (*FORM_COLUMNS, *PEER_COLUMNS):
            value = ratio(entry, name)
            line.append(f"{value:.2f}x" if value else "n/a" if name in entry["results"] else "-")
        lines.append(line)
    return aligned(lines)


def reasons(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures are missing, each reason once with the number of points."""
    counts: dict[str, int] = {}
    for entry in entries:
        for name, result in entry["results"].items():
            if "reason" in result:
                text = f"{name}: {result['reason']}"
                counts[text] = counts.get(text, 0) + 1
    return [f"n/a at {count} points, {text}" for text, count in counts.items()]


def slower_than_peers(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of at least 1 MiB of keys and values where a peer is faster."""
    found = []
    for entry in entries:
        for peer in PEER_COLUMNS:
            value = ratio(entry, peer)
            if value is not None and value < 1.0 and entry["point"]["kv_bytes"] >= SMALL_BYTES:
                found.append({"point": entry["point"], "peer": peer, "ratio": round(value, 3)})
    return found


def lines_of(report: dict[str, Any]) -> list[str]:
    """Everything a reader wants to see at the end of a run."""
    names = {"torch": "PyTorch", "jax": "JAX"}
    gpu = report["hardware"].get("gpu") or {}
    versions = ", ".join(f"{names[n]} {report['versions'][n]}" for n in names if n in report["versions"])
    lines = [
        f"{gpu.get('name', report['hardware']['devices'][0])}, driver {gpu.get('driver_version', '-')}, {versions}, "
        f"commit {report['commit']}; copy bandwidth {report['copy_bandwidth']['bytes_per_second'] / 1e12:.3f} TB/s"
    ]
    if report["dry_run"]:
        lines.append(
            f"DRY RUN: implementation 'xla' in the place of {OURS!r}; none of this is a figure of a GPU."
        )
    if report["points"]:
        lines += ["", points_table(report["points"])]
        lines.append(
            "ratios: their time over ours. *: the host may have been the bound; share: of copy bandwidth"
        )
        lines += reasons(report["points"])
    for bar in report["bars"]:
        share = "not measured" if bar["share"] is None else f"{bar['share']:.1%} of copy bandwidth"
        lines.append(f"bar {bar['name']}: {share}, wanted {bar['wanted']:.0%}: {bar['verdict']}")
    lines += [f"variant {entry['text']}" for entry in report["variants"]]
    lines += [f"ragged {entry['text']}" for entry in report["ragged"]]
    lines += [f"scatter {entry['text']}" for entry in report["scatter"]]
    slower = report["slower_than_peers"]
    lines.append(f"points of 1 MiB or more where a peer is faster: {len(slower)}")
    for entry in slower:
        p = entry["point"]
        shape = (
            f"{p['batch']} x {p['context']}, {p['num_heads']}/{p['num_kv_heads']}, block {p['block_size']}"
        )
        lines.append(f"  {shape}: {entry['ratio']:.2f}x of {entry['peer']}")
    if report["skipped"]:
        lines.append(f"not measured: {len(report['skipped'])} points ({report['why_skipped']})")
    return lines
