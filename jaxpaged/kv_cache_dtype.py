"""What ``kv_cache_dtype`` says: in which dtype or format each layer of the model keeps its keys and values."""

from collections import Counter
from collections.abc import Sequence

from jaxpaged.errors import InvalidRequestError

PLAIN = ("float32", "bfloat16", "float16")
QUANTISED = ("fp8_e4m3", "int8", "int4")  # names of pallas_kernels.quantisation.FORMATS, which imports jax
ALIASES = {"fp8": "fp8_e4m3"}
AUTO = "auto"


def checked_dtypes(value: object) -> str | tuple[str, ...]:
    """One name or a tuple of names, aliases replaced; InvalidRequestError for anything else."""
    names = (value,) if isinstance(value, str) else _items("kv_cache_dtype", value, "names")
    known = (AUTO, *PLAIN, *ALIASES, *QUANTISED)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise InvalidRequestError(
                "kv_cache_dtype",
                value,
                f"{name!r} is none of {', '.join(known)}; give one of them, or one for each layer",
            )
    found = tuple(ALIASES.get(str(name), str(name)) for name in names)
    return found[0] if isinstance(value, str) else found


def checked_layers(value: object) -> tuple[int, ...]:
    """Layer indices, given as integers or, as in vLLM, as their digits; InvalidRequestError for anything else."""
    found = []
    for item in _items("kv_cache_dtype_skip_layers", value, "layer indices"):
        if isinstance(item, str) and item.isascii() and item.isdigit():
            item = int(item)
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise InvalidRequestError(
                "kv_cache_dtype_skip_layers", value, f"{item!r} is no layer index: an integer from 0"
            )
        found.append(item)
    return tuple(found)


def _items(argument: str, value: object, what: str) -> tuple[object, ...]:
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or (argument == "kv_cache_dtype" and not value)
    ):
        raise InvalidRequestError(argument, value, f"must be a sequence of {what}")
    return tuple(value)


def layer_dtypes(
    kv_cache_dtype: str | tuple[str, ...], skip_layers: Sequence[int], dtype: str, num_layers: int
) -> tuple[str, ...]:
    """The name of each layer, none of them "auto"; the names of a resolved config give themselves.

    Args:
      kv_cache_dtype, skip_layers: checked.
      dtype: of the model.
      num_layers: of the model.

    Raises:
      InvalidRequestError: another number of names than layers, a layer that there is not.
    """
    names = (kv_cache_dtype,) * num_layers if isinstance(kv_cache_dtype, str) else kv_cache_dtype
    if len(names) != num_layers:
        raise InvalidRequestError(
            "kv_cache_dtype",
            kv_cache_dtype,
            f"has {len(names)} names, but the model has num_layers={num_layers}",
        )
    for layer in skip_layers:
        if layer >= num_layers:
            raise InvalidRequestError(
                "kv_cache_dtype_skip_layers",
                skip_layers,
                f"the model has layers 0 to {num_layers - 1}, no layer {layer}",
            )
    return tuple(dtype if name == AUTO or layer in skip_layers else name for layer, name in enumerate(names))


def named(dtypes: str | Sequence[str]) -> str:
    """For people: one name, or how many layers have which, as in "int4 (4 layers), bfloat16 (1 layer)"."""
    if isinstance(dtypes, str):
        return dtypes
    counts = Counter(dtypes)
    if len(counts) == 1:
        return dtypes[0]
    return ", ".join(f"{name} ({n} layer{'s' * (n > 1)})" for name, n in counts.items())
