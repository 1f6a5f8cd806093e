"""Triton's interpreter with products of bfloat16, and without work that changes nothing, which takes three quarters of
the suites' time."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    # Each sum is worked out in 64 bits too, to be compared in debug mode, which is off.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    # numpy has no bfloat16, which the interpreter would multiply as the whole numbers that its bits are.
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def widened_dot(self: Any, a: Any, b: Any, *given: Any) -> Any:
        return dot(self, widened(a), widened(b), *given)

    interpreter.InterpreterBuilder.create_dot = widened_dot

    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """The language is patched for a launch, and again for each call inside of it: the launch's is enough."""
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        patched = used and not any(tl.core.is_builtin(language.load) for language in used)
        return interpreter._LangPatchScope() if patched else patch(function)

    interpreter._patch_lang = patch_once

    # Each operation describes its result anew. A description is kept by the element's type and the sides.
    described: dict[Any, dict[str, Any]] = {}
    sides: dict[tuple[int, ...], tuple[Any, Any]] = {}
    in_numpy: dict[Any, Any] = {}
    describe, as_numpy = tl.block_type.__init__, interpreter._get_np_dtype

    def describe_once(self: Any, element_ty: Any, shape: Any) -> None:
        if isinstance(element_ty, tl.pointer_type) or not all(type(side) is int for side in shape):
            describe(self, element_ty, shape)
            return
        key = element_ty, *shape
        if key not in described:
            describe(self, element_ty, shape)
            described[key] = dict(self.__dict__)
        self.__dict__.update(described[key])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = (*type.shape,) if type.is_block() else ()
        if shape not in sides:
            sides[shape] = tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(side) for side in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sides[shape]

    def as_numpy_once(type: Any) -> Any:
        scalar = type.scalar
        if isinstance(scalar, tl.pointer_type):
            return as_numpy(scalar)
        if scalar not in in_numpy:
            in_numpy[scalar] = as_numpy(scalar)
        return in_numpy[scalar]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = describe_once, make_tensor, as_numpy_once
