"""Triton's interpreter without work that changes nothing, which takes two thirds of the suites' time."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # Each sum is worked out in 64 bits too, to be compared in debug mode, which is off.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """The language is patched for a launch, and again for each call inside of it: the launch's is enough."""
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        patched = used and not any(tl.core.is_builtin(language.load) for language in used)
        return interpreter._LangPatchScope() if patched else patch(function)

    interpreter._patch_lang = patch_once
