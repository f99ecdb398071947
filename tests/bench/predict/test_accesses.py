"""Tensors of loads and stores, read from Triton's IR."""

from __future__ import annotations

from predict.accesses import pointer_arguments, tensors_by_line

TTIR = """
#loc = loc("/k/kernel.py":5:0)
#loc1 = loc("x_ptr"(#loc))
#loc2 = loc("A_ptrs"(#loc))
#loc7 = loc("/k/kernel.py":20:4)
#loc8 = loc("/k/helper.py":9:4)
#loc9 = loc("/k/kernel.py":31:4)
#loc10 = loc("b_a"(#loc8))
#loc11 = loc(callsite(#loc10 at #loc9))
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), \
%A_ptrs: !tt.ptr<bf16> loc("A_ptrs"(#loc)), %A_ptrs_0: !tt.ptr<bf16> loc("A_ptrs"(#loc)), %d: i32 loc("d"(#loc))) {
    %0 = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#loc7)
    %1 = tt.addptr %0, %offsets : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc7)
    %b_x = tt.load %1, %mask : tensor<64x!tt.ptr<bf16>> loc(#loc7)
    %2 = tt.addptr %A_ptrs_0, %d : !tt.ptr<bf16>, i32 loc(#loc11)
    %3:2 = scf.for %i = %a to %b step %c iter_args(%moving = %2, %sum = %zero) -> (!tt.ptr<bf16>, f32) {
      %b_a = tt.load %moving : !tt.ptr<bf16> loc(#loc11)
      tt.store %1, %b_x, %mask : tensor<64x!tt.ptr<bf16>> loc(#loc9)
    }
  }
}
"""


def test_arguments_of_a_tuple_are_numbered():
    assert pointer_arguments(TTIR) == {"%x_ptr": "x_ptr", "%A_ptrs": "A_ptrs_0", "%A_ptrs_0": "A_ptrs_1"}


def test_accesses_are_traced_to_arguments():
    """Through offsets, through what a loop carries, and at the line of an inlined function."""
    assert tensors_by_line(TTIR) == {
        ("/k/kernel.py", 20, False): {"x_ptr"},
        ("/k/helper.py", 9, False): {"A_ptrs_1"},
        ("/k/kernel.py", 31, True): {"x_ptr"},
    }
