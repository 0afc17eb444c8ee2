"""Blocks that go to the host and come back: unchanged, in order, beside what the device does; errors are not lost."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.host_pool import MAX_PENDING, HostPool
from jaxpaged.pallas_kernels import KVPool, MixedKVPool, gather_blocks, scatter_blocks

LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 6, 2, 4, 8
BLOCK = (HEADS, SIZE, DIM)
NUM_HOST_BLOCKS = 5
DTYPES = ["float32", "bfloat16", "float16", "fp8_e4m3", "int8", "int4", "int4, float32, int4"]


MIXED = "int4, float32, int4"


def empty_pool(dtype: str) -> KVPool | MixedKVPool:
    sizes = {"num_blocks": BLOCKS, "num_kv_heads": HEADS, "block_size": SIZE, "head_dim": DIM}
    if dtype == MIXED:
        return MixedKVPool.zeros(dtypes=dtype.split(", "), **sizes)
    return KVPool.zeros(num_layers=LAYERS, dtype=dtype, **sizes)


def random_pool(dtype: str) -> Any:
    """Numbers are normal; codes and scales are any."""
    rng, empty = np.random.default_rng(0), empty_pool(dtype)
    made = [jnp.asarray(50 * rng.standard_normal(array.shape)).astype(array.dtype) for array in empty.arrays]
    return empty.with_arrays(made)


def made_of(value: float, width: int = 1, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    """Blocks of one number, its negative for values."""
    k = jnp.full((LAYERS, width, *BLOCK), value, dtype)
    return k, -k


def values_of(loaded: tuple[jax.Array, ...]) -> list[float]:
    """The one number of each block."""
    k, v = map(np.asarray, loaded)
    np.testing.assert_array_equal(v, -k)
    np.testing.assert_array_equal(k, np.broadcast_to(k[:1, :, :1, :1, :1], k.shape))
    return k[0, :, 0, 0, 0].tolist()


class Gathering:
    """Blocks that the device has not gathered yet."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array
        self.ndim, self.shape, self.dtype = array.ndim, array.shape, array.dtype
        self.done = threading.Event()
        self.waited_for = threading.Event()
        self.error: Exception | None = None

    def copy_to_host_async(self) -> None:
        self.array.copy_to_host_async()

    def block_until_ready(self) -> "Gathering":
        self.waited_for.set()
        assert self.done.wait(30), "never gathered"
        if self.error is not None:
            raise self.error
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self.array)


def slow_store(pool: HostPool, block: int, value: float) -> Gathering:
    """A store that waits for its ``done``."""
    k, v = made_of(value)
    gathering: Any = Gathering(k)
    pool.store([block], gathering, v)
    return gathering


@pytest.fixture
def pool() -> Iterator[HostPool]:
    pool = HostPool(NUM_HOST_BLOCKS, random_pool("float32"))
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_come_back_as_they_went(dtype: str) -> None:
    """Out of one pool, through the host, to other places of an empty one; padded on both ways."""
    device_pool = random_pool(dtype)
    emptied: Any = empty_pool(dtype)
    pool = HostPool(NUM_HOST_BLOCKS, device_pool, device=jax.devices()[0])
    out_of, into = jnp.array([4, 1, 3, 0]), jnp.array([2, 5, 1, 0, 0])
    pool.store([3, 0, 4], *gather_blocks(device_pool, out_of))
    loaded = pool.load([3, 0, 4], 5).result()
    assert [array.dtype for array in loaded] == [array.dtype for array in device_pool.arrays]
    assert all(array.devices() == {jax.devices()[0]} for array in loaded)
    assert BLOCKS * pool.bytes_per_block == sum(array.nbytes for array in device_pool.arrays)
    filled = scatter_blocks(emptied, into, *loaded)
    for found, expected in zip(
        gather_blocks(filled, into[:3]), gather_blocks(device_pool, out_of[:3]), strict=True
    ):
        assert np.asarray(found).any()
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    pool.close()


def test_padding_is_neither_stored_nor_loaded(pool: HostPool) -> None:
    pool.store([2], *made_of(7.0, width=4))
    assert values_of(pool.load([2, 3, 1], 5).result()) == [7.0, 0.0, 0.0, 0.0, 0.0]
    assert values_of(pool.load([], 2).result()) == [0.0, 0.0]
    block = 2 * LAYERS * HEADS * SIZE * DIM * 4
    assert pool.bytes_per_block == block
    assert pool.stats.bytes_stored == block
    assert pool.stats.bytes_loaded == 3 * block


