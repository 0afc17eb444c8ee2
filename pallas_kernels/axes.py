"""The one legend of axis letters used in shape comments and docstrings of the whole project.

====  ===========================================================
``B``  rows: sequences of a padded batch
``T``  tokens of a step, all rows one after the other (flat)
``Hq`` query heads            ``Hkv``  key/value heads
``G``  query heads of one key/value head, ``Hq // Hkv``
``D``  head dimension         ``E``    hidden size
``L``  layers                 ``V``    vocabulary
``N``  blocks of the pool     ``S``    tokens of a block (``block_size``)
``M``  entries of a row's block table
====  ===========================================================
"""

from typing import TypeAlias

import jax
from jaxtyping import Bool, Float, Int32

Array: TypeAlias = jax.Array

Queries: TypeAlias = Float[Array, "T Hq D"]
Keys: TypeAlias = Float[Array, "T Hkv D"]
PoolArray: TypeAlias = Float[Array, "LN Hkv S D"]
BlockTables: TypeAlias = Int32[Array, "B M"]
Tokens: TypeAlias = Int32[Array, " T"]
Rows: TypeAlias = Int32[Array, " B"]
Mask: TypeAlias = Bool[Array, "*shape"]
