"""What an optimised HLO module moves through device memory, and in how many kernels, read from its text.

Every instruction that XLA launches counts its operands as read and its results as written, once each: what a fusion
keeps in registers costs nothing, what one kernel hands to the next is written and read. Of an operand that a fusion
slices or gathers from only the part that is used counts; of an update in place only what it writes. Caches do
not exist here, so the sums are those of a program whose arrays have left the L2 cache between kernels.
A Mosaic GPU kernel is opaque: what it moves is given by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from tests.gpu_compile.hlo import Instruction, read_computations, shape_bytes

Computations = dict[str, dict[str, Instruction]]

_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "after-all"}
)
_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\d\w*)?)\[([\d,]*)\]")


@dataclass(frozen=True)
class Launch:
    """One kernel: the instruction's name, the bytes it reads and writes, those of ``weights`` left out."""

    name: str
    read: int
    written: int


@dataclass(frozen=True)
class Traffic:
    """Kernels of a module on one way through its branches and loops.

    Attributes:
      launches: in the order of the module.
      trips: how often each of its loops went round; every trip ends with a predicate that the next one needs.
    """

    launches: tuple[Launch, ...]
    trips: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(launch.read + launch.written for launch in self.launches)


@dataclass
class Reader:
    """Follows a module from its entry.

    Attributes:
      text: of the optimised module, scheduled or not.
      flags: value of the int32 scalars that conditionals look at. A predicate that is none of ``flags & mask != 0``
        or ``flags != 0`` is taken to be false: these are the rare cases, like a NaN among the logits.
      trips: of the loops in the order in which they are met.
      kernels: bytes read and written by a Mosaic GPU kernel, by a part of its ``op_name``.
      weights: entry parameters that do not count, by a part of their names.
    """

    text: str
    flags: int = 0
    trips: Sequence[int] = ()
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weights: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.computations: Computations = read_computations(self.text)
        self._open_trips = list(self.trips)

    def traffic(self) -> Traffic:
        """Of the whole module."""
        entry = re.search(r"^ENTRY %?([\w.\-]+)", self.text, re.MULTILINE)
        assert entry is not None, "no entry computation"
        launches = self._of(entry[1], is_entry=True)
        assert not self._open_trips, f"{len(self._open_trips)} loops fewer than were said"
        return Traffic(tuple(launches), tuple(self.trips))

    def _of(self, name: str, *, is_entry: bool = False) -> list[Launch]:
        body, found = self.computations[name], []
        for at in body.values():
            if at.opcode == "while":
                trips = self._open_trips.pop(0)
                inside = self._of(_named(at, "body")) + self._of(_named(at, "condition"))
                found += inside * trips + self._of(_named(at, "condition"))
            elif at.opcode == "conditional":
                is_true = self._is_true(body, at.operands[0])
                found += self._of(_named(at, "true_computation" if is_true else "false_computation"))
            elif at.opcode == "call":
                found += self._of(_named(at, "to_apply"))
            elif at.opcode not in _FREE:
                found.append(self._launch(at, body, is_entry=is_entry))
        return found

    def _launch(self, at: Instruction, body: dict[str, Instruction], *, is_entry: bool) -> Launch:
        inner = self.computations.get(at.called or "", {})
        kernel = self._kernel_bytes([at, *inner.values()])
        if kernel is not None:
            return Launch(at.name, *kernel)
        sources = [_source(body, name) for name in at.operands]
        skipped = {
            index
            for index, source in enumerate(sources)
            if is_entry and source.opcode == "parameter" and any(w in source.name for w in self.weights)
        }
        if not inner:
            read = sum(_bytes(s) for i, s in enumerate(sources) if i not in skipped)
            return Launch(at.name, read, _bytes(at))
        read, written = _fusion_bytes(inner, skipped)
        return Launch(at.name, read, written)

    def _kernel_bytes(self, instructions: Sequence[Instruction]) -> tuple[int, int] | None:
        for at in instructions:
            if at.opcode == "custom-call" and "mosaic_gpu" in at.rest:
                known = [moved for part, moved in self.kernels.items() if part in at.rest]
                assert len(known) == 1, f"{at.name}: {len(known)} kernels of that name are known"
                return known[0]
        return None

    def _is_true(self, body: dict[str, Instruction], name: str) -> bool:
        """Whether a predicate holds: a test of bits of the flags, or something rare."""
        at = _source(body, name)
        inner = self.computations.get(at.called or "", {})
        if not inner or any(
            i.opcode in ("reduce", "is-finite") or "f32" in i.type_text for i in inner.values()
        ):
            return False
        masks = [_constant(i, inner) for i in inner.values() if i.opcode == "and"]
        return bool(self.flags & masks[0] if masks else self.flags)


