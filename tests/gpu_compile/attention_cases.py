"""Cases of paged attention: the forms of the Mosaic GPU kernel over shapes and variants, and the XLA baseline."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, paged_attention
from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target
from tests.gpu_compile.case import ALL_TARGETS, CompileCase, Expects, Program, UnavailableError
from tests.gpu_compile.pairwise import pairwise
from tests.gpu_compile.pool_cases import NUM_LAYERS, int32, pool_shape

MAX_LEN = 8192
POOL_ARRAY_BYTES = 2**30
PACKAGE = "jaxpaged.pallas_kernels.paged_attention"

# Query tokens and rows of a batch.
BATCHES = {"decode": (64, 64), "mixed": (512, 32), "prompt": (8192, 1), "prompts": (2048, 16)}

# Shapes of the arrays that a variant closes over, and the variant over them; Hq is the number of heads.
Make = Callable[..., AttentionVariant]
VARIANTS: dict[str, tuple[tuple[tuple[str, ...], ...], Make]] = {
    "plain": ((), lambda: AttentionVariant()),
    "cap": ((), lambda: AttentionVariant(logit_soft_cap=30.0)),
    "window": ((), lambda: AttentionVariant(sliding_window=1024)),
    "sinks": ((("float32", "Hq"),), lambda sinks: AttentionVariant(sinks=sinks)),
    "alibi": (
        (("float32", "Hq"),),
        lambda slopes: AttentionVariant(
            score_mod=lambda score, row, head, q_pos, kv_pos: score - slopes[head] * (q_pos - kv_pos)
        ),
    ),
    "documents": (
        (("int32", "B", "M"),),
        lambda ids: AttentionVariant(
            mask_mod=lambda row, head, q_pos, kv_pos: ids[row, kv_pos] == ids[row, q_pos]
        ),
    ),
}

AXES: dict[str, tuple[Any, ...]] = {
    "variant": tuple(VARIANTS),
    "head_dim": (128, 64, 96, 192, 256),
    "block_size": (16, 32, 64, 128),
    "heads": ((32, 8), (64, 8), (16, 16), (32, 1)),
    "dtype": ("bfloat16", "float16"),
}

# Split rows leave partial results: float32 tiles, of up to a tenth of one of the pool's arrays in the widest case.
_KERNEL = Expects(min_kernels=1, has_async_copies=True, max_temp_share=1 / 8)
EXPECTED = {
    "mma": replace(_KERNEL, instructions=frozenset({"mma.sync", "ldmatrix"})),
    "wgmma": replace(_KERNEL, instructions=frozenset({"wgmma.mma_async"})),
    "prefill": replace(_KERNEL, instructions=frozenset({"wgmma.mma_async", "setmaxnreg"})),
    "auto": _KERNEL,
}


def attention_batch(num_tokens: int, num_rows: int, block_size: int) -> AttentionBatch:
    """An abstract batch."""
    return AttentionBatch(
        block_tables=int32(num_rows, MAX_LEN // block_size),
        seq_lens=int32(num_rows),
        query_start_loc=int32(num_rows + 1),
        rows=int32(num_tokens),
        positions=int32(num_tokens),
        slots=int32(num_tokens),
    )


def attention_program(
    form: str,
    batch: str = "decode",
    *,
    variant: str = "plain",
    head_dim: int = 128,
    block_size: int = 16,
    heads: tuple[int, int] = (32, 8),
    dtype: str = "bfloat16",
    kv: str | None = None,
    deterministic: bool = False,
) -> Program:
    """Attention in layer 1 of a pool of 1 GiB for keys and as much for values, which is not donated.

    Args:
      form: ``"mma"``, ``"wgmma"`` or ``"prefill"`` of the Mosaic GPU kernel, ``"auto"`` for what it takes by itself,
        or ``"xla"``.
      batch: of ``BATCHES``.
      variant: of ``VARIANTS``.
      head_dim, block_size, dtype: of the pool.
      kv: the pool's format, of ``quantisation.FORMATS``, if not ``dtype``; there are as many blocks of it.
      heads: Hq and Hkv.
      deterministic: as of the Mosaic GPU kernel.
    """
    num_tokens, num_rows = BATCHES[batch]
    num_heads, num_kv_heads = heads
    num_blocks = POOL_ARRAY_BYTES // (2 * NUM_LAYERS * num_kv_heads * block_size * head_dim)
    kv_pool = pool_shape(
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=dtype,
        num_blocks=num_blocks,
    )
    if kv is not None:
        kv_pool = quantised_shape(kv_pool, kv)
    extents = {"Hq": num_heads, "B": num_rows, "M": MAX_LEN}
    shapes, make = VARIANTS[variant]
    arrays = tuple(
        jax.ShapeDtypeStruct(tuple(extents[letter] for letter in letters), jnp.dtype(name))
        for name, *letters in shapes
    )
    attend = paged_attention_of(form, deterministic)

    def program(
        q: jax.Array, kv_pool: KVPool, batch: AttentionBatch, arrays: tuple[jax.Array, ...]
    ) -> jax.Array:
        return attend(q, kv_pool, 1, batch, make(*arrays))

    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), jnp.dtype(dtype))
    return Program(program, (q, kv_pool, attention_batch(num_tokens, num_rows, block_size), arrays))


def quantised_shape(kv_pool: KVPool, kv: str) -> KVPool:
    """An abstract pool of as many blocks in a quantised format."""
    sizes = {
        "num_layers": kv_pool.num_layers,
        "num_blocks": kv_pool.num_blocks,
        "num_kv_heads": kv_pool.num_kv_heads,
        "block_size": kv_pool.block_size,
        "head_dim": kv_pool.head_dim,
    }
    return jax.eval_shape(partial(KVPool.zeros, dtype=kv, **sizes))


def paged_attention_of(form: str, deterministic: bool) -> Callable[..., jax.Array]:
    """Paged attention in a given form."""
    if form == "xla":
        return lambda q, pool, layer, batch, variant: paged_attention(
            q, pool, layer, batch, variant=variant, implementation="xla"
        )
    try:
        mosaic = importlib.import_module(f"{PACKAGE}.mosaic_gpu").paged_attention_mosaic_gpu
        importlib.import_module(f"{PACKAGE}.tuning")
    except ModuleNotFoundError as error:
        raise UnavailableError(f"the Mosaic GPU attention kernel cannot be imported: {error}") from error

    def attend(
        q: jax.Array, kv_pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
    ) -> jax.Array:
        # Batches of many query tokens a row get the prefill form by themselves, in sizes that depend on the variant.
        config = None if form in ("auto", "prefill") else config_in_form(form, q, kv_pool, batch)
        return mosaic(q, kv_pool, layer, batch, variant, deterministic=deterministic, config=config)

    return attend


def config_in_form(form: str, q: jax.Array, kv_pool: KVPool, batch: AttentionBatch) -> Any:
    """The sizes that the kernel takes by itself where they are of that form, else the smallest of the form."""
    from jaxpaged.pallas_kernels.paged_attention.tuning import CallShape, MosaicConfig, config_for

    target = gpu_target()
    assert target is not None
    num_rows, table_width = batch.block_tables.shape
    num_kv_heads, block_size, head_dim = kv_pool.num_kv_heads, kv_pool.block_size, kv_pool.head_dim
    shape = CallShape(
        q.shape[0], num_rows, q.shape[1], num_kv_heads, head_dim, block_size, table_width * block_size
    )
    config = config_for(target, shape, kv_pool.k.dtype)
    if config.form == form:
        return config
    if form == "wgmma":
        return MosaicConfig(form="wgmma", tile_kv=64, stages=2, ctas_per_sm=1, tile_m=64)
    return MosaicConfig(form="mma", tile_kv=32, stages=2, ctas_per_sm=1, tile_m=16)


def name_of(form: str, settings: dict[str, Any]) -> str:
    """``attention-mma-plain-d128-s16-h32x8-bfloat16``."""
    num_heads, num_kv_heads = settings["heads"]
    words = (form, settings["variant"], f"d{settings['head_dim']}", f"s{settings['block_size']}")
    return "-".join(["attention", *words, f"h{num_heads}x{num_kv_heads}", settings["dtype"]])


def _decode(form: str, settings: dict[str, Any], targets: tuple[str, ...]) -> CompileCase:
    build = partial(attention_program, form, **settings)
    return CompileCase(name_of(form, settings), build, targets, EXPECTED[form])


def _special(form: str, targets: tuple[str, ...], batch: str, **options: Any) -> CompileCase:
    words = [key if value is True else str(value) for key, value in options.items()]
    build = partial(attention_program, form, batch, **options)
    name = "-".join(["attention", form, batch, *words])
    return CompileCase(name, build, targets, EXPECTED.get(form, Expects()))


def each_value_once(shift: int, axes: dict[str, tuple[Any, ...]] = AXES) -> list[dict[str, Any]]:
    """As few combinations as have every value of every axis; others for another ``shift``."""
    rows = max(len(values) for values in axes.values())
    return [
        {name: values[(row + shift * at) % len(values)] for at, (name, values) in enumerate(axes.items())}
        for row in range(rows)
    ]


# Hopper is what the kernels are tuned for: every two settings meet there in the portable form, and each is met in the
# others. Of the other GPUs each sees every setting, and different combinations of them.
_PAIRS = pairwise(AXES)
_OTHERS = [target for target in ALL_TARGETS if target != "h200"]


def _decode_cases() -> list[CompileCase]:
    cases = [_decode("mma", settings, ("h200",)) for settings in _PAIRS]
    cases += [
        _decode("wgmma", settings, ("h200",)) for shift in (0, 3) for settings in each_value_once(shift)
    ]
    seen = {case.name: case for case in cases}
    for shift, target in enumerate(_OTHERS):
        for settings in each_value_once(shift):
            case = _decode("mma", settings, (target,))
            known = seen.get(case.name)
            seen[case.name] = case if known is None else replace(known, targets=(*known.targets, target))
    return list(seen.values())


# Sizes at which words of codes lie differently: rows of 32 to 256 bytes, blocks larger than tiles, groups of 32.
_QUANTISED_SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "fp8_e4m3": ({"dtype": "float16"}, {"head_dim": 256}, {"head_dim": 96, "block_size": 32}),
    "int8": (
        {"dtype": "float16"},
        {"head_dim": 256, "variant": "alibi"},
        {"head_dim": 192, "block_size": 128},
    ),
    "int4": ({"dtype": "float16"}, {"head_dim": 256}, {"head_dim": 64}, {"head_dim": 192, "heads": (32, 1)}),
}


def _quantised_cases() -> list[CompileCase]:
    """Every format on every GPU in the portable form, and on Hopper all forms and other sizes."""
    cases = []
    for kind, sizes in _QUANTISED_SIZES.items():
        cases.append(_special("mma", ALL_TARGETS, "decode", kv=kind))
        cases += [_special(form, ("h200",), "mixed", kv=kind) for form in ("wgmma", "prefill")]
        cases += [_special("mma", ("h200",), "decode", kv=kind, **size) for size in sizes]
        cases.append(_special("wgmma", ("h200",), "mixed", kv=kind, head_dim=256))
        cases.append(_special("prefill", ("h200",), "mixed", kv=kind, variant="window"))
    # Partial results are as large as ever, the pool is a half or a quarter.
    return [replace(case, expects=replace(case.expects, max_temp_share=1 / 4)) for case in cases]


# Groups of an odd number of heads leave rows of a tile free.
_PREFILL_AXES = {**AXES, "heads": ((32, 8), (64, 8), (16, 16), (28, 4), (32, 1))}


def _prefill_cases() -> list[CompileCase]:
    """On Hopper, where it is: every setting twice, and prompts whose temporaries must not grow with them."""
    combinations = [c for shift in (1, 2) for c in each_value_once(shift, _PREFILL_AXES)]
    build = partial(attention_program, "prefill", "mixed")
    cases = [
        CompileCase(name_of("prefill", c), partial(build, **c), expects=EXPECTED["prefill"])
        for c in combinations
    ]
    cases += [_special("prefill", ("h200",), batch) for batch in ("prompt", "prompts")]
    # What it takes by itself: operands over keys leave no registers for 128 of them.
    return [*cases, _special("auto", ("h200",), "prompts", variant="documents")]


CASES = (
    _special("xla", ("h200", "a100"), "decode"),
    _special("xla", ("h200",), "mixed", variant="alibi"),
    *_decode_cases(),
    *_quantised_cases(),
    *_prefill_cases(),
    _special("auto", ALL_TARGETS, "decode", deterministic=True),
    _special("auto", ALL_TARGETS, "mixed"),
    *(
        _special(form, ("h200",), "mixed", variant=variant)
        for form in ("mma", "wgmma")
        for variant in ("alibi", "documents")
    ),
)


def every_combination() -> list[CompileCase]:
    """The whole product of settings: too much for every run, there for a release or a doubt."""
    combinations = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    cases = [_decode("mma", c, ALL_TARGETS) for c in combinations]
    cases += [_decode("wgmma", c, ("h200",)) for c in combinations]
    return [replace(case, name=f"every-{case.name}") for case in cases]
