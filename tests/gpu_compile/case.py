"""What is compiled, and what is expected of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

ALL_TARGETS = ("a100", "a40", "l40", "h200", "b200", "rtxpro6000")


class UnavailableError(Exception):
    """A case cannot be built yet: something that it needs is not written. The message says what."""


class Program(NamedTuple):
    """A function to compile and the shapes of its arguments, in the order of ``compile_for``."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    donate_argnums: tuple[int, ...] = ()
    compiler_options: Mapping[str, str | bool] = MappingProxyType({})


@dataclass(frozen=True)
class Expects:
    """What must hold of a compiled case, beyond compiling. Nothing ever spills, nor exceeds the target's memory.

    Attributes:
      min_kernels: Mosaic GPU kernels that the program holds, at least.
      instructions: PTX instructions (as in ``ptx.INSTRUCTIONS``) that must occur in some kernel.
      has_async_copies: tiles come by TMA where the target has it, by ``cp.async`` where not.
      updates_in_place: every donated byte is reused, none copied.
      max_temp_share: temporary bytes, as a share of one of the pool's arrays.
    """

    min_kernels: int = 0
    instructions: frozenset[str] = frozenset()
    has_async_copies: bool = False
    updates_in_place: bool = False
    max_temp_share: float = 1 / 16


@dataclass(frozen=True)
class CompileCase:
    """One program and the GPUs that it is compiled for.

    Attributes:
      name: unique; words joined by ``-``, from the general to the particular.
      build: makes the program; called in the process that compiles it. Raises ``UnavailableError`` if it cannot.
      targets: names of ``targets.TARGETS``.
      expects: see ``Expects``.
      may_refuse: whether the kernel may raise NotImplementedError, because the shape is beyond what it takes.
    """

    name: str
    build: Callable[[], Program]
    targets: tuple[str, ...] = ("h200",)
    expects: Expects = field(default_factory=Expects)
    may_refuse: bool = False