def test_blocks_may_be_loaded_in_any_order_and_twice(pool: HostPool) -> None:
    pool.store([0, 1, 2], *[jnp.concatenate(a, 1) for a in zip(*map(made_of, [1, 2, 3]), strict=True)])
    assert values_of(pool.load([2, 0, 2], 3).result()) == [3.0, 1.0, 3.0]


def test_a_load_reads_what_was_stored_before_it_and_nothing_later(pool: HostPool) -> None:
    first = slow_store(pool, 1, 1.0)
    before = pool.load([1], 1)
    pool.store([1], *made_of(2.0))
    after = pool.load([1], 1)
    assert not before.done()
    first.done.set()
    assert values_of(before.result()) == [1.0]
    assert values_of(after.result()) == [2.0]
    pool.store([1], *made_of(3.0))
    pool.drain()
    assert values_of(after.result()) == [2.0], "a loaded array follows the host block"


def test_any_order_of_copies_is_kept(pool: HostPool) -> None:
    rng = np.random.default_rng(0)
    model = dict.fromkeys(range(NUM_HOST_BLOCKS), 0.0)
    loads = []
    for value in range(1, 61):
        block, *others = rng.permutation(NUM_HOST_BLOCKS).tolist()
        if rng.random() < 0.6:
            pool.store([block], *made_of(value))
            model[block] = float(value)
        else:
            loads.append((pool.load(others, 4), [model[other] for other in others]))
    assert len(loads) > 10
    for future, expected in loads:
        assert values_of(future.result()) == expected


def test_the_caller_does_not_wait_for_the_device(pool: HostPool) -> None:
    gathering = slow_store(pool, 0, 1.0)
    future = pool.load([0], 1)
    assert gathering.waited_for.wait(30)
    assert pool.num_pending == 2
    assert not future.done()
    gathering.done.set()
    pool.drain()
    assert pool.num_pending == 0
    assert future.done()


def test_waiting_for_the_device_is_not_time_of_a_transfer(pool: HostPool) -> None:
    gathering = slow_store(pool, 0, 1.0)
    assert gathering.waited_for.wait(30)
    time.sleep(0.4)
    gathering.done.set()
    pool.load([0], 1).result()
    assert 0 < pool.stats.seconds_storing < 0.4
    assert pool.stats.seconds_loading > 0


def test_stores_that_wait_are_bounded(pool: HostPool) -> None:
    gathering = slow_store(pool, 0, 0.0)
    for value in range(1, MAX_PENDING):
        pool.store([0], *made_of(value))
    returned = threading.Event()

    def one_more() -> None:
        pool.store([0], *made_of(100.0))
        returned.set()

    thread = threading.Thread(target=one_more)
    thread.start()
    assert not returned.wait(0.2), "the queue grew"
    assert pool.num_pending == MAX_PENDING
    gathering.done.set()
    assert returned.wait(30)
    thread.join()
    assert values_of(pool.load([0], 1).result()) == [100.0]


