"""The demo's workflow, in ComfyUI's API format: a model, perhaps ToMe, the sampler, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Workflow = dict[str, dict[str, Any]]
SAMPLER = "sampler"
LONGEST_HEADER = 10**8  # bytes, of a .safetensors file

# Classes to show, best first; whichever of them the demo model knows.
FAVOURITES = ("astronaut", "motorcycle", "mountains", "cat", "coffee", "photographer")
PROMPTS = (
    "photograph of an astronaut on the moon, detailed, sharp focus",
    "a cat on a windowsill in the morning sun, photograph",
    "a lighthouse on a cliff above the sea, oil painting",
)
NEGATIVE = "blurry, low quality"


@dataclass(frozen=True)
class Subject:
    """One picture to make: its caption, what the model is asked for, its seed."""

    name: str
    text: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """How pictures are sampled; the same with and without ToMe."""

    steps: int
    cfg: float
    sampler: str = "euler"
    scheduler: str = "normal"
    size: int = 64


def inputs_of(known: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A node's inputs, [type or choices, options] each, from what /object_info tells of it."""
    return {**(known["input"].get("required") or {}), **(known["input"].get("optional") or {})}


def defaults(known: Mapping[str, Any]) -> dict[str, Any]:
    """A node's widgets at their defaults."""
    values = {}
    for name, (kind, *rest) in inputs_of(known).items():
        options = rest[0] if rest else {}
        if "default" in options:
            values[name] = options["default"]
        elif isinstance(kind, list) and kind:
            values[name] = kind[0]
        elif kind == "COMBO" and options.get("options"):
            values[name] = options["options"][0]
    return values


def choices(known: Mapping[str, Any], name: str) -> list[str]:
    """What a node's list widget offers."""
    kind, *rest = inputs_of(known)[name]
    return list(kind if isinstance(kind, list) else rest[0]["options"])


def demo_subjects(known: Mapping[str, Any], count: int) -> list[Subject]:
    """The first `count` classes of the demo model that are worth showing."""
    offered = choices(known, "subject")
    ordered = [name for name in FAVOURITES if name in offered]
    ordered += [name for name in offered if name not in ordered]
    return [Subject(name, name, 7 + place) for place, name in enumerate(ordered[:count])]


def demo_workflow(
    known: Mapping[str, Any], subject: Subject, settings: Settings, tome: Mapping[str, Any] | None
) -> Workflow:
    """The small demo model (`known` is its node), with a ToMe node of the values `tome` or (None) without."""
    values = defaults(known) | {"subject": subject.text, "size": settings.size}
    workflow: Workflow = {"model": {"class_type": "ToMeDemoModel", "inputs": values}}
    names = ("model", "positive", "negative", "vae", "latent_image")
    return _finish(workflow, {name: ["model", place] for place, name in enumerate(names)}, subject, settings, tome)


def checkpoint_workflow(name: str, subject: Subject, settings: Settings, tome: Mapping[str, Any] | None) -> Workflow:
    """A Stable Diffusion checkpoint through ComfyUI's own loader, with or without ToMe."""
    size = {"width": settings.size, "height": settings.size, "batch_size": 1}
    workflow: Workflow = {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": subject.text, "clip": ["model", 1]}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": NEGATIVE, "clip": ["model", 1]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": size},
    }
    parts = {"model": ["model", 0], "vae": ["model", 2], "latent_image": ["latent", 0]}
    parts |= {name: [name, 0] for name in ("positive", "negative")}
    return _finish(workflow, parts, subject, settings, tome)


def _finish(
    workflow: Workflow, parts: dict[str, Any], subject: Subject, settings: Settings, tome: Mapping[str, Any] | None
) -> Workflow:
    """Add what all have: ToMe, the sampler, the picture. parts: the links of the sampler's inputs and of the vae."""
    vae = parts.pop("vae")
    if tome is not None:
        workflow["tome"] = {"class_type": "ToMe", "inputs": {**tome, "model": parts["model"]}}
        parts["model"] = ["tome", 0]
    workflow[SAMPLER] = {
        "class_type": "KSampler",
        "inputs": {
            **parts,
            "seed": subject.seed,
            "steps": settings.steps,
            "cfg": settings.cfg,
            "sampler_name": settings.sampler,
            "scheduler": settings.scheduler,
            "denoise": 1.0,
        },
    }
    workflow["picture"] = {"class_type": "VAEDecode", "inputs": {"samples": [SAMPLER, 0], "vae": vae}}
    workflow["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["picture", 0]}}
    return workflow


def read_header(file: Path) -> dict[str, Any]:
    """What a .safetensors file holds, by name. Raises OSError, and ValueError where it is none or is cut off."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= LONGEST_HEADER:
            raise ValueError("it does not begin as a .safetensors file does")
        text = opened.read(length)
    if len(text) < length:
        raise ValueError(f"it is cut off: {size:,} bytes, of more than {8 + length:,}")
    try:
        found = json.loads(text)
        whole = 8 + length + max((one["data_offsets"][1] for one in found.values() if "data_offsets" in one), default=0)
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ValueError("its list of tensors cannot be read") from error
    if size < whole:
        raise ValueError(f"it is cut off: {size:,} bytes of {whole:,}")
    return found


def native_size(checkpoint: Path) -> int:
    """The side in pixels that a checkpoint was trained for, as far as a .safetensors file's names tell."""
    try:
        names = read_header(checkpoint)
    except (OSError, ValueError, MemoryError):
        return 512
    return 1024 if any(name.startswith("conditioner.embedders.1.") for name in names) else 512
