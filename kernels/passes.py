"""The four passes, with the names, arguments and results of `smolora.engine.torch_passes`.

Tensors are contiguous CUDA tensors; x, g and the base in float32, float16 or bfloat16, parameters in any floating
dtype. Under `TRITON_INTERPRET=1` they are CPU tensors, of float32 or float16.
"""

from .fuse_expand import fuse_expand
from .grad_input import grad_input
from .grad_output import grad_output
from .route_shrink import route_shrink

__all__ = ["fuse_expand", "grad_input", "grad_output", "route_shrink"]
