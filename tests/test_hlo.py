"""Compiled programs read off their text: loops, products, convolutions and collectives."""

import pytest

from hope_jax.train.work import work

PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.1 (p.0: f32[4,8], p.1: f32[8,8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[8,8]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0:T(8,128)} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner (s.1: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %s.1 = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x.1 = f32[4,8]{1,0} get-tuple-element(%s.1), index=1
  %w.1 = f32[8,8]{1,0} get-tuple-element(%s.1), index=2
  %y.1 = f32[4,8]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%fused_computation.1
  %r.1 = f32[4,8]{1,0} all-reduce(%y.1), replica_groups={{0,1}}, to_apply=%add
  ROOT %t.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%i.1, %r.1, %w.1)
}

%always (s.2: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %s.2 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%outer (s.3: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %s.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%s.3), condition=%always, body=%inner, KNOWN
}

%small (p.2: f32[8,8]) -> f32[8,8] {
  ROOT %p.2 = f32[8,8]{1,0} parameter(0)
}

%large (p.3: f32[8,8]) -> f32[8,8] {
  %p.3 = f32[8,8]{1,0} parameter(0)
  ROOT %dot.2 = f32[8,8]{1,0} dot(f32[8,8]{1,0:T(8,128)} %p.3, f32[8,8]{1,0} %p.3), lhs_contracting_dims={1}
}

ENTRY %main.9 (x: f32[4,8], w: f32[8,8], n: s32[]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%n, %x, %w)
  %while.2 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%start), condition=%always, body=%outer, THREE
  %chosen = f32[8,8]{1,0} conditional(%n, %w, %w), branch_computations={%small, %large}
  %g.1 = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%half), dimensions={0}
  %half = bf16[2,8]{1,0} convert(%x)
  %g.2 = bf16[4,8]{1,0} all-gather-done(%g.1)
  %k = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %m = f32[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %end = f32[4,8]{1,0} get-tuple-element(%while.2), index=1
}
"""
PROGRAM = PROGRAM.replace("THREE", 'backend_config={"known_trip_count":{"n":"3"},"a":"{}"}')
ROUND, LARGE = 2 * 4 * 8 * 8, 2 * 8 * 8 * 8


def test_nested_loops_count_as_often_as_they_run_and_of_branches_the_larger():
    found = work(PROGRAM.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}'))
    assert found.flops == 3 * 5 * ROUND + LARGE
    assert found.collectives == {"all-reduce": 15, "all-gather": 1}
    assert found.sent == {"all-reduce": 15 * 4 * 8 * 4, "all-gather": 2 * 8 * 2}
    assert found.looped == found.nested == {"all-reduce": 15}
    assert found.calls == {"tpu_custom_call": 1} and (found.unknown, found.rounds) == (0, 3 + 3 * 5)
    assert found.launches == 3 * 5 * 2 + 4  # fusion and sum; product of a branch, gather, conversion, kernel
    once = 3 * 4 * 8 * 8 + (2 * 8 * 2 + 4 * 8 * 2) + (4 * 8 * 4 + 2 * 8 * 2) + 2 * 4 * 8 * 4
    assert found.moved == 3 * 5 * (2 * 4 * 8 * 4 + 4 * 8 * 8 + 2 * 4 * 8 * 4) + once


OF_A_TPU = """HloModule exchanges

