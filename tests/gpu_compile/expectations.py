"""Holds a report against what its case expects."""

from typing import Any

from tests.gpu_compile.case import Expects
from tests.gpu_compile.targets import RESERVED_SMEM, Target

REGISTERS_PER_SM = 65536


def problems(report: dict[str, Any], expects: Expects, target: Target, *, may_refuse: bool) -> list[str]:
    """What is wrong with a report, in words; nothing if all is as expected, or if there is nothing to judge."""
    status = report["status"]
    if status == "unavailable" or (status == "refused" and may_refuse):
        return []
    if status != "ok":
        return [f"{status}: {report['message']}"]
    return [
        *(problem for kernel in report["kernels"] for problem in kernel_problems(kernel, target)),
        *_instruction_problems(report, expects, target),
        *_memory_problems(report, expects),
    ]


def kernel_problems(kernel: dict[str, Any], target: Target) -> list[str]:
    """What no kernel may do on a target, whatever the case."""
    found = []
    if kernel["spill_stores"] or kernel["spill_loads"]:
        found.append(f"spills {kernel['spill_stores']} bytes of stores, {kernel['spill_loads']} of loads")
    if kernel["stack"]:
        found.append(f"has a stack frame of {kernel['stack']} bytes")
    smem = kernel["static_smem"] + kernel["dynamic_smem"]
    if smem > target.gpu.smem_bytes:
        found.append(f"takes {smem} bytes of shared memory, a block may have {target.gpu.smem_bytes}")
    if kernel["registers"] * kernel["threads"] > REGISTERS_PER_SM:
        found.append(f"takes {kernel['registers']} registers for each of {kernel['threads']} threads")
    found += [f"ptxas: {note}" for note in kernel["notes"]]
    return [f"kernel {kernel['name']} {problem}" for problem in found]


def blocks_per_sm(kernel: dict[str, Any], target: Target) -> int:
    """How many blocks of a kernel fit on a multiprocessor at a time: registers, shared memory, threads."""
    # Registers are given to warps in units of 256 (CUDA occupancy calculator).
    of_warp = -(-32 * kernel["registers"] // 256) * 256
    smem = kernel["static_smem"] + kernel["dynamic_smem"] + RESERVED_SMEM
    return min(
        REGISTERS_PER_SM // (of_warp * max(1, kernel["threads"] // 32)),
        target.smem_per_sm // smem,
        target.threads_per_sm // kernel["threads"],
    )


def _instruction_problems(report: dict[str, Any], expects: Expects, target: Target) -> list[str]:
    found = []
    kernels = report["kernels"]
    if len(kernels) < expects.min_kernels:
        found.append(f"{len(kernels)} Mosaic GPU kernels, expected {expects.min_kernels}")
    wanted = set(expects.instructions)
    if expects.has_async_copies:
        wanted.add("cp.async.bulk.tensor" if target.gpu.has_tma else "cp.async")
    present = {name for kernel in kernels for name in kernel["instructions"]}
    if missing := sorted(wanted - present):
        found.append(f"no {', '.join(missing)} in any kernel")
    return found


def _memory_problems(report: dict[str, Any], expects: Expects) -> list[str]:
    memory, found = report["memory"], []
    if expects.updates_in_place and memory["alias"] != report["donated"]:
        found.append(f"{memory['alias']} bytes are aliased, {report['donated']} were donated")
    limit = int(expects.max_temp_share * report["pool_array"])
    if report["pool_array"] and memory["temp"] > limit:
        found.append(f"{memory['temp']} bytes of temporaries, expected at most {limit}")
    found += [f"the size of the pool is written by: {write}" for write in report["pool_writes"]]
    return found
