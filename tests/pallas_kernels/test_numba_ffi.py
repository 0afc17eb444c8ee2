"""Functions compiled by numba inside of XLA programs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numba
import numpy as np

from jaxpaged.pallas_kernels import numba_ffi
from jaxpaged.pallas_kernels.numba_ffi import (
    float32_pointer,
    int32_pointer,
    operand,
    operand_dim,
    register,
    result,
)


@numba.njit
def shifted_rows(frame):  # type: ignore[no-untyped-def]
    """result[i] = 2 * x[i] + shift[i], row by row."""
    rows, columns = operand_dim(frame, 0, 0), operand_dim(frame, 0, 1)
    x = numba.carray(float32_pointer(operand(frame, 0)), (rows, columns))
    shift = numba.carray(int32_pointer(operand(frame, 1)), (rows,))
    out = numba.carray(float32_pointer(result(frame, 0)), (rows, columns))
    for i in range(rows):
        for j in range(columns):
            out[i, j] = np.float32(2) * x[i, j] + np.float32(shift[i])


def shift(x: jax.Array, by: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call("test_shifted_rows", jax.ShapeDtypeStruct(x.shape, jnp.float32))(x, by)


def test_a_registered_function_runs_inside_a_program() -> None:
    for _ in range(2):  # the second time changes nothing
        register("test_shifted_rows", shifted_rows)

    @jax.jit
    def program(x: jax.Array, by: jax.Array) -> jax.Array:
        return shift(shift(x, by) + 1, by).sum(axis=1)

    for rows, columns in ((3, 5), (7, 2)):
        x = jnp.arange(rows * columns, dtype=jnp.float32).reshape(rows, columns)
        by = jnp.arange(rows, dtype=jnp.int32)
        expected = (2 * (2 * x + by[:, None] + 1) + by[:, None]).sum(axis=1)
        np.testing.assert_array_equal(program(x, by), expected)


def test_machine_code_is_made_once() -> None:
    """Not once for each process, which would take seconds: the second handler finds what the first one left."""
    for name in ("test_cached_first", "test_cached_second"):
        register(name, shifted_rows)
    body, _ = numba_ffi._registered["test_cached_second"]
    assert body.cache_hits == 1


@numba.njit
def nothing(frame):  # type: ignore[no-untyped-def]
    """Writes no result."""


def test_threads_that_register_one_name_agree() -> None:
    """A warm-up compiles in several threads; XLA refuses a second handler under the same name."""
    jax.devices()  # before this, registrations only queue up
    together = threading.Barrier(4, timeout=60)

    def register_together() -> None:
        together.wait()
        register("test_registered_by_threads", nothing)

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(register_together) for _ in range(4)]
    assert [future.exception() for future in futures] == [None] * 4
