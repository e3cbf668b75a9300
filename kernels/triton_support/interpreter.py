"""Triton's interpreter (TRITON_INTERPRET=1), made right where it is silently wrong about bfloat16.

Triton keeps a bfloat16 value as raw uint16 bits (3.9 does), and then adds, multiplies, compares and reduces those bits
as if they were integers; casts to bfloat16 truncate. Here every operation on floats widens bfloat16 to float32,
computes, and rounds the result to nearest, ties to even, as the hardware does. Moves (load, select, broadcast) are
right on bits.

Triton below 3.7 also takes an array of one element for an integer, which NumPy from 2.4 on refuses.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def interpreting() -> bool:
    """Whether triton is installed and `@triton.jit` makes interpreted functions, which never become compiled ones."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def correct_interpreter() -> None:
    """Make the interpreter right, in this process, for good. Does nothing outside interpret mode."""
    if interpreting():
        _patch_interpreter()


def _widen_bits(bits: Any) -> Any:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_to_bits(values: Any) -> Any:
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # adding to a NaN's bits may carry into the sign
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@functools.cache
def _patch_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    handle_type, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_narrow(x: Any) -> bool:
        return isinstance(x, handle_type) and x.dtype.scalar == tl.bfloat16

    def widen(x: Any) -> Any:
        return handle_type(_widen_bits(x.data), tl.float32) if is_narrow(x) else x

    def narrow(x: Any) -> Any:
        # the result of a comparison has the dtype of its operands, and bool data
        return x if x.data.dtype == np.bool_ else handle_type(_round_to_bits(x.data), tl.bfloat16)

    def in_float32(compute: Callable[..., Any]) -> Callable[..., Any]:
        def wide(self: Any, *operands: Any) -> Any:
            if not any(map(is_narrow, operands)):
                return compute(self, *operands)
            return narrow(compute(self, *map(widen, operands)))

        return wide

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt"):
        setattr(builder, name, in_float32(getattr(builder, name)))

    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:  # Triton, too, goes through float32, whatever the source
            return src if is_narrow(src) else narrow(cast(self, src, tl.float32))
        return cast(self, widen(src), dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        sides = (src.dtype.scalar, dst_type.scalar)
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE and all(x.primitive_bitwidth >= 16 for x in sides):
            return self.cast_impl(src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        a, b = widen(a), widen(b)
        if acc.dtype.scalar != tl.float16:
            return dot(self, a, b, acc, *options)
        # numpy would round every partial sum to float16
        acc = handle_type(acc.data.astype(np.float32), tl.float32)
        return self.cast_impl(dot(self, a, b, acc, *options), tl.float16)

    def reduced_in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
        def wide(self: Any, inputs: Any) -> Any:
            if not isinstance(inputs, tuple) or not any(is_narrow(x.handle) for x in inputs):
                return apply(self, inputs)
            outputs = apply(self, tuple(x.to(tl.float32) if is_narrow(x.handle) else x for x in inputs))
            # an argmax returns its index beside the value, so outputs pair off with inputs
            pairs = zip(inputs, outputs, strict=True)
            return tuple(y.to(tl.bfloat16) if is_narrow(x.handle) else y for x, y in pairs)

        return wide

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    # a constant; Triton below 3.7 has none of this type
    builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
    scans = interpreter.ReduceScanOpInterface
    scans.apply = reduced_in_float32(scans.apply)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    # a GPU computes NaN and infinity without a warning, and so shall this
    executor = interpreter.GridExecutor
    executor.__call__ = np.errstate(all="ignore")(executor.__call__)
