"""Reads what Mosaic GPU writes for each kernel that it compiles (``MOSAIC_GPU_DUMP_TO``): PTX, ptxas, resources."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# What is counted, by the beginning of the opcode; the first that fits.
INSTRUCTIONS = (
    "wgmma.mma_async",
    "tcgen05.mma",
    "mma.sync",
    "ldmatrix",
    "stmatrix",
    "cp.async.bulk.tensor",
    "cp.async.bulk.commit_group",
    "cp.async.bulk.wait_group",
    "cp.async.bulk",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "cp.async.wait_all",
    "cp.async",
    "bar.sync",
    "barrier",
    "bar.warp.sync",
    "mbarrier.try_wait",
    "mbarrier.arrive",
    "fence",
    "setmaxnreg",
    "shfl.sync",
    "ld.global",
    "st.global",
    "ld.shared",
    "st.shared",
    "ld.local",
    "st.local",
    "ex2",
    "tanh",
    "div",
    "atom",
    "red",
)
# A statement begins a line, or follows another one within inline assembly.
_OPCODE = re.compile(
    r"(?:^|[;{])\s*(?:@!?%?\w+\s+)?([a-z][a-z0-9_]*(?:(?:\.|::)[a-zA-Z0-9_]+)+)(?=[\s;])", re.MULTILINE
)


@dataclass(frozen=True)
class KernelReport:
    """One kernel as compiled.

    Attributes:
      name: of the entry function.
      threads: of a block.
      registers: of a thread.
      spill_stores, spill_loads, stack: bytes of local memory of a thread.
      static_smem, dynamic_smem: bytes of shared memory of a block; dynamic is what the launch asks for.
      instructions: how often each of ``INSTRUCTIONS`` stands in the PTX, and ``all`` of them.
      notes: what ptxas said beyond its numbers: warnings and performance advice.
    """

    name: str
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_smem: int
    dynamic_smem: int
    instructions: dict[str, int]
    notes: list[str]


def read_kernels(folder: Path) -> list[KernelReport]:
    """Every kernel whose compilation wrote into ``folder``, in the order of the files' names."""
    return [read_kernel(path) for path in sorted(folder.glob("*.ptx"))]


def read_kernel(path: Path) -> KernelReport:
    """The kernel of a ``.ptx`` file and of the files beside it."""
    ptx = path.read_text(encoding="utf-8", errors="replace")
    said = path.with_suffix(".ptxas").read_text(encoding="utf-8", errors="replace")
    module = _module_of(path).read_text(encoding="utf-8", errors="replace")
    entry = _found(r"\.entry\s+(\S+?)\(", ptx, path)
    return KernelReport(
        name=entry,
        threads=math.prod(int(n) for n in _found(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", ptx, path).split(",")),
        registers=int(_found(r"Used (\d+) registers", said, path)),
        spill_stores=_largest(r"(\d+) bytes spill stores", said),
        spill_loads=_largest(r"(\d+) bytes spill loads", said),
        stack=_largest(r"(\d+) bytes stack frame", said),
        static_smem=_largest(r"(\d+) bytes smem", said),
        dynamic_smem=dynamic_smem(module),
        instructions=count_instructions(ptx),
        notes=notes_of(said),
    )


def _module_of(path: Path) -> Path:
    """The module that a ``.ptx`` file was made of: numbered in the order of tracing, and not of compilation."""
    suffix = ".before_layout_inference.txt"
    same_name = list(path.parent.glob(f"{path.stem.rpartition('_')[0]}_*{suffix}"))
    return same_name[0] if len(same_name) == 1 else path.with_suffix(suffix)


def count_instructions(ptx: str) -> dict[str, int]:
    """How often each of ``INSTRUCTIONS`` stands in a PTX text, inline assembly included."""
    counts: Counter[str] = Counter()
    for match in _OPCODE.finditer(ptx):
        counts["all"] += 1
        name = next((i for i in INSTRUCTIONS if match[1] == i or match[1].startswith(i + ".")), None)
        if name is not None:
            counts[name] += 1
    return dict(counts)


def dynamic_smem(module: str) -> int:
    """Bytes of dynamic shared memory of the launch in a Mosaic GPU module."""
    operand = re.search(r"dynamic_shared_memory_size (%\S+)", module)
    if operand is None:
        return 0
    value = re.search(rf"{re.escape(operand[1])} = arith\.constant (\d+) : i32", module)
    assert value is not None, f"{operand[1]} is no constant"
    return int(value[1])


def notes_of(said: str) -> list[str]:
    """Lines of ptxas that are no plain numbers: warnings, ignored directives, serialised wgmma."""
    marks = re.compile(r"warning|error|ignored|Performance Loss|\(C\d+\)", re.IGNORECASE)
    return [line.strip() for line in said.splitlines() if marks.search(line)]


def _found(pattern: str, text: str, path: Path) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{path.name}: nothing like {pattern}")
    return match[1]


def _largest(pattern: str, text: str) -> int:
    return max((int(n) for n in re.findall(pattern, text)), default=0)
