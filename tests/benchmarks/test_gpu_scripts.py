"""The GPU benchmarks' plumbing, on a CPU: dry runs, inputs, reports. Nothing here is a figure of anything."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import inputs, paged_attention, participants, report, scatter, tune_paged_attention
from benchmarks.gpu.measure import Budget, Comparison, Setting, WrongResultError, measure_point
from benchmarks.gpu.points import BARS, Grid, Point, Scatter, uniform
from benchmarks.gpu.timing import compiled_program, num_sets, repeat, time_jax
from jaxpaged.pallas_kernels import mosaic_gpu as device_target
from jaxpaged.pallas_kernels import paged_attention as attend
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention import mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from tests.support.repository import ROOT

H100 = GpuTarget((9, 0), 132, "NVIDIA H100 of this test")
RAGGED = Point((40, 16, 33), 4, 2, 16, 64)


def dry_setting(max_bytes: int = 2**24) -> Setting:
    return Setting(1e9, max_bytes, Budget(60.0), is_dry=True)


def test_a_dry_run_measures_everything_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry.json"
    sections = ["points", "variants", "scatter"]
    assert paged_attention.main(["--dry-run", "--out", str(out), "--sections", *sections]) == 0
    printed = capsys.readouterr().out
    assert "DRY RUN: implementation 'xla' in the place of 'mosaic_gpu'" in printed
    found = json.loads(out.read_text())
    assert found["dry_run"]
    assert found["finished"]
    assert {"hardware", "versions", "commit", "copy_bandwidth", "command"} <= found.keys()
    assert [entry["complete"] for entry in found["points"]] == [True, True]
    for entry in found["points"]:
        assert entry["results"]["mosaic_gpu"]["us"] > 0
        assert entry["results"]["mosaic_gpu"]["error"] < 0.02
        for peer in ("cudnn", "cudnn_paged", "jax_pallas_triton", "torch_sdpa"):
            assert entry["results"][peer]["reason"], "a peer that cannot run has a reason"
    assert [bar["verdict"] for bar in found["bars"]] == ["no verdict in a dry run"] * 2
    assert [entry["variant"] for entry in found["variants"]] == ["plain", "alibi"]
    assert [entry["participant"] for entry in found["scatter"]] == ["contiguous", "xla", "mosaic_gpu"]


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "dry.json"
    arguments = ["--dry-run", "--out", str(out), "--sections", "points", "--peers", "xla"]
    assert paged_attention.main([*arguments, "--budget-seconds", "0"]) == 0
    found = json.loads(out.read_text())
    assert not found["finished"]
    assert len(found["skipped"]) == 2
    assert paged_attention.main(arguments) == 0
    first = json.loads(out.read_text())
    assert first["finished"]
    out.write_text(json.dumps({**first, "points": first["points"][:1]}))
    assert paged_attention.main([*arguments, "--resume"]) == 0
    again = json.loads(out.read_text())
    assert again["points"][0] == first["points"][0]
    assert [entry["point"] for entry in again["points"]] == [entry["point"] for entry in first["points"]]


def test_a_dry_sweep_writes_a_table_that_calls_can_read(tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    assert tune_paged_attention.main(["--dry-run", "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    (entry,) = table["entries"]
    assert MosaicConfig(**entry["config"]).form in ("mma", "wgmma")
    assert (entry["num_rows"], entry["max_len"], entry["dtype"]) == (1, 64, "bfloat16")
    assert set(entry["best_of_form"]) == {"mma", "wgmma"}
    assert table["dry_run"]


def test_every_configuration_of_a_sweep_is_a_valid_one() -> None:
    for form in tune_paged_attention.FORMS:
        for queries in (1, 64):
            first = tune_paged_attention.first_round(form, queries)
            second = tune_paged_attention.second_round(first[:2])
            if form == "prefill":
                assert (len(first), len(second)) == (6 if queries > 1 else 0, 0)
                continue
            assert len(set(first)) == len(first) >= 6
            assert len({*first, *second}) == len(first) + 6


@pytest.mark.parametrize("main", [paged_attention.main, tune_paged_attention.main], ids=["table", "sweep"])
def test_without_a_gpu_nothing_is_measured(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench"])
def test_make_says_that_there_is_no_gpu(target: str) -> None:
    command = ["make", f"GPU_PYTHON={sys.executable}", target]
    # As from a user's shell, also where these tests themselves run under make.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout.startswith("nothing was run: no NVIDIA GPU")


def test_a_checkout_maps_its_folders_as_an_installation_does() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text[text.index("FOLDERS = {") : text.index("def package_folders")], names)
    assert runpy.run_path(str(ROOT / "scripts" / "from_checkout.py"))["FOLDERS"] == names["FOLDERS"]


def test_the_same_key_lies_in_every_layout() -> None:
    (pool,), batch = inputs.paged_sets(RAGGED, 1)
    ((pages, _),), (tables, lengths) = inputs.page_sets(RAGGED, 1)
    ((whole, values),), _ = inputs.contiguous_sets(RAGGED, 1)
    np.testing.assert_array_equal(lengths, RAGGED.lengths)
    for row, length in enumerate(RAGGED.lengths):
        for position in {0, 15, min(16, length - 1), length - 1}:
            block, offset = divmod(position, 16)
            key = np.asarray(whole[row, position])
            np.testing.assert_array_equal(pool.k[batch.block_tables[row, block], :, offset], key)
            np.testing.assert_array_equal(pages[:, tables[row, block], offset], key)
    np.testing.assert_allclose(np.std(np.asarray(whole, np.float32)), 1.0, rtol=0.03)
    assert np.std(np.asarray(values, np.float32)) > 1.5
    others, _ = inputs.paged_sets(RAGGED, 2)
    np.testing.assert_array_equal(others[0].k, pool.k)
    assert (np.asarray(others[1].k) != np.asarray(pool.k)).mean() > 0.9


def test_contiguous_and_paged_inputs_mean_the_same_attention() -> None:
    (pool,), batch = inputs.paged_sets(RAGGED, 1)
    ((k, v),), lengths = inputs.contiguous_sets(RAGGED, 1)
    q = inputs.queries(RAGGED)
    paged = attend(q, pool, 0, batch, implementation="reference")
    dense = jax.nn.dot_product_attention(
        q[:, None], k, v, key_value_seq_lengths=lengths, implementation="xla"
    )
    difference = np.asarray(paged, np.float32) - np.asarray(dense[:, 0], np.float32)
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(np.asarray(paged, np.float32))


def test_a_querys_size_survives_many_launches() -> None:
    """Else later launches would attend uniformly, or to one key alone."""
    point = Point((200,), 4, 2, 16, 64)
    pools, batch = inputs.paged_sets(point, 2)
    step = participants.implementation_step("reference")(point)
    first, last = jax.jit(repeat(step, 12))(inputs.queries(point), pools, batch)
    once = attend(inputs.queries(point), pools[0], 0, batch, implementation="reference")
    np.testing.assert_allclose(np.asarray(first, np.float32), np.asarray(once, np.float32), atol=0.01)
    out = np.asarray(last, np.float32)
    assert 0.3 < np.std(out) < 1.5


def test_launches_go_through_the_sets_in_turn() -> None:
    def step(carry: jax.Array, digit: jax.Array, base: jax.Array) -> jax.Array:
        return carry * base + digit

    digits = [jnp.int32(digit) for digit in (1, 2, 3)]
    first, last = repeat(step, 5)(jnp.int32(0), digits, jnp.int32(10))
    assert (int(first), int(last)) == (1, 12312)
    timing = time_jax(step, jnp.int32(0), digits, jnp.int32(1), launches=2, samples=3, sample_seconds=0.0)
    assert timing.launches == 2, "the set that makes no whole program is left out"
    assert len(timing.samples) == 3
    assert timing.seconds > 0


def test_as_many_sets_as_displace_a_cache_and_fit() -> None:
    assert num_sets(2**30, 2**40) == 1
    assert num_sets(2**25, 2**40) == 8
    assert num_sets(2**20, 2**40) == 64
    assert num_sets(2**20, 2**23) == 8
    assert num_sets(2**20, 0) == 1


def test_a_wrong_result_is_not_timed() -> None:
    """Off by a tenth, or not a number."""
    for wrong in (jnp.float32(1.1), jnp.float32(np.nan)):
        comparison = Comparison(np.ones((1, 4), np.float32))
        with pytest.raises(WrongResultError, match="relative error"):
            time_jax(lambda x, by, _: x * by, jnp.ones((1, 2, 2)), [wrong], launches=2, check=comparison)
    comparison = Comparison()
    comparison(jnp.ones((1, 2, 2)))
    comparison(jnp.full((1, 2, 2), 1.001))
    assert comparison.error == pytest.approx(0.001, rel=0.1)


def test_scatter_and_its_floor_write_in_place() -> None:
    """A copy of the pool would hide what either costs."""
    carry, sets = scatter._sets(Scatter(8, False, 2, 16, 32), dry_setting())
    flat = jnp.zeros((carry.k.size // 32, 2, 32), carry.k.dtype)
    for step, state in ((scatter._contiguous_step, flat), (scatter._scatter_step("xla"), carry)):
        program = compiled_program(step, 2, donate=True).lower(state, sets, None).compile()
        assert program.memory_analysis().temp_size_in_bytes < carry.k.nbytes / 8


def test_a_point_that_does_not_fit_has_a_reason() -> None:
    results = dict(measure_point(RAGGED, [participants.XLA], dry_setting(max_bytes=100)))
    assert "allowed" in results["xla"]["reason"]


def test_the_grid_has_every_shape_once_and_counts_each_key_once() -> None:
    points = Grid().points()
    assert len(set(points)) == len(points) == 4 * 9 * 3 * 4
    assert {bar.point for bar in BARS} <= set(points)
    assert uniform(64, 4096).kv_bytes == 64 * 4096 * 8 * 128 * 2 * 2
    assert RAGGED.kv_bytes == (40 + 16 + 33) * 2 * 64 * 2 * 2


def entry_of(kv_bytes: int, **microseconds: float) -> dict[str, Any]:
    shape = {**uniform(1, 512).as_json(), "kv_bytes": kv_bytes}
    return {"point": shape, "results": {name: {"us": us} for name, us in microseconds.items()}}


def test_points_where_a_peer_is_faster_are_listed() -> None:
    entries = [
        entry_of(2**21, mosaic_gpu=10.0, cudnn=9.0, torch_sdpa=11.0),
        entry_of(2**19, mosaic_gpu=10.0, cudnn=1.0),
        entry_of(2**21, cudnn=1.0),
    ]
    (found,) = report.slower_than_peers(entries)
    assert (found["peer"], found["ratio"]) == ("cudnn", 0.9)


@pytest.mark.parametrize("form", [None, "mma", "wgmma"])
def test_the_kernels_steps_lower_for_a_gpu(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of each kind in a program of several launches, not one a launch."""
    for module in (mosaic_gpu, device_target):
        monkeypatch.setattr(module, "gpu_target", lambda: H100)
    point = Point((300,) * 2, 8, 2)
    pools, batch = inputs.paged_sets(point, 2)
    step = participants.ours(form).step(point)
    assert participants.config_of(point, form).form == (form or "mma")

    def lowered(launches: int) -> str:
        traced = jax.jit(repeat(step, launches)).trace(inputs.queries(point), pools, batch)
        return str(traced.lower(lowering_platforms=("cuda",)).as_text())

    one, four = lowered(1), lowered(4)
    assert "mosaic_gpu" in one
    assert four.count("stablehlo.custom_call") == one.count("stablehlo.custom_call")
