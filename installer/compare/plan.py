"""What is generated, in which order: sizes, pictures, variants. The standard library alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import workflow
from ..console import SetupError, failed

FORM = 1  # of the journal and the JSON
STEPS, FEWER = 20, 0.75
SEED, SUBJECTS, PROMPTS = 7, 4, 2  # the first seed; pictures a variant and size, at least; prompts by default
SIDES, MOST_PROMPTS = (64, 8192), 64
CACHE, DEMO, DEMO_LARGEST = "EasyCache", "demo", 256
UNMERGED, FLOOR_NAME = "unmerged", "unmerged, another batch split"
FLOOR, FIRST, TIMED = "floor", "first", "timed"  # kinds of generations


@dataclass(frozen=True)
class Variant:
    """A way to generate. tome: values of the ToMe node, None without; share: of the steps; split: the noise floor."""

    name: str
    tome: dict[str, Any] | None = None
    cache: bool = False
    share: float = 1.0
    split: bool = False


@dataclass(frozen=True)
class Picture:
    """What is painted. prompt: its text, None: the workflow's own."""

    prompt: str | None
    seed: int


@dataclass(frozen=True)
class Job:
    """One generation."""

    size: str
    variant: Variant
    picture: int  # its place in Request.pictures
    kind: str

    @property
    def key(self) -> str:
        return f"{self.size} | {self.variant.name} | {self.picture} | {self.kind}"


