"""Compiles one case for one target and says what came out; runs in a process of its own.

What a process compiled is cached in it (a kernel that two programs share would leave its PTX with the first alone),
it can compile for one kind of GPU only, and LLVM aborts it where a kernel uses what the target lacks.
"""

import json
import os
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from jaxpaged.pallas_kernels import KVPool
from tests.gpu_compile import ptx
from tests.gpu_compile.case import CompileCase, Program, UnavailableError
from tests.gpu_compile.cases import find_case
from tests.gpu_compile.hlo import large_writes, products
from tests.gpu_compile.targets import compile_for

LOG = "log.txt"
REPORT = "report.json"


def compile_into(folder: str, target: str, case_name: str) -> None:
    """Compiles a case and writes ``report.json`` into ``folder``, beside what the compilers write there."""
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Both are read at each compilation.
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    started = time.perf_counter()
    try:
        report = _compiled(find_case(case_name), target, Path(folder))
    except UnavailableError as error:
        report = {"status": "unavailable", "message": str(error)}
    except Exception as error:
        # Ours name the implementation that refuses; one from inside jax is a failure like any other.
        if isinstance(error, NotImplementedError) and "implementation" in str(error):
            report = {"status": "refused", "message": str(error)}
        else:
            message = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            report = {"status": "error", "message": message}
    report["seconds"] = round(time.perf_counter() - started, 2)
    report["cpu_seconds"] = round(sum(os.times()[:4]), 2)
    (Path(folder) / REPORT).write_text(json.dumps(report), encoding="utf-8")


def _compiled(case: CompileCase, target: str, folder: Path) -> dict[str, Any]:
    program = case.build()
    compiled = compile_for(target, *program)
    memory = compiled.memory_analysis()
    pool_array = largest_pool_array(program)
    text = compiled.as_text() or ""
    (folder / "optimized_hlo.txt").write_text(text, encoding="utf-8")
    return {
        "status": "ok",
        "kernels": [asdict(kernel) for kernel in ptx.read_kernels(folder)],
        "memory": {
            "argument": memory.argument_size_in_bytes,
            "output": memory.output_size_in_bytes,
            "alias": memory.alias_size_in_bytes,
            "temp": memory.temp_size_in_bytes,
        },
        "donated": sum(_bytes(program.args[i]) for i in program.donate_argnums),
        "pool_array": pool_array,
        "pool_writes": large_writes(text, pool_array) if pool_array else [],
        "products": products(text),
    }


def largest_pool_array(program: Program) -> int:
    """Bytes of the keys' array of the pool among the arguments; 0 if there is none."""
    nodes = jax.tree.leaves(program.args, is_leaf=lambda node: isinstance(node, KVPool))
    return max((_bytes(node.k) for node in nodes if isinstance(node, KVPool)), default=0)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
