"""The content of the host blocks, and the thread that copies them from and to the device beside the steps."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpaged.pallas_kernels import KVPool, MixedKVPool

logger = logging.getLogger(__name__)

# Stores that wait keep their gathered blocks on the device.
MAX_PENDING = 8


class HostPoolStats(NamedTuple):
    """What the worker has copied since the start.

    Times are the worker's: of a store without the wait for the device to gather the blocks, of a load until they
    are on the device. Bytes are those of the blocks, without padding.
    """

    bytes_stored: int = 0
    bytes_loaded: int = 0
    seconds_storing: float = 0.0
    seconds_loading: float = 0.0
    num_failed_stores: int = 0


class HostPool:
    """Keys and values of the host blocks, quantised ones with their scales, in numpy, and one thread that copies them.

    Copies run in the order of the calls: a load that was asked for before the store that overwrites its blocks
    gets the old content (``HostTier`` relies on this). Methods are called from one thread, the engine's. JAX allows the
    worker to use its arrays meanwhile: its functions may be called from several threads as long as no values
    that are being traced are shared (docs.jax.dev, "Concurrency"); waiting and copying release the GIL.

    Args:
      num_blocks: host blocks. Their memory is taken as it is first written to.
      pool: the device's pool, or its shapes: read for the shapes and dtypes of its arrays, not kept.
      device: where loads go, as in ``jax.device_put``; None for the default device.
    """

    def __init__(
        self,
        num_blocks: int,
        pool: KVPool | MixedKVPool,
        *,
        device: jax.Device | jax.sharding.Sharding | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        # [num_blocks, L, Hkv, S, ...], in the order of pool.arrays: a block is one piece, unlike in the device's pool.
        # Zeros cost nothing yet.
        self._arrays = [
            np.zeros((num_blocks, part.num_layers, *array.shape[1:]), array.dtype)
            for part in pool.parts
            for array in part.arrays
        ]
        self.bytes_per_block = sum(array.itemsize * int(np.prod(array.shape[1:])) for array in self._arrays)
        self._device = device
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-pool")
        self._changed = threading.Condition()
        self._num_pending = 0
        self._closed = False
        # The next two are written by the worker alone. Stats are replaced whole, so a reader never sees half an update.
        self._stats = HostPoolStats()
        self._failed: dict[int, Exception] = {}  # blocks whose last store failed

    @property
    def stats(self) -> HostPoolStats:
        """A snapshot of the counters."""
        return self._stats

    @property
    def num_pending(self) -> int:
        """Copies that have not ended."""
        return self._num_pending

    def store(self, host_ids: Sequence[int], *blocks: jax.Array) -> None:
        """Copies blocks from the device to the host; returns at once unless ``MAX_PENDING`` copies are under way.

        A store that fails is logged, and its blocks cannot be loaded until they are stored again.

        Args:
          host_ids: where they go, distinct.
          blocks: arrays ``[L, P, Hkv, S, ...]`` as ``gather_blocks`` returns them; blocks after the first
            ``len(host_ids)`` are padding.

        Raises:
          ValueError: ids or arrays that do not fit.
        """
        self._check_ids(host_ids)
        if len(set(host_ids)) != len(host_ids):
            raise ValueError(f"host_ids={list(host_ids)} must be distinct")
        if len(blocks) != len(self._arrays):
            raise ValueError(f"blocks: {len(blocks)} arrays must be {len(self._arrays)}")
        for at, (new, array) in enumerate(zip(blocks, self._arrays, strict=True)):
            layers, block = array.shape[1], array.shape[2:]
            fits = new.ndim == array.ndim and new.shape[0] == layers and new.shape[2:] == block
            if not fits or new.shape[1] < len(host_ids) or new.dtype != array.dtype:
                raise ValueError(
                    f"blocks[{at}]: {new.dtype}{list(new.shape)} must be {array.dtype} [{layers}, P, "
                    f"{', '.join(map(str, block))}], P at least {len(host_ids)}"
                )
            # Starts when the device has gathered the blocks. If gathering failed, the worker finds out as well.
            with contextlib.suppress(Exception):
                new.copy_to_host_async()
        with self._changed:
            self._changed.wait_for(lambda: self._num_pending < MAX_PENDING)
        self._submit(self._store, list(host_ids), blocks)

    def load(self, host_ids: Sequence[int], width: int) -> Future[tuple[jax.Array, ...]]:
        """Copies blocks from the host to the device, after all earlier stores; returns at once.

        Args:
          host_ids: which.
          width: P, at least as many.

        Returns:
          A future of arrays ``[L, width, Hkv, S, ...]`` for ``scatter_blocks``, on the device, zeros after the blocks.
          It raises RuntimeError, with the error of the store as its cause, if the last store of a block failed.
          Blocks that were never stored are zeros. It can be cancelled while it waits.

        Raises:
          ValueError: ids or a width that do not fit.
        """
        self._check_ids(host_ids)
        if width < len(host_ids):
            raise ValueError(f"width={width} must be at least {len(host_ids)}")
        return self._submit(self._load, list(host_ids), width)

    def drain(self) -> None:
        """Waits until all copies have ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_pending == 0)

    def close(self) -> None:
        """Waits for the copy under way, cancels the others and frees the memory; closing again does nothing."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._arrays = []

    def _check_ids(self, host_ids: Sequence[int]) -> None:
        assert not self._closed, "closed"
        # numpy would take a negative id for one counted from the end.
        if not all(0 <= block < self.num_blocks for block in host_ids):
            raise ValueError(f"host_ids={list(host_ids)} must be in [0, {self.num_blocks - 1}]")

    def _submit[T](self, copy: Callable[..., T], *arguments: Any) -> Future[T]:
        future = self._worker.submit(copy, *arguments)
        with self._changed:
            self._num_pending += 1
        future.add_done_callback(self._ended)  # also when it is cancelled
        return future

    def _ended(self, _: Future[Any]) -> None:
        with self._changed:
            self._num_pending -= 1
            self._changed.notify_all()

    def _store(self, host_ids: list[int], blocks: tuple[jax.Array, ...]) -> None:
        """In the worker."""
        try:
            jax.block_until_ready(blocks)
            started = time.perf_counter()
            for array, new in zip(self._arrays, blocks, strict=True):
                # On a CPU this is a view of JAX's memory, which lives as long as the view does.
                found = np.asarray(new)
                for at, block in enumerate(host_ids):
                    array[block] = found[:, at]
            seconds = time.perf_counter() - started
        except Exception as error:
            logger.error("storing host blocks %s failed: %s", host_ids, error, exc_info=error)
            # The traceback's frames would keep the gathered blocks on the device.
            self._failed |= dict.fromkeys(host_ids, error.with_traceback(None))
            self._stats = self._stats._replace(num_failed_stores=self._stats.num_failed_stores + 1)
            return
        for block in host_ids:
            self._failed.pop(block, None)
        self._stats = self._stats._replace(
            bytes_stored=self._stats.bytes_stored + len(host_ids) * self.bytes_per_block,
            seconds_storing=self._stats.seconds_storing + seconds,
        )

    def _load(self, host_ids: list[int], width: int) -> tuple[jax.Array, ...]:
        """In the worker."""
        for block in host_ids:
            if block in self._failed:
                raise RuntimeError(f"host block {block} could not be stored") from self._failed[block]
        started = time.perf_counter()
        # New memory each time: device_put may keep it for the array's own instead of copying it.
        blocks = tuple(self._collect(array, host_ids, width) for array in self._arrays)
        loaded = jax.block_until_ready(jax.device_put(blocks, self._device))
        self._stats = self._stats._replace(
            bytes_loaded=self._stats.bytes_loaded + len(host_ids) * self.bytes_per_block,
            seconds_loading=self._stats.seconds_loading + time.perf_counter() - started,
        )
        return loaded

    @staticmethod
    def _collect(array: np.ndarray, host_ids: list[int], width: int) -> np.ndarray:
        """``[L, width, Hkv, S, ...]``, zeros after the blocks."""
        blocks = np.zeros((array.shape[1], width, *array.shape[2:]), array.dtype)
        for at, block in enumerate(host_ids):
            blocks[:, at] = array[block]
        return blocks