def _named(at: Instruction, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", at.rest)
    assert match is not None, f"{at.name} has no {attribute}"
    return match[1]


def _source(body: dict[str, Instruction], name: str) -> Instruction:
    """What makes a value, seen through bitcasts."""
    while body[name].opcode == "bitcast":
        name = body[name].operands[0]
    return body[name]


def _constant(at: Instruction, body: dict[str, Instruction]) -> int:
    values = [body[name] for name in at.operands if body[name].opcode == "constant"]
    return int(values[0].rest.split(")")[0])


def _bytes(at: Instruction) -> int:
    return sum(shape_bytes(*shape) for shape in _SHAPE.findall(at.type_text))


def _elements(at: Instruction) -> int:
    return max(
        (
            prod(int(extent) for extent in extents.split(",") if extent)
            for _, extents in _SHAPE.findall(at.type_text)
        ),
        default=0,
    )


def _fusion_bytes(body: dict[str, Instruction], skipped: set[int]) -> tuple[int, int]:
    """Bytes that a fusion reads of its parameters and writes as its results."""
    root = next(at for at in body.values() if at.is_root)
    results = [_through(body, name) for name in root.operands] if root.opcode == "tuple" else [root]
    wanted: dict[str, float] = {}
    sliced: dict[str, float] = {}
    for result in results:
        wanted[result.name] = float(_elements(result))
    for at in reversed(list(body.values())):
        need = min(float(_elements(at)), wanted.get(at.name, 0.0) + sliced.get(at.name, 0.0))
        if need == 0.0 or at.opcode in ("parameter", "constant", "tuple"):
            wanted[at.name] = need
            continue
        for index, name in enumerate(at.operands):
            if name not in body:
                continue
            share, is_part = _demand(at, index, body[name], need)
            if is_part:
                sliced[name] = sliced.get(name, 0.0) + share
            else:
                wanted[name] = max(wanted.get(name, 0.0), share)
    read = 0
    for at in body.values():
        if at.opcode == "parameter" and int(at.rest.split(")")[0]) not in skipped and _elements(at):
            read += round(wanted.get(at.name, 0.0) / _elements(at) * _bytes(at))
    return read, sum(_written(body, result) for result in results)


def _demand(at: Instruction, index: int, operand: Instruction, need: float) -> tuple[float, bool]:
    """Elements of an operand that ``need`` elements of a result take, and whether they are a part of its own."""
    size = float(_elements(operand))
    if at.opcode in _SLICES:
        return (min(size, need), True) if index == 0 else (size, False)
    if at.opcode in ("dynamic-update-slice", "scatter") and index == 0:
        return 0.0, False  # in place: what is not written is not touched
    if at.opcode == "reduce":
        return size * need / max(1.0, float(_elements(at))), False
    if at.opcode in ("concatenate", "pad", "dot", "custom-call", "sort", "scatter", "dynamic-update-slice"):
        return size, False
    return min(size, need), False  # element by element, reordered or repeated


def _through(body: dict[str, Instruction], name: str) -> Instruction:
    while body[name].opcode in ("bitcast",):
        name = body[name].operands[0]
    return body[name]


def _written(body: dict[str, Instruction], result: Instruction) -> int:
    result = _through(body, result.name)
    if result.opcode == "dynamic-update-slice":
        return _bytes(body[result.operands[1]])
    if result.opcode == "scatter":
        return _bytes(body[result.operands[-1]])
    return _bytes(result)
