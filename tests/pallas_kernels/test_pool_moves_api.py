"""Which implementation moves data of the pool, and what is refused."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import pytest

from jaxpaged.pallas_kernels import (
    KVPool,
    block_copy,
    cache_scatter,
    copy_blocks,
    gather_blocks,
    pool_moves,
    scatter_blocks,
)
from jaxpaged.pallas_kernels.cache_scatter import IMPLEMENTATIONS
from tests.pallas_kernels.pool_oracle import random_pool

SHAPE = {"num_layers": 2, "num_blocks": 4, "num_kv_heads": 2, "block_size": 16}
IDS = jnp.array([1, 0], jnp.int32)
BLOCKS = jnp.zeros((2, 2, 2, 16, 64))
CALLS: dict[str, Callable[..., Any]] = {
    "cache_scatter": lambda pool, **options: cache_scatter(
        pool, jnp.zeros((2, 2, 64)), jnp.zeros((2, 2, 64)), 0, IDS, **options
    ),
    "copy_blocks": lambda pool, **options: copy_blocks(pool, IDS, IDS, **options),
    "gather_blocks": lambda pool, **options: gather_blocks(pool, IDS, **options),
    "scatter_blocks": lambda pool, **options: scatter_blocks(pool, IDS, BLOCKS, BLOCKS, **options),
}


def make_pool(head_dim: int = 64, dtype: str = "bfloat16") -> KVPool:
    return random_pool(**SHAPE, head_dim=head_dim, dtype=dtype)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, compute_capability: str) -> None:
    device = SimpleNamespace(
        platform="gpu", compute_capability=compute_capability, core_count=132, device_kind="a GPU"
    )
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: device)


@pytest.mark.parametrize("operation", CALLS)
def test_unknown_implementation(operation: str) -> None:
    listed = r"implementation='triton' is none of \['mosaic_gpu', 'reference', 'xla'\]"
    with pytest.raises(ValueError, match=f"{operation}: {listed}"):
        CALLS[operation](make_pool(), implementation="triton")


@pytest.mark.parametrize("operation", CALLS)
def test_kernels_need_a_gpu(operation: str) -> None:
    # Copies are made of the two other operations.
    name = operation.replace("copy", "gather")
    with pytest.raises(
        NotImplementedError, match=f"{name}: implementation='mosaic_gpu': it needs an NVIDIA GPU"
    ):
        CALLS[operation](make_pool(), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("pool", "compute_capability", "reason"),
    [
        (make_pool(dtype="float8_e4m3fn"), "9.0", r"kv_pool\.k\.dtype=float8_e4m3fn is none of"),
        (make_pool(80), "9.0", r"head_dim=80 is no multiple of 32"),
        (make_pool(288), "9.0", r"head_dim=288 is no multiple of 32 up to 256"),
        (make_pool(), "7.5", r"compute capability 7\.5 of a GPU is none of"),
    ],
    ids=["dtype", "odd head", "large head", "old GPU"],
)
def test_a_named_kernel_says_why_it_cannot(
    pool: KVPool, compute_capability: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, compute_capability)
    with pytest.raises(NotImplementedError, match=reason):
        gather_blocks(pool, IDS, implementation="mosaic_gpu")
    assert pool_moves.best_implementation("gather_blocks", pool) == "xla"


@pytest.mark.parametrize("compute_capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (192, "float16"), (256, "float32")])
def test_kernels_are_taken_on_a_gpu(
    head_dim: int, dtype: str, compute_capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, compute_capability)
    assert pool_moves.best_implementation("cache_scatter", make_pool(head_dim, dtype)) == "mosaic_gpu"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pool_moves._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, pool_moves.__name__):
        for _ in range(2):
            assert pool_moves.best_implementation("cache_scatter", make_pool()) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "cache_scatter on cpu uses implementation 'xla': there is no kernel for this device"
    ]


def test_the_operations_have_the_same_implementations() -> None:
    assert list(IMPLEMENTATIONS) == list(block_copy.IMPLEMENTATIONS) == ["reference", "xla", "mosaic_gpu"]
