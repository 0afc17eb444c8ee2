"""What the Mosaic GPU kernels need to know of the device, and of the JAX they run on.

Mosaic GPU is Pallas' own compiler for NVIDIA GPUs. Its interface may change with every release of JAX; what
differs between the supported ones is kept here, so that the kernels read the same on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.backend
from jax.experimental.pallas import mosaic_gpu as plgpu

# Compute capabilities the kernels are compiled for: A100, A40 and L40, H100 and H200, B200, RTX PRO 6000.
SUPPORTED_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))

# Bytes of shared memory a thread block may have: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
_SMEM_BYTES = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}


@dataclass(frozen=True)
class GpuTarget:
    """The GPU that a program is traced for.

    Attributes:
      compute_capability: major and minor number.
      num_sms: streaming multiprocessors.
      kind: the vendor's name of the device.
    """

    compute_capability: tuple[int, int]
    num_sms: int
    kind: str

    @property
    def has_tma(self) -> bool:
        """Whether tiles are copied by the tensor memory accelerator; by ``cp.async`` otherwise."""
        return self.compute_capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        """Whether there are warpgroup-wide matrix products: on Hopper only."""
        return self.compute_capability[0] == 9

    @property
    def smem_bytes(self) -> int:
        """Shared memory that one thread block may have."""
        return _SMEM_BYTES[self.compute_capability]


# What kernels are shaped for when they run in the interpreter.
INTERPRETED = GpuTarget((9, 0), 132, "interpreter")


def gpu_target() -> GpuTarget | None:
    """The default device's target, or None where that is no NVIDIA GPU."""
    device = jax.extend.backend.get_default_device()
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None or "." not in str(capability):
        return None
    major, minor = (int(part) for part in str(capability).split("."))
    return GpuTarget((major, minor), int(getattr(device, "core_count", 0) or 108), device.device_kind)


def unsupported_device_reason(target: GpuTarget | None) -> str | None:
    """Why Mosaic GPU kernels cannot run on a target, or None."""
    if target is None:
        return "it needs an NVIDIA GPU, and the default device is none"
    if target.compute_capability not in SUPPORTED_CAPABILITIES:
        major, minor = target.compute_capability
        names = ", ".join(f"{a}.{b}" for a, b in SUPPORTED_CAPABILITIES)
        return f"compute capability {major}.{minor} of {target.kind} is none of {names}"
    return None


def kernel(
    name: str, body: Callable[..., None], *, interpret: Any = None, auto_barriers: bool = True, **options: Any
) -> Callable[..., Any]:
    """``plgpu.kernel`` under the compiler's parameters that all kernels here share.

    Args:
      name: what profilers and compilers call it.
      body: the kernel.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter on the CPU, for tests.
      auto_barriers: whether a warpgroup waits for its threads before and after each store from registers; needless
        where nothing is both read and written.
      **options: ``out_type``, ``grid``, ``grid_names``, ``scratch_types``, ``num_threads``, ``thread_name``.
    """
    # approx_math: exp2 is the hardware's (relative error 2**-22, PTX ISA, "ex2"); nothing else here relies on it.
    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not auto_barriers)
    if interpret is not None:
        options["interpret"] = interpret

    def named(*refs: Any) -> None:
        body(*refs)

    named.__name__ = named.__qualname__ = name
    return plgpu.kernel(named, compiler_params=params, **options)


def store_global(ref: Any, value: jax.Array) -> None:
    """Writes registers to global memory, whatever their layout."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)  # 0.12 and newer refuse a plain store that is not vectorised
    else:
        ref[...] = value


def smem_bytes_of(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> int:
    """Bytes of shared memory of buffers given by shape and dtype."""
    total = 0
    for shape, dtype in shapes:
        size = jax.numpy.dtype(dtype).itemsize
        for extent in shape:
            size *= extent
        total += size
    return total
