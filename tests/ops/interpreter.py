"""Triton's interpreter as its GPU compiler has it, and at twice the speed."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float, _create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
_prepared = set()  # helpers


def repair():
    """What the kernels' tests need of it; the pinned release's insides, so these lines go when it does better."""
    interpreter._convert_float = _round_to_even
    interpreter.InterpreterBuilder.create_dot = _dot_in_float32
    interpreter.InterpretedFunction.__call__ = _call


def _round_to_even(values, source, target, mode):
    """It cuts float32 off to bfloat16."""
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
    return _convert_float(values, source, target, mode)


def _dot_in_float32(builder, a, b, *rest):
    """It multiplies bfloat16 as the integers that stand for it."""
    a, b = (builder.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _create_dot(builder, a, b, *rest)


def _call(function, *args, **kwargs):
    """It prepares triton.language anew at each call of a helper, for 2 ms, and never undoes it: once is enough."""
    if function.fn not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn)
    return function.rewrite()(*args, **kwargs)