%fused_computation.1 (p.0: bf16[2,8]) -> (bf16[2,8], bf16[4,8]) {
  %p.0 = bf16[2,8]{1,0} parameter(0)
  %g.0 = bf16[4,8]{1,0} all-gather(%p.0), channel_id=7, dimensions={0}
  ROOT %c.0 = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.1: bf16[2,8], p.2: f32[4,8], p.3: f32[8,8]) -> f32[4,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  %p.2 = f32[4,8]{1,0} parameter(1)
  %p.3 = f32[8,8]{1,0} parameter(2)
  %g.1 = bf16[4,8]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
  ROOT %dot.1 = f32[4,8]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_computation.3 (p.4: bf16[2,8]) -> bf16[4,8] {
  %p.4 = bf16[2,8]{1,0} parameter(0)
  %g.2 = bf16[4,8]{1,0} all-gather(%p.4), channel_id=7, dimensions={0}
  ROOT %c.1 = bf16[4,8]{1,0} custom-call(%p.4, %g.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.4.clone.1 (p.5: f32[4,8]) -> f32[2,8] {
  %p.5 = f32[4,8]{1,0} parameter(0)
  %r.0 = f32[4,8]{1,0} all-reduce(%p.5), channel_id=8, to_apply=%add
  ROOT %s.0 = f32[2,8]{1,0} slice(%r.0), slice={[0:2], [0:8]}
}

ENTRY %main (a: bf16[2,8], b: f32[4,8], w: f32[8,8]) -> f32[2,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %w = f32[8,8]{1,0} parameter(2)
  %begun = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) fusion(%a), kind=kLoop, calls=%fused_computation.1
  %beside = f32[4,8]{1,0} fusion(%a, %b, %w), kind=kOutput, calls=%async_collective_fusion.2
  %done = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation.3
  ROOT %mine = f32[2,8]{1,0} fusion(%beside), kind=kCustom, calls=%all-reduce-scatter.4.clone.1
}
"""


def test_what_a_tpu_gathers_beside_other_work_counts_once_and_a_part_of_a_sum_is_a_reduce_scatter():
    found = work(OF_A_TPU)
    assert found.collectives == {"all-gather": 1, "reduce-scatter": 1} and found.flops == ROUND
    assert found.sent == {"all-gather": 2 * 8 * 2, "reduce-scatter": 4 * 8 * 4} and not found.calls


PARTS = """HloModule parts

%fused (p.0: f32[99,8], p.1: f32[1,8], p.2: f32[99,8], p.3: s32[]) -> (f32[99,8], f32[1,8]) {
  %p.0 = f32[99,8]{1,0} parameter(0)
  %p.1 = f32[1,8]{1,0} parameter(1)
  %p.2 = f32[99,8]{1,0} parameter(2)
  %p.3 = s32[] parameter(3)
  %flat = f32[99,8]{1,0} bitcast(%p.2)
  %part = f32[1,8]{1,0} dynamic-slice(%flat, %p.3, %p.3), dynamic_slice_sizes={1,8}
  %new = f32[1,8]{1,0} add(%part, %p.1)
  %changed = f32[99,8]{1,0} dynamic-update-slice(%p.0, %new, %p.3, %p.3)
  ROOT %both = (f32[99,8]{1,0}, f32[1,8]{1,0}) tuple(%changed, %new)
}

ENTRY %main (a: f32[99,8], b: f32[1,8], c: f32[99,8], i: s32[]) -> (f32[99,8], f32[1,8]) {
  %a = f32[99,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %c = f32[99,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %next = s32[] add(%i, %i)
  %row = f32[1,8]{1,0} dynamic-slice(%c, %next, %i), dynamic_slice_sizes={1,8}
  %put = f32[99,8]{1,0} dynamic-update-slice(%a, %row, %i, %i)
  ROOT %f = (f32[99,8]{1,0}, f32[1,8]{1,0}) fusion(%put, %b, %c, %next), kind=kLoop, calls=%fused
}
"""


def test_of_arrays_in_parts_the_parts_are_moved():
    row, number = 8 * 4, 4
    found = work(PARTS)
    assert (found.launches, found.moved) == (3, 2 * row + 2 * row + (2 * row + 2 * row + number))
    converted = PARTS.replace("tuple(%changed, %new)", "tuple(%changed, %half)").replace(
        "  ROOT %both", "  %half = bf16[1,8]{1,0} convert(%new)\n  ROOT %both"
    )
    assert work(converted).moved == found.moved - row // 2


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    found = work(PROGRAM.replace(", KNOWN", ""))
    assert found.flops == 3 * ROUND + LARGE and found.unknown == 1
    assert found.nested == {"all-reduce": 3}


COUNTED = """%body (s.1: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %s.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %x.1 = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%s.1), index=1
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  %two = s32[]{:T(128)} constant(2)
  %y.1 = f32[8,8]{1,0:T(8,128)} convolution(%x.1, %x.1), dim_labels=bf_io->bf
  %i.2 = s32[]{:T(128)} add(%i.1, %two), metadata={op_name="jit(f)/while/body/add"}
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%i.2, %y.1, %n.1)
}

%test (s.2: (s32[], f32[8,8], s32[])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %seven = s32[]{:T(128)} constant(7)
  %n.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.3, LIMIT), direction=LT
}

ENTRY %main (x: f32[8,8], n: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%zero)
  %five = s32[]{:T(128)} constant(5)
  %start = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) tuple(%copy.1, %x, GIVEN)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)}) while(%start), condition=%test, body=%body
  ROOT %end = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("limit, given, count", [("%seven", "%n", 4), ("%n.2", "%five", 3), ("%n.2", "%n", None)])
def test_a_loop_without_a_note_is_counted_by_its_counter(limit, given, count):
    """From 0 in steps of 2 below a limit that stands in the test, is handed to the loop, or is not known."""
    found = work(COUNTED.replace("LIMIT", limit).replace("GIVEN", given))
    assert (found.flops, found.unknown, found.rounds) == ((count or 1) * LARGE, int(count is None), count or 1)


