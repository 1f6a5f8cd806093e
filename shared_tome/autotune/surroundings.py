"""What every time on a device depends on beside what is timed: the versions of what runs there and torch's switches.

With it in a decision's name, another version or switch is another measurement and nothing has to be deleted by hand.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import kernels

# Attention packages that hosts call.
_PACKAGES = ("xformers", "flash-attn", "sageattention", "comfy-kitchen")


def _hash_source() -> str:
    """Of this core as it was when it was loaded: kernels, what merging runs around them, and the rule that judges."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    try:
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    except OSError:  # without source there is only one version
        return "unknown"
    return digest.hexdigest()[:12]


SOURCE = _hash_source()


def surroundings(device: torch.device) -> str:
    """In words. torch's own version and the device's name are not in it: each has a file of its own (store.py)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = (
        _is_on(lambda: matmul.allow_tf32),
        _is_on(lambda: cudnn.allow_tf32),
        _is_on(lambda: matmul.allow_fp16_accumulation),
        _is_on(lambda: cudnn.benchmark),
        torch.are_deterministic_algorithms_enabled(),
        _autocast(device),
    )
    return _in_words(*switches)


@functools.lru_cache(maxsize=64)
def _in_words(tf32: bool, conv_tf32: bool, fp16: bool, benchmark: bool, deterministic: bool, autocast: str) -> str:
    words = [_versions()]
    words += ["matmul tf32"] if tf32 else []
    words += ["conv tf32"] if conv_tf32 else []
    words += ["fp16 accumulation"] if fp16 else []
    words += ["cuDNN benchmark"] if benchmark else []
    words += ["deterministic"] if deterministic else []
    return ", ".join([*words, *([autocast] if autocast else [])])


@functools.lru_cache(maxsize=1)
def _versions() -> str:
    triton = kernels.version()
    words = [f"ToMe {SOURCE}", "no kernels" if triton is None else f"Triton {triton}"]
    words += [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
    words += [f"ROCm {torch.version.hip}"] if torch.version.hip else []
    cudnn = torch.backends.cudnn.version()
    words += [f"cuDNN {cudnn}"] if cudnn else []
    for name in _PACKAGES:
        try:
            words.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(words)


def _is_on(switch: Callable[[], Any]) -> bool:
    """A switch of torch's; False where this version has none, or will not tell it beside a newer one."""
    try:
        return bool(switch())
    except (AttributeError, RuntimeError):
        return False


def _autocast(device: torch.device) -> str:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    else:  # a GPU's
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return f"autocast {str(dtype).removeprefix('torch.')}" if enabled else ""
