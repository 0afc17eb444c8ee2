"""GPUs that are not there: what XLA needs to know of each to compile for it, down to machine code.

The CUDA plugin of jax makes a device topology out of a description of a GPU, and compiles for it with the
``ptxas`` of the CUDA wheels; no driver and no GPU take part. Programs are traced under the mesh of that topology
(Triton fusions ask it for the kind of GPU) and with its device as the default one (Mosaic GPU asks that one for
the compute capability and would otherwise assume sm_90).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget

GIB = 2**30
INSTALL = "make gpu-compile-test, or: pip install -e '.[dev,gpu-compile]'"

# The fields of tensorflow::se::GpuTargetConfigProto (xla/stream_executor/device_description.proto).
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {smem_per_sm}
  shared_memory_per_block_optin: {smem_per_block}
  threads_per_core_limit: {threads_per_sm}
  core_count: {num_sms}
  fpus_per_core: {fpus_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
}}
platform_name: "CUDA"
device_description_str: "{kind}"
"""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; numbers from NVIDIA's data sheets and the CUDA C++ Programming Guide.

    Attributes:
      name: short, for the command line.
      gpu: what the kernels know of it.
      memory, l2_bytes, bandwidth: bytes, bytes, bytes a second.
      threads_per_sm, fpus_per_sm, clock_ghz: as XLA's cost model wants them.
    """

    name: str
    gpu: GpuTarget
    memory: int
    l2_bytes: int
    bandwidth: int
    threads_per_sm: int
    fpus_per_sm: int
    clock_ghz: float

    @property
    def smem_per_sm(self) -> int:
        """Shared memory of a multiprocessor; each block on it takes ``RESERVED_SMEM`` beside its own."""
        return self.gpu.smem_bytes + RESERVED_SMEM

    def config(self) -> str:
        """The description in the text form of the protocol buffer."""
        major, minor = self.gpu.compute_capability
        # From Hopper on the instructions of one architecture only (wgmma, setmaxnreg) need the "a" variant.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return _CONFIG.format(
            **vars(self),
            smem_per_sm=self.smem_per_sm,
            smem_per_block=self.gpu.smem_bytes,
            num_sms=self.gpu.num_sms,
            kind=self.gpu.kind,
            major=major,
            minor=minor,
            extension=extension,
        )


RESERVED_SMEM = 1024  # bytes of shared memory that the system takes for each thread block

_ALL = (
    Target(
        "a100", GpuTarget((8, 0), 108, "NVIDIA A100-SXM4-80GB"),
        80 * GIB, 40 * 2**20, 2039 * 10**9, 2048, 64, 1.41,
    ),
    Target(
        "a40", GpuTarget((8, 6), 84, "NVIDIA A40"),
        48 * GIB, 6 * 2**20, 696 * 10**9, 1536, 128, 1.74,
    ),
    Target(
        "l40", GpuTarget((8, 9), 142, "NVIDIA L40"),
        48 * GIB, 96 * 2**20, 864 * 10**9, 1536, 128, 2.49,
    ),
    Target(
        "h200", GpuTarget((9, 0), 132, "NVIDIA H200"),
        141 * 10**9, 50 * 2**20, 4800 * 10**9, 2048, 128, 1.98,
    ),
    Target(
        "b200", GpuTarget((10, 0), 148, "NVIDIA B200"),
        180 * 10**9, 126 * 2**20, 8000 * 10**9, 2048, 128, 1.97,
    ),
    Target(
        "rtxpro6000", GpuTarget((12, 0), 188, "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
        96 * GIB, 128 * 2**20, 1597 * 10**9, 1536, 128, 2.6,
    ),
)  # fmt: skip
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def missing_reason() -> str | None:
    """Why nothing can be compiled for a GPU here, and what to do about it; None if it can."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    needed = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
    missing = [name for name in needed if name not in installed]
    if missing:
        return f"{', '.join(missing)} not installed; to compile for GPUs without one: {INSTALL}"
    for name in needed[:2]:
        if installed[name] != installed["jaxlib"]:
            return f"{name} {installed[name]} does not go with jaxlib {installed['jaxlib']}: {INSTALL}"
    if "nvidia-nvjitlink" in installed:
        return (
            "nvidia-nvjitlink is installed (by jax[cuda13]): kernels are then linked in a way in which ptxas "
            "ignores setmaxnreg, so that its register counts are not those of a release; use an environment "
            f"without it: {INSTALL}"
        )
    return None


@cache
def mesh_of(name: str) -> Mesh:
    """The mesh of one such GPU; one name in a process, because the plugin keeps what it learnt of the first."""
    if _used and name not in _used:
        raise RuntimeError(f"this process compiles for {_used[0]} already: use another one for {name}")
    _used.append(name)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[name].config(), topology="1x1x1"
    )
    return topologies.make_mesh(topology, (1,), ("gpu",))


_used: list[str] = []


def compile_for(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    donate_argnums: tuple[int, ...] = (),
    compiler_options: Mapping[str, str | bool] = MappingProxyType({}),
) -> jax.stages.Compiled:
    """Compiles ``jax.jit(function)`` for a target.

    Args:
      name: of ``TARGETS``.
      function: traced here, so what it asks of the default device is answered for the target.
      args: pytrees of arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes count.
      donate_argnums: as of ``jax.jit``.
      compiler_options: of XLA, beside the defaults.
    """
    mesh = mesh_of(name)
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(mesh.devices.flat[0]):
        lowered = jax.jit(function, donate_argnums=donate_argnums).trace(*shapes).lower()
        return lowered.compile(dict(compiler_options))
