"""Which ComfyUI the tests run on, and what older ones do not have: the one place that says so.

A test of a row's `tests` holds on ComfyUI `since` and newer. On an older one it must fail (a strict xfail), for what is
said of that ComfyUI; nothing else may. The versions are those that were run: 0.16.3, 0.18.2, 0.24.0, 0.27.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lack:
    """since: the oldest version of those that were run where the tests hold. tests: a pattern of their ids."""

    since: str
    why: str
    tests: str

    def concerns(self, version: tuple[int, ...], test: str) -> bool:
        return version < numbers(self.since) and re.search(self.tests, test) is not None


_GROUPED = "test_layouts_and_grouped_heads"
LACKS = (
    Lack("0.24.0", "its Stable Audio has no memory tokens", r"stable_audio|test_differential_attention_samples"),
    Lack("0.24.0", "its ACE-Step 1.5 has one size of its encoders", r"test_dit_ace\.py"),
    Lack("0.24.0", "its Chroma Radiance has no use_sequential_txt_ids", r"\[(0\.\d+-)?radiance\]"),
    Lack("0.24.0", "its Wan takes no context_latents", r"test_references_are_never_merged\[wan(_fun)?-told[57]"),
    Lack("0.24.0", "its LTXV gives guides of a strength a mask, and attends once", r"test_guides_of_a_strength_other"),
    Lack("0.24.0", "it has no Wan Dancer", r"test_every_row_names_classes"),
    Lack("0.24.0", "it has no MultiGPU node", r"test_two_devices\.py"),
    Lack("0.24.0", "no attention knows grouped heads", rf"{_GROUPED}.*split( out)?-2-(sample|downsample)"),
    Lack(
        "0.27.0",
        "no attention knows grouped heads of flat layout",
        rf"{_GROUPED}.*((flat|four)-[12]|split( out)?-[12]-merge)|\[kv_heads\]",
    ),
    Lack("0.27.0", "its differential attention (Stable Audio 3) does not run", r"stable_audio_3\]|test_differential"),
    Lack(
        "0.27.0",
        "its ACE-Step 1.5 repeats shared keys for all heads, so own tokens are kept",
        r"test_dit_ace\.py::test_(keys_of_the_whole|methods\[sample\]|odd_lengths|own_tokens_are)",
    ),
    Lack("0.24.0", "its attention functions ignore scale", r"test_which_of_comfyuis_functions_mind_scale"),
)


def numbers(version: str) -> tuple[int, ...]:
    """ "0.24.0" -> (0, 24, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def version_of(comfyui: Path) -> tuple[int, ...]:
    """Of a checkout; a very high one where it does not tell."""
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return (10**6,)
    found = re.search(r"__version__\s*=\s*[\"']([\d.]+)", text)
    return numbers(found[1]) if found else (10**6,)
