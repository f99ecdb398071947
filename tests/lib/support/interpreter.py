"""Triton's interpreter without the work that it repeats: the same results in a fraction of the time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any


def quicken() -> None:
    """Patch the interpreter, if there is Triton. The kernels' tests take almost four times as long without this.

    - The language is patched once a launch, and not again in every call of a device function: half of the time.
    - The condition that integers do not overflow is not computed, since only `debug` asserts it: a third of the rest.
    - Types are made once for each element and shape, and not for each result of an operation.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    core = tl.core
    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": core})
    interpreter._patch_lang = lambda fn: patch(both)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _once(interpreter._get_np_dtype, lambda dtype: dtype.scalar.name)
    _quicken_blocks(core)


def _once(function: Any, key: Any) -> Any:
    """A function of one argument that is called once for each key of it."""
    known: dict[Any, Any] = {}

    def call(argument: Any) -> Any:
        at = key(argument)
        if at not in known:
            known[at] = function(argument)
        return known[at]

    return call


def _quicken_blocks(core: Any) -> None:
    """A type of blocks takes over what an equal one has, and a tensor all but its handle from one of an equal type.

    The ids are of what is kept, so they are no other object's later.
    """
    make_block, make_tensor, blocks, tensors = core.block_type.__init__, core.tensor.__init__, {}, {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(getattr(size, "value", size) for size in getattr(shape, "value", shape)))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = (id(type.scalar), id(type.shape) if type.is_block() else None)
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(tensors[key], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
