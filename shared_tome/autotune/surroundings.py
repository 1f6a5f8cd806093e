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
_SWITCHES: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("matmul tf32", lambda: torch.backends.cuda.matmul.allow_tf32),
    ("conv tf32", lambda: torch.backends.cudnn.allow_tf32),
    ("fp16 accumulation", lambda: torch.backends.cuda.matmul.allow_fp16_accumulation),
    ("cuDNN benchmark", lambda: torch.backends.cudnn.benchmark),
    ("deterministic", torch.are_deterministic_algorithms_enabled),
)


def surroundings(device: torch.device) -> str:
    """In words. torch's own version and the device's name are not in it: each has a file of its own (store.py)."""
    words = [word for word, switch in _SWITCHES if _is_on(switch)]
    return ", ".join([_versions(), *words, *_autocast(device)])


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


def _autocast(device: torch.device) -> list[str]:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    else:  # a GPU's
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return [f"autocast {str(dtype).removeprefix('torch.')}"] if enabled else []
