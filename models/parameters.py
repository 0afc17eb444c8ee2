"""A module's parameters as a flat dict, so that NNX traversal happens once and never on a hot path."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxpaged.models.decoder import Decoder

Parameters = dict[str, jax.Array]


def split_parameters(model: Decoder) -> tuple[Parameters, Callable[[Mapping[str, jax.Array]], Decoder]]:
    """The parameters by dotted path ("layers.0.attn.qkv.kernel"), and the way back.

    The second result puts such a dict into the module's structure; under ``jax.jit`` it costs nothing at
    run time. Works on abstract modules (``nnx.eval_shape``) too.
    """
    graph, state = nnx.split(model)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [_dotted(path) for path, _ in with_paths]

    def merge(parameters: Mapping[str, jax.Array]) -> Decoder:
        return nnx.merge(graph, jax.tree.unflatten(treedef, [parameters[path] for path in paths]))

    return {path: leaf for path, (_, leaf) in zip(paths, with_paths, strict=True)}, merge


def flat_parameters(tree: Any) -> dict[str, Any]:
    """The leaves of an ``nnx.State`` or of the nested dict of one, named as ``split_parameters`` names them."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _dotted(path: jax.tree_util.KeyPath) -> str:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return ".".join(str(name) for name in names)
