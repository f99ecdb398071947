"""SMoLoRA's passes in Triton, with the names and arguments of `smolora.rank_space`.

Inputs are contiguous CUDA tensors of float32, float16 or bfloat16; under `TRITON_INTERPRET=1`, CPU tensors of float32
or float16. Kernel names: `i_` ids, `o_` offsets, `m_` masks, `p_` pointers, `b_` loaded blocks; `BT` and the like are
tile sizes, `n` instances, `T` tokens, `S` tokens of each instance when they are not packed.
"""

from triton.runtime.interpreter import InterpretedFunction

from .fuse_expand import fuse_expand, fuse_expand_kernel
from .grad_input import grad_input
from .grad_output import grad_output
from .route_shrink import route_shrink

INTERPRETED = isinstance(fuse_expand_kernel, InterpretedFunction)

__all__ = ["INTERPRETED", "fuse_expand", "grad_input", "grad_output", "route_shrink"]
