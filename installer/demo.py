"""The demo: the same pictures in a real ComfyUI without and with ToMe, timed, compared and drawn.

Runs in the environment's Python: `python -m installer.demo --comfyui DIR --out DIR [--checkpoint FILE]`.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import comfyui, report, workflow
from .client import ComfyClient
from .console import SetupError, deliver, exit_status, stage
from .paths import CACHE
from .report import Outcome
from .server import ComfyServer, machine, running
from .workflow import SAMPLER, Settings, Subject, Workflow

Tome = Mapping[str, Any]
WARM_UP_STEPS = 2
SECONDS = 35.0  # for the demo model's pictures: with the rest a second run stays under a minute


@dataclass
class Plan:
    """What the demo makes and how. build(subject, settings, tome or None) gives a workflow."""

    model: str
    subjects: list[Subject]
    settings: Settings
    build: Callable[[Subject, Settings, Tome | None], Workflow]
    pixels_a_token: int
    seconds: float = math.inf  # fewer subjects are made where all of them would take longer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(prog="installer.demo")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options.comfyui, options.out, options.checkpoint))


def run(host: Path, out: Path, checkpoint: Path | None) -> None:
    """Make, measure, compare, draw. Raises SetupError; the server is gone afterwards in any case."""
    server = ComfyServer(
        host,
        CACHE / "base-demo",
        comfyui.interpreter(host, Path(sys.executable)),
        arguments=comfyui.models_beside(checkpoint),
        environment={"TOME_DEMO": "1"},
    )
    with running(server, "If you did not cause this, report it.") as (client, stats):
        tome = workflow.defaults(client.node("ToMe"))
        plan = _plan(client, checkpoint, on_cpu=stats["devices"][0]["type"] == "cpu")
        outcomes = _make(client, plan, tome)
    with stage("Comparing"):
        summary = report.summarise(outcomes, tome, plan.settings, plan.model, plan.pixels_a_token)
        summary.machine = machine(stats)
    deliver(report.table(summary), lambda: report.write(summary, outcomes, out), out)


def _plan(client: ComfyClient, checkpoint: Path | None, on_cpu: bool) -> Plan:
    if checkpoint is None:
        known = client.node("ToMeDemoModel")
        settings = Settings(10, cfg=3.0, scheduler="simple", size=workflow.defaults(known)["size"])
        subjects = workflow.demo_subjects(known, 4)
        build = workflow.demo_workflow
        return Plan("demo model", subjects, settings, lambda *job: build(known, *job), 1, SECONDS)
    # A real model's step takes seconds on a CPU: one picture shows it.
    settings = Settings(10 if on_cpu else 20, cfg=7.0, size=workflow.native_size(checkpoint))
    texts = workflow.PROMPTS[: 1 if on_cpu else 3]
    subjects = [Subject(text.split(",")[0], text, 7 + place) for place, text in enumerate(texts)]
    build, name = workflow.checkpoint_workflow, checkpoint.name
    return Plan(name, subjects, settings, lambda *job: build(name, *job), 8)


def _make(client: ComfyClient, plan: Plan, tome: Tome) -> list[Outcome]:
    """Every subject unmerged and with ToMe. Who goes first alternates, so that neither has the warmer machine."""
    variants: dict[str, Tome | None] = {"unmerged": None, "ToMe": tome}
    with stage("Loading the model and warming up"):
        short = Settings(**{**vars(plan.settings), "steps": WARM_UP_STEPS})
        for values in variants.values():
            client.run(plan.build(plan.subjects[0], short, values))
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for number, subject in enumerate(plan.subjects):
        spent = time.monotonic() - began
        if number and spent * (number + 1) / number > plan.seconds:
            break
        outcome = Outcome(subject)
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        with stage(f"{subject.name}, seed {subject.seed}") as current:
            for name in order:
                result = client.run(
                    plan.build(subject, plan.settings, variants[name]),
                    lambda step, steps, name=name: current.note(f"{name}: step {step} of {steps}"),
                )
                images = client.images(result)
                if not images or SAMPLER not in result.seconds:
                    raise SetupError(f"ComfyUI made no picture of {subject.name}")
                outcome.pictures[name] = np.asarray(Image.open(io.BytesIO(images[0])).convert("RGB"))
                outcome.seconds[name] = result.seconds[SAMPLER] / plan.settings.steps
            current.result = ", ".join(f"{name} {outcome.seconds[name]:.3f} s a step" for name in variants)
        outcomes.append(outcome)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