def test_a_failed_store_is_reported_by_loads_of_its_blocks(
    pool: HostPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.store([0, 1, 2], *made_of(1.0, width=3))
    k, v = made_of(2.0, width=2)
    k.delete()
    with caplog.at_level(logging.ERROR, logger="jaxpaged.host_pool"):
        pool.store([1, 2], k, v)
        pool.drain()
    assert "storing host blocks [1, 2] failed" in caplog.text
    assert pool.stats.num_failed_stores == 1
    for blocks in ([1], [0, 2], [1]):
        with pytest.raises(RuntimeError, match=r"host block [12] could not be stored") as caught:
            pool.load(blocks, 2).result()
        assert "deleted" in str(caught.value.__cause__)
    assert values_of(pool.load([0], 1).result()) == [1.0], "others are not touched"
    pool.store([2], *made_of(3.0))
    assert values_of(pool.load([0, 2], 2).result()) == [1.0, 3.0]
    with pytest.raises(RuntimeError, match="host block 1"):
        pool.load([1], 1).result()


def test_an_error_of_the_device_is_met_by_the_worker(pool: HostPool) -> None:
    gathering = slow_store(pool, 3, 1.0)
    gathering.error = FloatingPointError("the gather failed")
    gathering.done.set()
    with pytest.raises(RuntimeError, match="host block 3") as caught:
        pool.load([3], 1).result()
    assert caught.value.__cause__ is gathering.error


@pytest.mark.parametrize("fails", [False, True])
def test_gathered_blocks_are_let_go(pool: HostPool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps the records of the log, which keep the traceback.
    monkeypatch.setattr(logging.getLogger("jaxpaged.host_pool"), "disabled", True)
    k, v = made_of(1.0)
    gathering: Any = Gathering(k)
    gathering.error = FloatingPointError("the gather failed") if fails else None
    gathering.done.set()
    pool.store([0], gathering, v)
    known = weakref.ref(gathering)
    pool.drain()
    # The worker drops the last copy's arguments on its way to the next one.
    pool.load([1], 1).result()
    del gathering
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(
    ("ids", "k", "v"),
    [
        ([5], (LAYERS, 1, *BLOCK), (LAYERS, 1, *BLOCK)),
        ([-1], (LAYERS, 1, *BLOCK), (LAYERS, 1, *BLOCK)),
        ([1, 1], (LAYERS, 2, *BLOCK), (LAYERS, 2, *BLOCK)),
        ([1, 2], (LAYERS, 1, *BLOCK), (LAYERS, 1, *BLOCK)),
        ([1], (LAYERS, 1, *BLOCK), (LAYERS + 1, 1, *BLOCK)),
        ([1], (LAYERS, 1, HEADS, SIZE, 1), (LAYERS, 1, *BLOCK)),
        ([1], (LAYERS, 1), (LAYERS, 1)),
    ],
)
def test_stores_refuse_what_does_not_fit(
    pool: HostPool, ids: list[int], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"host_ids=|blocks\[[01]\]: float32\["):
        pool.store(ids, jnp.ones(k), jnp.ones(v))
    pool.drain()
    assert pool.stats.bytes_stored == 0


def test_codes_without_their_scales_are_refused() -> None:
    device_pool = random_pool("int8")
    pool = HostPool(NUM_HOST_BLOCKS, device_pool)
    with pytest.raises(ValueError, match="blocks: 2 arrays must be 4"):
        pool.store([0], *gather_blocks(device_pool, jnp.array([1]))[:2])
    pool.close()


def test_another_dtype_is_refused(pool: HostPool) -> None:
    with pytest.raises(ValueError, match=r"blocks\[0\]: bfloat16.* must be float32"):
        pool.store([0], *made_of(1.0, dtype="bfloat16"))


@pytest.mark.parametrize(("ids", "width"), [([5], 1), ([-1], 1), ([0, 1], 1)])
def test_loads_refuse_what_does_not_fit(pool: HostPool, ids: list[int], width: int) -> None:
    with pytest.raises(ValueError, match=r"host_ids=|width="):
        pool.load(ids, width)


def test_a_load_that_waits_can_be_cancelled(pool: HostPool) -> None:
    gathering = slow_store(pool, 0, 1.0)
    future = pool.load([0], 1)
    assert future.cancel()
    gathering.done.set()
    pool.drain()
    assert pool.num_pending == 0
    assert pool.stats.bytes_loaded == 0


def test_closing_cancels_what_waits_and_ends_the_thread() -> None:
    pool = HostPool(NUM_HOST_BLOCKS, random_pool("float32"))
    gathering = slow_store(pool, 0, 1.0)
    future = pool.load([0], 1)
    assert gathering.waited_for.wait(30)
    threading.Timer(0.1, gathering.done.set).start()
    pool.close()
    assert gathering.done.is_set(), "the copy under way was not waited for"
    with pytest.raises(CancelledError):
        future.result()
    assert pool.num_pending == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("host-pool")]
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.load([0], 1)


def test_copies_go_on_beside_programs_that_update_the_pool_in_place() -> None:
    """As the engine does: gather what goes, overwrite it at once in the donated pool, bring it back later."""
    device_pool = random_pool("float32")
    expected = np.asarray(gather_blocks(device_pool, jnp.array([1]))[0]).copy()
    write = jax.jit(scatter_blocks, donate_argnums=0)
    gather = jax.jit(gather_blocks)
    block = jnp.array([1])
    pool = HostPool(2, device_pool)
    for value in range(40):
        k, v = gather(device_pool, block)
        pool.store([0], k, v)
        future = pool.load([0], 1)
        device_pool = write(device_pool, block, *made_of(float(value)))
        del k, v
        back, _ = future.result()
        np.testing.assert_array_equal(np.asarray(back), expected)
        expected = np.full_like(expected, value)
    pool.close()
