"""Which tile sizes a call gets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxpaged.pallas_kernels.mosaic_gpu import SUPPORTED_CAPABILITIES, GpuTarget
from jaxpaged.pallas_kernels.paged_attention import tuning
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import shared_memory
from jaxpaged.pallas_kernels.paged_attention.tuning import CallShape, MosaicConfig, config_for, table_name

H200 = GpuTarget((9, 0), 132, "A GPU of this test")


def shape(**changes: Any) -> CallShape:
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    usual = heads | {"num_tokens": 64, "num_rows": 64, "block_size": 16, "max_len": 8192}
    return CallShape(**(usual | changes))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which tables of measured sizes are looked for."""
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._measured.cache_clear()
    yield tmp_path
    tuning._measured.cache_clear()


def entry(config: MosaicConfig, **changes: Any) -> dict[str, Any]:
    return {**vars(shape(**changes)), "dtype": "bfloat16", "config": vars(config)}


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / table_name(H200.kind)).write_text(json.dumps({"entries": entries}), encoding="utf-8")


def test_the_nearest_measured_shape_wins(measured: Path) -> None:
    few, many = MosaicConfig(stages=4), MosaicConfig(stages=3, tile_kv=32)
    write(measured, [entry(few, num_rows=1, num_tokens=1), entry(many, num_rows=128, num_tokens=128)])
    assert config_for(H200, shape(), jnp.bfloat16) == many
    assert config_for(H200, shape(num_rows=2, num_tokens=2), jnp.bfloat16) == few
    assert config_for(H200, shape(), jnp.bfloat16, deterministic=True) == few, "chosen as for one row"


def test_what_splits_rows_as_it_likes_is_not_for_deterministic_calls(measured: Path) -> None:
    prefill = MosaicConfig("prefill", 64, 2, 1, 128)
    write(measured, [entry(prefill, num_rows=1, num_tokens=2048)])
    assert config_for(H200, shape(), jnp.bfloat16) == prefill
    assert config_for(H200, shape(), jnp.bfloat16, deterministic=True).form == "mma"


@pytest.mark.parametrize("other", [{"head_dim": 64}, {"block_size": 32}])
def test_what_was_measured_for_another_layout_does_not_count(measured: Path, other: dict[str, int]) -> None:
    odd = MosaicConfig(stages=6, tile_kv=32, ctas_per_sm=8)
    write(measured, [entry(odd)])
    assert config_for(H200, shape(), jnp.bfloat16) == odd
    assert config_for(H200, shape(**other), jnp.bfloat16) != odd
    assert config_for(H200, shape(), jnp.float16) != odd


def test_a_table_that_lacks_something_says_what(measured: Path) -> None:
    broken = entry(MosaicConfig())
    del broken["max_len"]
    write(measured, [broken])
    with pytest.raises(ValueError, match=r"tuned_a_gpu_of_this_test\.json: an entry lacks \['max_len'\]"):
        config_for(H200, shape(), jnp.bfloat16)


@pytest.mark.parametrize("capability", SUPPORTED_CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_the_rule_fits_shared_memory_everywhere(
    capability: tuple[int, int], head_dim: int, tokens: int
) -> None:
    target = GpuTarget(capability, 100, "unmeasured")
    for heads in (8, 32, 512):
        config = config_for(
            target, shape(head_dim=head_dim, num_tokens=tokens, num_heads=heads), jnp.bfloat16
        )
        assert shared_memory(config, config.tile_m, head_dim) <= target.smem_bytes
        assert config.form == "mma" or target.has_wgmma


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({"num_tokens": 2048, "num_rows": 8}, "prefill"),
        ({"num_tokens": 2048, "num_rows": 8, "head_dim": 256}, "prefill"),
        ({"num_tokens": 64, "num_rows": 64}, "mma"),
        ({"num_tokens": 128, "num_rows": 64}, "mma"),
        ({"num_tokens": 2048, "num_rows": 8, "head_dim": 96}, "prefill"),
        # Where a token's copy would not begin at a multiple of 128 bytes.
        ({"num_tokens": 2048, "num_rows": 8, "head_dim": 96, "num_heads": 8}, "mma"),
    ],
)
def test_many_query_tokens_have_a_form_of_their_own_on_hopper(changes: dict[str, int], form: str) -> None:
    assert config_for(H200, shape(**changes), jnp.bfloat16).form == form
    assert config_for(H200, shape(**changes), jnp.bfloat16, deterministic=True).form == "mma"
    for capability in set(SUPPORTED_CAPABILITIES) - {(9, 0)}:
        other = GpuTarget(capability, 132, H200.kind)
        assert config_for(other, shape(**changes), jnp.bfloat16).form == "mma"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "triton"}, "form='triton' must be"),
        ({"tile_kv": 48}, "tile_kv=48 must be one of"),
        ({"form": "wgmma", "tile_kv": 32, "tile_m": 64}, "tile_kv=32 must be one of"),
        ({"form": "wgmma"}, "tile_m=16 must be one of"),
        ({"stages": 1}, "stages=1 must be one of"),
        ({"ctas_per_sm": 0}, "ctas_per_sm=0 must be one of"),
        ({"form": "prefill", "ctas_per_sm": 1, "tile_m": 128, "tile_kv": 32}, "tile_kv=32 must be one of"),
        ({"form": "prefill", "ctas_per_sm": 1, "tile_m": 64}, r"tile_m=64 must be one of \(128,\)"),
        ({"form": "prefill", "ctas_per_sm": 2, "tile_m": 128}, r"ctas_per_sm=2 must be one of \(1,\)"),
        ({"form": "wgmma", "tile_m": 128}, "tile_m=128 must be one of"),
    ],
)
def test_sizes_that_no_kernel_has(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MosaicConfig(**arguments)