def test_the_counter_of_another_loop_is_not_taken_for_that_of_a_loop():
    inner = "%seven = s32[]{:T(128)} constant(7)"
    pair = "%pair = (s32[], s32[]) tuple(%seven, %seven)\n  %n.3 = s32[]{:T(128)} get-tuple-element(%pair), index=0"
    program = COUNTED.replace(inner, f"{inner}\n  {pair}").replace("LIMIT", "%seven").replace("GIVEN", "%n")
    assert work(program.replace("compare(%i.3", "compare(%n.3")).unknown == 1


def convolution(attributes, left, right, result):
    """A program with one convolution."""
    return f"""ENTRY %main (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %c = f32[{result}] convolution(%a, %b), {attributes}
}}
"""


# A product as a TPU has it; 3 of them with dilation, where a third of the taps meet entries; 3 taps with padding.
CONVOLUTIONS = {
    "product": ("dim_labels=bf_io->bf", "4,8", "8,16", "4,16", 2 * 4 * 8 * 16),
    "products": (
        "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
        *("3,4,8", "3,8,16", "3,4,16", 3 * 2 * 4 * 8 * 16),
    ),
    "padded": ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "1,10,1", "3,1,1", "1,10,1", 2 * (3 * 10 - 2)),
    "cut": ("window={size=3 pad=-2_0 rhs_reversal=1}, dim_labels=b0f_0io->b0f", "1,10,1", "3,1,1", "1,6,1", 2 * 3 * 6),
    "groups": ("window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=4", "2,5,8", "1,2,8", "2,5,8", 2 * 160),
}


@pytest.mark.parametrize("attributes, left, right, result, flops", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_counts_what_meets_entries(attributes, left, right, result, flops):
    assert work(convolution(attributes, left, right, result)).flops == flops


GPU = """HloModule jit_f, is_scheduled=true, frontend_attributes={fingerprint_before_lhs="a1"}

%fused_add (p.0: f32[8,8]) -> f32[8,8] {
  %p.0 = f32[8,8]{1,0} parameter(0)
  ROOT %add.1 = f32[8,8]{1,0} add(%p.0, %p.0), metadata={op_name="jit(f)/while/body/add" stack_frame_id=3}
}

%gemm_fusion_dot.3 (p.1: f32[8,8], p.2: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0} parameter(0)
  %p.2 = f32[8,8]{1,0} parameter(1)
  ROOT %dot.4 = f32[8,8]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, algorithm=dot_bf16_bf16_f32
}

%command_buffer (p.3: f32[8,8]) -> f32[8,8] {
  %p.3 = f32[8,8]{1,0} parameter(0)
  %loop_add_fusion = f32[8,8]{1,0} fusion(%p.3), kind=kLoop, calls=%fused_add
  %gemm.1 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%loop_add_fusion, %p.3), custom_call_target="__cublas$gemm", CONFIG
  %get-tuple-element.1 = f32[8,8]{1,0} get-tuple-element(%gemm.1), index=0
  ROOT %gemm_fusion_dot.3 = f32[8,8]{1,0} fusion(%get-tuple-element.1, %p.3), kind=kCustom, calls=%gemm_fusion_dot.3
}

%body (s.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x.1 = f32[8,8]{1,0} get-tuple-element(%s.1), index=1
  %call = f32[8,8]{1,0} call(%x.1), to_apply=%command_buffer
  ROOT %t.1 = (s32[], /*index=1*/f32[8,8]{1,0}) tuple(%i.1, %call)
}

%less (s.2: (s32[], f32[8,8])) -> pred[] {
  %s.2 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %wrapped_compare = pred[] fusion(%s.2), kind=kLoop, calls=%fused_add
}

ENTRY %main.9 (x: f32[8,8], n: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %start = (s32[], f32[8,8]{1,0}) tuple(%n, %x)
  %while.2 = (s32[], f32[8,8]{1,0}) while(%start), condition=%less, body=%body, TRIPS
  %out = f32[8,8]{1,0} get-tuple-element(%while.2), index=1
  %copy-start.1 = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]) copy-start(%out)
  ROOT %copy-done.1 = f32[8,8]{1,0} copy-done(%copy-start.1)
}
"""
GPU = GPU.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"4"}}')
CONFIG = 'backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_batch_dimensions":[]}}}'


def test_a_text_written_by_hand_like_those_for_gpus_is_read_too():
    """Graphs of commands are calls, and products are custom calls or fusions. No GPU has made this text."""
    found = work(GPU.replace("CONFIG", CONFIG))
    assert found.calls == {"__cublas$gemm": 4} and found.flops == 4 * 2 * 8**3
    assert (found.rounds, found.unknown, found.launches) == (4, 0, 4 * 3 + 1)
    square = 8 * 8 * 4
    assert found.moved == 4 * (2 * square + (3 * square + 64) + 3 * square) + 2 * square