@dataclass(frozen=True)
class Request:
    """What a person asked for. model: the demo's where there is neither a checkpoint nor a workflow.

    sizes: "WxH", or "own": the workflow's. own_prompts: whether the prompts are the person's, who keeps them.
    """

    pictures: tuple[Picture, ...]
    sizes: tuple[str, ...]
    checkpoint: Path | None = None
    workflow: Path | None = None
    own_prompts: bool = False
    steps: int = STEPS

    @property
    def is_demo(self) -> bool:
        return self.checkpoint is None and self.workflow is None

    def settings(self) -> dict[str, Any]:
        """All that the results depend on, as far as it is known without a ComfyUI."""
        file = self.checkpoint
        return {
            "form": FORM,
            "checkpoint": None if file is None else f"{file.name}, {file.stat().st_size} bytes",
            "workflow": None if self.workflow is None else _hash(self.workflow.read_bytes()),
            "sizes": list(self.sizes),
            "prompts": _hash(json.dumps([picture.prompt for picture in self.pictures]).encode()),
            "seeds": [picture.seed for picture in self.pictures],
            "steps": None if self.workflow else self.steps,
        }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def make_request(
    checkpoint: Path | None, flow: Path | None, sizes: Sequence[str] | None, prompts: Path | None
) -> Request:
    """The request of a command line. Raises SetupError for a size or a file of prompts that cannot be used."""
    if sizes:
        found = tuple(dict.fromkeys(parse_size(size) for size in sizes))
    else:
        native = 64 if checkpoint is None else workflow.native_size(checkpoint)
        found = ("own",) if flow else (f"{native}x{native}",)
    if checkpoint is None and flow is None:
        if prompts:
            raise SetupError("the demo's model has classes, not prompts", "Name a model: --checkpoint FILE.")
        for width, height in (size.split("x") for size in found):
            if width != height or int(width) > DEMO_LARGEST:
                raise SetupError(
                    f"--sizes {width}x{height}: the demo's model paints squares of {SIDES[0]} to {DEMO_LARGEST} pixels",
                    "Name a model: --checkpoint FILE.",
                )
        texts: list[str | None] = list(workflow.FAVOURITES[:PROMPTS])
    elif prompts:
        texts = list(read_prompts(prompts))
    else:
        texts = [None] if flow else list(workflow.PROMPTS[:PROMPTS])
    seeds = range(SEED, SEED + max(1, -(-SUBJECTS // len(texts))))
    pictures = tuple(Picture(text, seed) for seed in seeds for text in texts)
    return Request(pictures, found, checkpoint, flow, own_prompts=bool(prompts or flow))


def parse_size(text: str) -> str:
    """ "1024" or "1536x1024" as "WxH". Raises SetupError."""
    numbers = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    low, high = SIDES
    sides = [int(number) for number in numbers.groups() if number] if numbers else []
    if not sides or any(not low <= side <= high or side % 8 for side in sides):
        raise SetupError(
            f"--sizes {text}: a size is a side or WIDTHxHEIGHT in pixels, {low} to {high} and a multiple of 8",
            "For instance: --sizes 1024 1536x1024",
        )
    return f"{sides[0]}x{sides[-1]}"


def read_prompts(file: Path) -> list[str]:
    """A prompt a line; empty lines are left out. Raises SetupError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise failed(f"{file} could not be read", error) from error
    except ValueError as error:
        raise SetupError(f"{file} is no text in UTF-8", "Save it as text in UTF-8, a prompt a line.") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not 1 <= len(found) <= MOST_PROMPTS:
        raise SetupError(f"{file} has {len(found)} prompts, not 1 to {MOST_PROMPTS}", "Write a prompt a line.")
    return found


def all_variants(presets: dict[str, dict[str, Any]]) -> list[Variant]:
    """What is compared, unmerged first. presets: the options that each sets."""
    balanced = presets["Balanced"]
    return [
        Variant(UNMERGED),
        *(Variant(name, tome=dict(options)) for name, options in presets.items()),
        Variant("fewer steps", share=FEWER),
        Variant(CACHE, cache=True),
        Variant(f"{CACHE} + Balanced", tome=dict(balanced), cache=True),
    ]


def possible(
    variants: Sequence[Variant], has_cache: bool, own_cache: bool, steps: int | None
) -> tuple[list[Variant], list[str]]:
    """Those of the variants that can be run, and why the others are left out.

    has_cache: whether this ComfyUI has EasyCache; own_cache: whether the workflow has a node of that kind; steps: the
    workflow's, None where no node has a number of its own.
    """
    found, notes = list(variants), []
    if not has_cache:
        notes.append("EasyCache is left out: this ComfyUI has no such node.")
    elif own_cache:
        notes.append("EasyCache is left out: the workflow has a node of that kind already, which all variants keep.")
    if notes:
        found = [variant for variant in found if not variant.cache]
    if steps is None or round(FEWER * steps) in (0, steps):
        notes.append("Fewer steps are left out: no node of the workflow has enough steps of its own.")
        found = [variant for variant in found if variant.share == 1]
    return found, notes


def jobs(sizes: Sequence[str], variants: Sequence[Variant], pictures: int) -> list[Job]:
    """All generations in their order.

    Of each size: one of the noise floor goes before each picture's others, so that no timed one loads the model or
    encodes a prompt. Then each variant's first, where it compiles and tunes. Then the timed ones by turns: another
    variant begins with each picture.
    """
    found = []
    for size in sizes:
        for picture in range(pictures):
            found.append(Job(size, Variant(FLOOR_NAME, split=True), picture, FLOOR))
            if picture == 0:
                found += [Job(size, variant, 0, FIRST) for variant in variants]
            turn = picture % len(variants)
            found += [Job(size, variant, picture, TIMED) for variant in (*variants[turn:], *variants[:turn])]
    return found


def to_warm_up(todo: Sequence[Job]) -> list[Job]:
    """One of each variant and size that would be timed cold: a new server has loaded and tuned nothing yet."""
    firsts = {(job.size, job.variant.name) for job in todo if job.kind == FIRST}
    found: dict[tuple[str, str], Job] = {}
    for job in todo:
        if job.kind == TIMED and (job.size, job.variant.name) not in firsts:
            found.setdefault((job.size, job.variant.name), job)
    return list(found.values())


def weight(job: Job) -> float:
    """How long a generation takes beside the others, roughly."""
    sides = [int(side) for side in job.size.split("x")] if "x" in job.size else [1, 1]
    return sides[0] * sides[1] * job.variant.share


def time_left(todo: Sequence[Job], done: Sequence[Job], seconds: float) -> str:
    """ "12 min left". seconds: that those done took; empty while none is done."""
    if not done:
        return ""
    left = seconds / sum(map(weight, done)) * sum(map(weight, todo))
    return f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left"
