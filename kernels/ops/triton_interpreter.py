"""TRITON_INTERPRET=1: Triton's interpreter runs the kernels on a CPU, in numpy, for debugging and for tests. What it gets wrong is cured here.

Its bf16 operands of tl.dot are multiplied as bit patterns, its fp32 -> bf16 conversion truncates where hardware rounds to even, a
comparison of scalar floats is typed as a float, which breaks when it is broadcast as a mask, and numpy warns of every overflow
to inf, which is what kernels mean. `Launch` cures it before the first interpreted kernel; a process that compiles is left alone.
"""
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


def interprets(kernel: Any) -> bool:
    """Whether this kernel was decorated in a process that interprets: Triton reads the variable when it is imported, and never again."""
    return type(kernel).__name__ == "InterpretedFunction"


@cache
def cure() -> None:
    """Mend Triton's interpreter in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, executor, convert = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter._convert_float
    dot, binary, run = builder.create_dot, builder.binary_op, executor.__call__

    def exact_convert(data, source, goal, mode):
        if (source, goal) == (tl.bfloat16, tl.float32):
            return _widen(data).view(np.uint32)
        if (source, goal) == (tl.float32, tl.bfloat16):
            return _narrow(data.view(np.float32), mode is None or mode == interpreter._ir.ROUNDING_MODE.RTNE)
        return convert(data, source, goal, mode)

    def operand(x):
        return interpreter.TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def typed_binary(self, left, right, op):
        result = binary(self, left, right, op)
        return interpreter.TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result

    def quiet_run(self, *arguments, **named):
        with np.errstate(all="ignore"):
            return run(self, *arguments, **named)

    interpreter._convert_float = exact_convert
    builder.binary_op = typed_binary
    builder.create_dot = lambda self, a, b, d, *rest: dot(self, operand(a), operand(b), d, *rest)
    executor.__call__ = quiet_run


def _widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray, to_even: bool) -> np.ndarray:
    """fp32 -> bf16 bit patterns; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32) if to_even else bits
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded >> 16).astype(np.uint16)
