"""The benchmark of quantised pools: a dry run on a CPU, its bytes and its verdicts."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import quantised
from benchmarks.gpu.participants import OURS
from benchmarks.gpu.points import Point
from jaxpaged.pallas_kernels.quantisation import FORMATS


def test_a_dry_run_has_every_format(tmp_path: Path) -> None:
    out = tmp_path / "dry.json"
    assert quantised.main(["--dry-run", "--out", str(out)]) == 0
    entries = json.loads(out.read_text())["entries"]
    assert [entry["kv"] for entry in entries] == ["bfloat16", *FORMATS]
    assert all(entry["us"] > 0 for entry in entries)


def test_bytes_count_codes_and_scales() -> None:
    point = Point((100, 28), num_kv_heads=2, head_dim=128)
    assert quantised.kv_bytes(point, None) == 2 * 128 * 2 * 256
    assert quantised.kv_bytes(point, FORMATS["fp8_e4m3"]) == 2 * 128 * 2 * 132
    assert quantised.kv_bytes(point, FORMATS["int4"]) == 2 * 128 * 2 * 68


def test_a_format_is_judged_by_the_share_that_it_loses() -> None:
    def entry(kv: str, kv_bytes: int, us: float, share: float) -> dict[str, Any]:
        return {"point": {"batch": 1}, "kv": kv, "who": OURS, "kv_bytes": kv_bytes, "us": us, "share": share}

    entries = [
        entry("bfloat16", 256, 100.0, 0.9),
        entry("int8", 132, 55.0, 0.81),
        entry("int4", 68, 50.0, 0.5),
    ]
    near, far = quantised.judge(entries, False)
    assert (near["verdict"], far["verdict"]) == ("met", "MISSED")
    assert near["bytes"] == 132 / 256
    assert far["time"] == 0.5
