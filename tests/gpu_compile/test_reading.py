"""What is read from PTX, ptxas and HLO is what stands there; needs nothing installed."""

from itertools import combinations, product
from typing import Any

import pytest

from tests.gpu_compile import attention_cases, expectations
from tests.gpu_compile.case import Expects
from tests.gpu_compile.hlo import large_writes, shape_bytes
from tests.gpu_compile.pairwise import pairwise
from tests.gpu_compile.ptx import count_instructions, dynamic_smem, notes_of
from tests.gpu_compile.targets import TARGETS

PTX = """
.visible .entry body_kernel(
	.param .u64 .ptr .align 256 body_kernel_param_0
)
.maxntid 128, 1, 1
{
	.reg .pred 	%p<20>;
	ld.param::entry.b64 	%rd19, [body_kernel_param_4];
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r9];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r5}, {%r6}, {%f1};
	@!%p2 bar.sync 	0;
	{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%r1], %r2; @p bra.uni DONE; }
	cp.async.cg.shared.global [%r1], [%rd2], 16;
	cp.async.commit_group;
	// mma.sync in a comment does not count
	ret;
}
"""


def test_ptx_instructions_are_counted() -> None:
    counts = count_instructions(PTX)
    names = ("cp.async.bulk.tensor", "ldmatrix", "mma.sync", "bar.sync", "mbarrier.try_wait", "cp.async")
    assert {name: counts.get(name) for name in names} == dict.fromkeys(names, 1)
    assert counts["cp.async.commit_group"] == 1
    assert counts["all"] == 9


def test_dynamic_shared_memory_is_that_of_the_launch() -> None:
    launch = "%94 = gpu.launch async [%4] blocks(%a) dynamic_shared_memory_size %c69664_i32 {"
    assert (
        dynamic_smem(f"%c7_i32 = arith.constant 7 : i32\n%c69664_i32 = arith.constant 69664 : i32\n{launch}")
        == 69664
    )
    assert dynamic_smem("gpu.launch blocks(%a)") == 0


def test_what_ptxas_warns_of_is_noted() -> None:
    plain = "ptxas info    : Used 139 registers, used 2 barriers, 1 bytes smem\n"
    warnings = [
        "ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirement",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    ]
    assert notes_of(plain) == []
    assert notes_of(plain + "\n".join(warnings)) == warnings


HLO = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%updates (p0: bf16[64,4], p1: bf16[1,4], p2: s32[]) -> bf16[64,4] {
  %p0 = bf16[64,4]{1,0} parameter(0)
  %p1 = bf16[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %dus.1 = bf16[64,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2), metadata={op_name="x"}
}

ENTRY %main.5 (pool.1: bf16[64,4], new.1: bf16[1,4], at.1: s32[]) -> (bf16[64,4], s32[]) {
  %pool.1 = bf16[64,4]{1,0} parameter(0)
  %new.1 = bf16[1,4]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %small = bf16[1,4]{1,0} copy(%new.1)
  %fusion.1 = bf16[64,4]{1,0} fusion(%pool.1, %small, %at.1), kind=kLoop, calls=%updates
  %call.1 = (bf16[64,4]{1,0}) custom-call(%fusion.1), custom_call_target="k", output_to_operand_aliasing={{0}: (0, {})}
  ROOT %tuple = (bf16[64,4]{1,0}, s32[]) tuple(%fusion.1, %at.1)
}
"""
LAST = "  ROOT %tuple"
TRANSPOSED = """
%copies (p3: bf16[64,4]) -> bf16[4,64] {
  %p3 = bf16[64,4]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[4,64]{1,0} transpose(%p3), dimensions={1,0}
}

"""


def test_updates_in_place_are_no_writes_of_the_pool() -> None:
    assert large_writes(HLO, 512) == []
    assert large_writes(HLO, 8) == ["copy small bf16[1,4]{1,0}"]


@pytest.mark.parametrize(
    "line",
    [
        "%copy.9 = bf16[64,4]{1,0} copy(%fusion.1)",
        "%start.9 = (bf16[64,4]{1,0}, bf16[64,4]{1,0}, u32[]) copy-start(%fusion.1)",
        "%fusion.9 = bf16[4,64]{1,0} fusion(%pool.1), kind=kInput, calls=%copies",
        '%call.9 = bf16[64,4]{1,0} custom-call(%pool.1), custom_call_target="k"',
        "%gather.9 = f32[16,8]{1,0} gather(%pool.1, %at.1), offset_dims={0}",
    ],
)
def test_new_arrays_of_the_size_of_the_pool_are_found(line: str) -> None:
    text = HLO.replace(LAST, f"  {line}\n{LAST}")
    if "calls=%copies" in line:
        text = text.replace("ENTRY", f"{TRANSPOSED}ENTRY")
    assert len(large_writes(text, 512)) == 1


def test_sizes_of_arrays() -> None:
    assert [shape_bytes(*s) for s in (("bf16", "2,3"), ("pred", "5"), ("f8e4m3fn", "4"), ("s32", ""))] == [
        12,
        5,
        4,
        4,
    ]


def test_every_two_values_meet() -> None:
    axes: dict[str, Any] = attention_cases.AXES
    chosen = pairwise(axes)
    assert chosen[0] == {name: values[0] for name, values in axes.items()}
    for a, b in combinations(axes, 2):
        assert {(row[a], row[b]) for row in chosen} == set(product(axes[a], axes[b]))
    assert len(chosen) <= 36


KERNEL: dict[str, Any] = {
    "name": "k", "threads": 384, "registers": 168, "spill_stores": 0, "spill_loads": 0, "stack": 0,
    "static_smem": 0, "dynamic_smem": 232448, "instructions": {"wgmma.mma_async": 4}, "notes": [],
}  # fmt: skip


def test_a_kernel_that_fills_a_multiprocessor_is_fine() -> None:
    assert expectations.kernel_problems(KERNEL, TARGETS["h200"]) == []
    assert expectations.blocks_per_sm(KERNEL, TARGETS["h200"]) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"spill_loads": 4}, "spills"),
        ({"stack": 8}, "stack frame"),
        ({"static_smem": 1}, "232449 bytes of shared memory"),
        ({"registers": 171}, "171 registers"),
        ({"notes": ["ptxas warning : setmaxnreg ignored"]}, "setmaxnreg ignored"),
    ],
)
def test_a_kernel_beyond_its_means_is_found(change: dict[str, Any], found: str) -> None:
    problems = expectations.kernel_problems(KERNEL | change, TARGETS["h200"])
    assert len(problems) == 1
    assert found in problems[0]


def test_refusals_count_where_they_are_not_foreseen() -> None:
    report = {"status": "refused", "message": "head_dim=80"}
    target = TARGETS["h200"]
    assert expectations.problems(report, Expects(), target, may_refuse=True) == []
    assert expectations.problems(report, Expects(), target, may_refuse=False) == ["refused: head_dim=80"]
