"""What is counted of an optimised HLO module is what its kernels read and write."""

from benchmarks.gpu.hlo_traffic import Launch, Reader

HLO = """HloModule jit_f

%halves (p0: bf16[64,8], p1: f32[64]) -> bf16[64,2] {
  %p0 = bf16[64,8]{1,0} parameter(0)
  %p1 = f32[64]{0} parameter(1)
  %slice.1 = bf16[64,2]{1,0} slice(%p0), slice={[0:64], [0:2]}
  %slice.2 = bf16[64,2]{1,0} slice(%p0), slice={[0:64], [2:4]}
  %broadcast.1 = bf16[64,2]{1,0} broadcast(%p1), dimensions={0}
  %add.1 = bf16[64,2]{1,0} add(%slice.1, %slice.2)
  ROOT %multiply.1 = bf16[64,2]{1,0} multiply(%add.1, %broadcast.1)
}

%update (p2: bf16[64,8], p3: bf16[1,8], p4: s32[]) -> bf16[64,8] {
  %p2 = bf16[64,8]{1,0} parameter(0)
  %p3 = bf16[1,8]{1,0} parameter(1)
  %p4 = s32[] parameter(2)
  ROOT %dus.1 = bf16[64,8]{1,0} dynamic-update-slice(%p2, %p3, %p4, %p4)
}

%test (p5: s32[]) -> pred[] {
  %p5 = s32[] parameter(0)
  %constant.1 = s32[] constant(4)
  %constant.2 = s32[] constant(0)
  %and.1 = s32[] and(%p5, %constant.1)
  ROOT %compare.1 = pred[] compare(%and.1, %constant.2), direction=NE
}

%yes (arg.1: (bf16[64,8])) -> (bf16[64,8]) {
  %arg.1 = (bf16[64,8]{1,0}) parameter(0)
  %gte.1 = bf16[64,8]{1,0} get-tuple-element(%arg.1), index=0
  %copy.1 = bf16[64,8]{1,0} copy(%gte.1)
  ROOT %tuple.1 = (bf16[64,8]{1,0}) tuple(%copy.1)
}

%no (arg.2: (bf16[64,8])) -> (bf16[64,8]) {
  ROOT %arg.2 = (bf16[64,8]{1,0}) parameter(0)
}

ENTRY %main (x.1: bf16[64,8], scale.1: f32[64], new.1: bf16[1,8], flags.1: s32[]) -> bf16[64,2] {
  %x.1 = bf16[64,8]{1,0} parameter(0)
  %scale.1 = f32[64]{0} parameter(1)
  %new.1 = bf16[1,8]{1,0} parameter(2)
  %flags.1 = s32[] parameter(3)
  %fusion.1 = bf16[64,8]{1,0} fusion(%x.1, %new.1, %flags.1), kind=kLoop, calls=%update
  %fusion.2 = pred[] fusion(%flags.1), kind=kLoop, calls=%test
  %tuple.2 = (bf16[64,8]{1,0}) tuple(%fusion.1)
  %cond.1 = (bf16[64,8]{1,0}) conditional(%fusion.2, %tuple.2, %tuple.2), true_computation=%yes, false_computation=%no
  %gte.2 = bf16[64,8]{1,0} get-tuple-element(%cond.1), index=0
  ROOT %fusion.3 = bf16[64,2]{1,0} fusion(%gte.2, %scale.1), kind=kLoop, calls=%halves
}
"""
UPDATE, TEST = Launch("fusion.1", 16 + 4, 16), Launch("fusion.2", 4, 1)


def test_slices_and_updates_in_place_count_by_what_they_touch() -> None:
    assert Reader(HLO).traffic().launches == (UPDATE, TEST, Launch("fusion.3", 512 + 256, 256))


def test_flags_choose_branches_and_weights_do_not_count() -> None:
    found = Reader(HLO, flags=12, weights=("scale",)).traffic()
    assert found.launches == (UPDATE, TEST, Launch("copy.1", 1024, 1024), Launch("fusion.3", 512, 256))
    assert Reader(HLO, flags=3).traffic().launches[2].name == "fusion.3"


def test_loops_count_their_trips_and_the_last_look_at_their_condition() -> None:
    text = """HloModule jit_g

%body (c.1: f32[8]) -> f32[8] {
  %c.1 = f32[8]{0} parameter(0)
  ROOT %negate.1 = f32[8]{0} negate(%c.1)
}

%condition (c.2: f32[8]) -> pred[] {
  %c.2 = f32[8]{0} parameter(0)
  ROOT %custom.1 = pred[] compare(%c.2, %c.2), direction=LT
}

ENTRY %main (c.3: f32[8]) -> f32[8] {
  %c.3 = f32[8]{0} parameter(0)
  ROOT %while.1 = f32[8]{0} while(%c.3), condition=%condition, body=%body
}
"""
    launches = Reader(text, trips=(3,)).traffic().launches
    assert [launch.name for launch in launches] == ["negate.1", "custom.1"] * 3 + ["custom.1"]
