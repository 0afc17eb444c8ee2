"""What is read from an optimised HLO module.

Writes of whole pools: copies that donation should have made unnecessary. Matrix products, and what is fused with
them: two programs in which they are equal get the same kernels for them.
"""

import hashlib
import math
import re
from dataclasses import dataclass

# Opcodes whose result is no new buffer, or the operand's own updated in place.
_IN_PLACE = frozenset(
    {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "optimization-barrier",
        "dynamic-update-slice",
        "scatter",
        "copy-done",
        "async-update",
        "async-done",
    }
)
_ITEM_BITS = re.compile(r"(?:pred|[a-z]+?)(\d*)(?:e\d\w*)?$")
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\d\w*)?)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: opcode, text of the result's type, and everything from the operands on."""

    name: str
    opcode: str
    type_text: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> str | None:
        """The computation of a fusion."""
        match = re.search(r"\bcalls=%?([\w.\-]+)", self.rest)
        return match[1] if match else None

    def largest_result(self) -> int:
        """Bytes of the largest array of the result."""
        return max((shape_bytes(*shape) for shape in _SHAPE.findall(self.type_text)), default=0)


def shape_bytes(dtype: str, extents: str) -> int:
    """Bytes of ``bf16[2,3]``, given as ``("bf16", "2,3")``."""
    match = _ITEM_BITS.match(dtype)
    bits = 8 if dtype == "pred" or match is None else int(match[1])
    return math.prod(int(extent) for extent in extents.split(",") if extent) * bits // 8


def read_computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Computations of a module by name, each with its instructions by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], {})
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, type_text, opcode, rest = found.groups()
            current[name] = Instruction(name, opcode, type_text, rest, root is not None)
    return computations


def large_writes(text: str, min_bytes: int) -> list[str]:
    """Instructions that write a new array of at least ``min_bytes``, as ``opcode name type``.

    ``min_bytes`` is the size of a pool array; what only passes a buffer on, or updates it in place, does not count.
    """
    computations = read_computations(text)
    fused = {i.called for c in computations.values() for i in c.values() if i.opcode == "fusion"}
    found = []
    for name, computation in computations.items():
        if name in fused:
            continue
        for instruction in computation.values():
            if instruction.largest_result() >= min_bytes and not _is_in_place(instruction, computations):
                found.append(f"{instruction.opcode} {instruction.name} {instruction.type_text}")
    return found


def products(text: str) -> list[str]:
    """A digest of every matrix product that differs from the others, with what it is fused with and its tile sizes.

    The digests of two programs can be compared: names and origins of instructions are left out.
    """
    computations = read_computations(text)
    found = set()
    for computation in computations.values():
        for instruction in computation.values():
            body = computations.get(instruction.called or "", {})
            fused = instruction.opcode == "fusion" and any(i.opcode == "dot" for i in body.values())
            if fused or (instruction.opcode == "custom-call" and "cublas" in instruction.rest):
                found.add(_digest([instruction, *body.values()]))
    return sorted(found)


def _digest(instructions: list[Instruction]) -> str:
    names: dict[str, str] = {}
    lines = []
    for i in instructions:
        rest = re.sub(r",? ?(metadata|frontend_attributes)=\{[^}]*\}", "", i.rest)
        text = f"%{i.name} = {i.type_text} {i.opcode}({rest}"
        lines.append(re.sub(r"%[\w.\-]+", lambda found: names.setdefault(found[0], f"%{len(names)}"), text))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_in_place(instruction: Instruction, computations: dict[str, dict[str, Instruction]]) -> bool:
    if instruction.opcode == "fusion":
        body = computations.get(instruction.called or "", {})
        roots = [i for i in body.values() if i.is_root]
        return bool(roots) and _root_is_in_place(roots[0], body)
    return instruction.opcode in _IN_PLACE or _is_aliased_call(instruction)


def _root_is_in_place(root: Instruction, body: dict[str, Instruction]) -> bool:
    """Whether a fusion's result is an update in place, seen through what only passes buffers on."""
    if root.opcode in ("bitcast", "tuple", "get-tuple-element"):
        return all(_root_is_in_place(body[name], body) for name in root.operands if name in body)
    return root.opcode in ("dynamic-update-slice", "scatter") or _is_aliased_call(root)


def _is_aliased_call(instruction: Instruction) -> bool:
    """Whether it is a kernel that writes into its operands; XLA wraps one whose operands are slices in a fusion."""
    return instruction.opcode == "custom-call" and "output_to_operand_aliasing" in instruction.rest
