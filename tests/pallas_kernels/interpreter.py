"""Runs Mosaic GPU kernels on the CPU, in JAX's interpreter for them, with race detection.

    with interpreter() as interpret:
        out = op(..., interpret=interpret)

What is left undone by the interpreter's CPU half is added here, for tests only: ``plgpu.mma``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpret_params(*, detect_races: bool = True) -> plgpu.InterpretGPUParams:
    """Parameters for ``plgpu.kernel(interpret=...)``. What is not written reads as NaN."""
    _add_mma()
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def check_no_races() -> None:
    """Fails if the kernel that ran last had a data race: JAX 0.12 raises by itself, 0.11 only prints."""
    assert not interpret_pallas_call.get_races().races_found, "RACE DETECTED: the interpreter printed it"


def reset_interpreter() -> None:
    """Forgets the state of earlier kernels; needed after an exception in one, or all later ones fail."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@contextmanager
def interpreter(*, detect_races: bool = True) -> Iterator[plgpu.InterpretGPUParams]:
    """Parameters to run kernels with: no race inside, and a clean interpreter afterwards whatever happened.

    The results must be computed inside (``np.asarray``, ``jax.block_until_ready``), because dispatch is
    asynchronous; JAX is made to wait for it on leaving.
    """
    reset_interpreter()
    try:
        yield interpret_params(detect_races=detect_races)
        jax.effects_barrier()
        if detect_races:
            check_no_races()
    finally:
        reset_interpreter()


def _mma(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``plgpu.mma``: operands in their own precision, products and sums in the accumulator's."""
    return acc + jnp.dot(a.astype(acc.dtype), b.astype(acc.dtype), precision="highest")


def _add_mma() -> None:
    """Gives ``plgpu.mma`` a rule for the CPU, once."""
    rule = mlir.lower_fun(_mma, multiple_results=False)
    if primitives.mma_p not in mlir._platform_specific_lowerings["cpu"]:
        mlir.register_lowering(primitives.mma_p, rule, platform="cpu")
