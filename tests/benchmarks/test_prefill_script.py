"""The benchmark of prompts, on a CPU: its loads, its peers on plain JAX, a dry run. No figure of anything."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import attention_mgpu

from benchmarks.gpu import inputs, prefill, report
from benchmarks.gpu.measure import Budget, Setting
from benchmarks.gpu.points import Point
from jaxpaged.pallas_kernels import AttentionVariant, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import unsupported_reason
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig

H100 = GpuTarget((9, 0), 132, "NVIDIA H100 of this test")


def test_a_dry_run_measures_everything_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry.json"
    assert prefill.main(["--dry-run", "--out", str(out)]) == 0
    assert "none of this is a figure of a GPU" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {"hardware", "versions", "commit", "command"} <= found.keys()
    assert [entry["load"]["name"] for entry in found["loads"]] == ["8", "32 + 63 x 1"]
    for entry in found["loads"]:
        mine = entry["results"][report.OURS]
        assert mine["error"] < 0.02
        assert mine["tflops"] == pytest.approx(entry["flops"] / mine["us"] / 1e6, rel=1e-3)
        assert all(entry["results"][peer]["reason"] for peer in prefill.PEERS), "who cannot run has a reason"
    out.write_text(json.dumps({**found, "loads": found["loads"][:1]}))
    assert prefill.main(["--dry-run", "--out", str(out), "--resume", "--budget-seconds", "0"]) == 0
    again = json.loads(out.read_text())
    assert again["loads"] == found["loads"][:1]
    assert again["skipped"] == [found["loads"][1]["load"]]


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill.main([]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out


def test_peers_compute_the_same_on_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain JAX in the place of their kernels: layouts, masks and scales are what is held to ours."""
    dense = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, **options: dense(*args, **{**options, "implementation": "xla"}),
    )

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, config: Any) -> jax.Array:
        out: jax.Array = attention_mgpu.attention_reference(q, k, v, causal=config.causal)
        return out.astype(q.dtype)

    monkeypatch.setattr(attention_mgpu, "attention", plain)
    load = prefill.Load("two", Point((48, 48), 4, 2, 16, 64), (48, 48))
    results = dict(prefill.measure(load, Setting(1.0, 2**24, Budget(60.0), is_dry=True), ["wgmma"]))
    assert list(results) == ["mosaic_gpu", "mosaic_gpu_wgmma", "cudnn", "jax_mosaic"]
    for name, figures in results.items():
        assert figures.get("reason") is None, name
        assert figures["error"] < 0.02
    assert "1.00x" in prefill.table(
        [{"load": load.as_json(), "results": {**results, "cudnn": results["mosaic_gpu"]}}]
    )


def test_queries_are_the_last_tokens_of_rows() -> None:
    point, queries = Point((40, 16, 33), 4, 2, 16, 64), (3, 16, 1)
    batch = inputs.with_queries(point, inputs.paged_sets(point, 1)[1], queries)
    np.testing.assert_array_equal(batch.query_start_loc, [0, 3, 19, 20])
    np.testing.assert_array_equal(batch.rows, [0] * 3 + [1] * 16 + [2])
    np.testing.assert_array_equal(batch.positions, [37, 38, 39, *range(16), 32])
    load = prefill.Load("ragged", point, queries)
    assert not load.is_prompts
    assert load.flops == 4 * 4 * 64 * int(np.sum(np.asarray(batch.positions) + 1))
    assert load.as_json()["rows"][0] == {"rows": 1, "length": 40, "queries": 3}


@pytest.mark.parametrize("heads", prefill.HEADS)
def test_the_kernel_takes_these_heads_in_every_form(heads: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim = heads
    q = jnp.zeros((1, num_heads, head_dim), jnp.bfloat16)
    sizes = {"num_kv_heads": num_kv_heads, "block_size": 16, "head_dim": head_dim}
    pool = KVPool.zeros(num_layers=1, num_blocks=1, dtype=jnp.bfloat16, **sizes)
    for config in (*prefill.OTHER_FORMS.values(), MosaicConfig("prefill", 64, 2, 1, 128)):
        assert unsupported_reason(H100, q, pool, AttentionVariant(), config=config) is None
