"""Who is measured: this project's kernel in its forms, its plain JAX implementation, and the peers.

Each participant says which layout its inputs have and gives a step, ``(q, set, shared) -> q``. What is missing
or refuses a shape raises, and the reason becomes its entry in the table: nobody is left out silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.points import Point
from benchmarks.gpu.timing import Step
from jaxpaged.pallas_kernels import AttentionVariant, paged_attention

OURS = "mosaic_gpu"
PLAIN = AttentionVariant()


@dataclass(frozen=True)
class Participant:
    """One way to compute decode attention.

    Attributes:
      name: as in the table.
      layout: ``pool`` (this project's, dummy block included), ``exact_pool`` (without it), ``pages`` or
        ``contiguous``.
      step: gives the step for a point; raises if it cannot.
      launches: of one timed program: fewer where each is compiled anew.
      uses_blocks: whether the block size changes anything for it.
      is_torch: whether it runs in PyTorch.
    """

    name: str
    layout: str
    step: Callable[[Point], Step]
    launches: int = 8
    uses_blocks: bool = True
    is_torch: bool = False


def implementation_step(name: str, variant: AttentionVariant = PLAIN) -> Callable[[Point], Step]:
    """A named implementation of ``paged_attention``."""

    def make(point: Point) -> Step:
        del point
        return lambda q, pool, batch: paged_attention(q, pool, 0, batch, variant=variant, implementation=name)

    return make


def call_shape(point: Point, queries: int = 1) -> Any:
    """A point as the kernel's call sees it, with ``queries`` tokens at the end of every row."""
    from jaxpaged.pallas_kernels.paged_attention.tuning import CallShape

    return CallShape(
        num_tokens=point.batch * queries,
        num_rows=point.batch,
        num_heads=point.num_heads,
        num_kv_heads=point.num_kv_heads,
        head_dim=point.head_dim,
        block_size=point.block_size,
        max_len=-(-point.context // point.block_size) * point.block_size,
    )


def config_of(point: Point, form: str | None = None) -> Any:
    """The tile sizes that a call takes by itself, or those for another form of the kernel."""
    from jaxpaged.pallas_kernels.mosaic_gpu import INTERPRETED, gpu_target
    from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig, config_for

    picked = config_for(gpu_target() or INTERPRETED, call_shape(point), jnp.bfloat16)
    if form is None or picked.form == form:
        return picked
    return MosaicConfig("wgmma", 64, 3, 1, 64) if form == "wgmma" else MosaicConfig("mma", 64, 2, 3, 16)


def form_step(form: str) -> Callable[[Point], Step]:
    """One form of the kernel, ``mma`` or ``wgmma``."""

    def make(point: Point) -> Step:
        return config_step(config_of(point, form))

    return make


def config_step(config: Any, variant: AttentionVariant = PLAIN) -> Step:
    """The kernel with given tile sizes."""
    from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu

    return lambda q, pool, batch: paged_attention_mosaic_gpu(q, pool, 0, batch, variant, config=config)


def _jax_kernel(point: Point) -> Step:
    """JAX's own paged attention on Pallas-Triton, deprecated; its defaults, cut to what the shape allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as jax_paged_attention
    if not point.is_uniform:
        raise NotImplementedError("its tables need a power of two of blocks")
    pages = -(-point.context // point.block_size)
    splits = min(16, pages)

    def step(q: Any, kv: Any, shared: Any) -> Any:
        tables, lengths = shared
        scaled = (q.astype(jnp.float32) * point.head_dim**-0.5).astype(q.dtype)  # it does not scale
        return jax_paged_attention(
            scaled, *kv, tables, lengths, k_splits=splits, pages_per_compute_block=min(8, pages // splits)
        )

    return step


def _cudnn(point: Point) -> Step:
    """cuDNN through JAX, keys and values contiguous."""
    del point

    def step(q: Any, kv: Any, lengths: Any) -> Any:
        out = jax.nn.dot_product_attention(
            q[:, None], *kv, key_value_seq_lengths=lengths, implementation="cudnn"
        )
        return out[:, 0]

    return step


def _cudnn_paged(point: Point) -> Step:
    """cuDNN over pages; JAX has it, but does not export it."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType
    from jax._src.cudnn.fused_attention_stablehlo import paged_attention as cudnn_paged_attention

    if not point.is_uniform:
        raise NotImplementedError("the pool must be the tables' size")

    def step(q: Any, pool: Any, batch: Any) -> Any:
        tables = batch.block_tables[:, None, :, None]
        out = cudnn_paged_attention(
            q[:, :, None],
            pool.k,
            pool.v,
            jnp.ones_like(batch.seq_lens),
            batch.seq_lens,
            tables,
            tables,
            scale=point.head_dim**-0.5,
            mask_type=MaskType.PADDING,
            qkv_layout="BNTH",
        )
        return out[:, :, 0]

    return step


def _torch_sdpa(point: Point) -> Step:
    """PyTorch's choice of kernel, keys and values contiguous."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU")
    if not point.is_uniform:
        raise NotImplementedError("rows of different length need a mask")
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda q, kv, _: attention(q, *kv, enable_gqa=point.num_heads != point.num_kv_heads)


# Its loops take long to compile, and long enough to run that a program of one launch hides the dispatch.
XLA = Participant("xla", "pool", implementation_step("xla"), launches=1)
PEERS = (
    XLA,
    Participant("cudnn_paged", "exact_pool", _cudnn_paged),
    Participant("jax_pallas_triton", "pages", _jax_kernel, launches=4),
    Participant("cudnn", "contiguous", _cudnn, uses_blocks=False),
    Participant("torch_sdpa", "contiguous", _torch_sdpa, launches=32, uses_blocks=False, is_torch=True),
)


def ours(form: str | None = None, *, dry_run: bool = False) -> Participant:
    """This project's kernel: as it is called, or in one form. A dry run has the plain implementation in its place."""
    name = OURS if form is None else f"{OURS}_{form}"
    if dry_run:
        return Participant(name, "pool", implementation_step("xla"), launches=1)
    return Participant(
        name, "pool", implementation_step(OURS) if form is None else form_step(form), launches=32
    )
