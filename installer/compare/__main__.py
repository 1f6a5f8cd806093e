"""Generates, times, compares, writes: `python -m installer.compare --comfyui DIR --out DIR ...`, in the environment."""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shared_tome.autotune.surroundings import SOURCE
from shared_tome.changes import version
from shared_tome.methods import PRESETS

from .. import comfyui, files, server, workflow
from ..client import ComfyClient, Result
from ..console import SetupError, deliver, exit_status, say, stage
from ..paths import CACHE
from . import graph as graphs
from . import plan, results
from .graph import TAKE, Graph
from .journal import Journal
from .plan import FIRST, Job, Request

NODES = Path(__file__).with_name("nodes")
PACKS = (server.link.COMFYUI.name, "tome-compare")
PATIENCE = 3600.0  # seconds without a word from ComfyUI: decoding a video takes long
WARM_UP = 0.1  # of the steps, after a comparison was taken up


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and return the exit status."""
    parser = argparse.ArgumentParser(prog="installer.compare")
    for name in ("comfyui", "out", "checkpoint", "workflow", "prompts"):
        parser.add_argument(f"--{name}", type=Path, required=name in ("comfyui", "out"))
    parser.add_argument("--sizes", nargs="+")
    options = parser.parse_args(arguments)

    def work() -> None:
        request = plan.make_request(options.checkpoint, options.workflow, options.sizes, options.prompts)
        run(options.comfyui, options.out, request)

    return exit_status(work, "Stopped. The same command goes on from here.")


def run(host: Path, out: Path, request: Request) -> None:
    """Generate what is not in `out` yet, then compare all. Raises SetupError; the server is gone afterwards."""
    with files.alone(files.make_folder(out) / "compare.lock"):
        journal = Journal(out, request.settings() | _digest(request))
        if not results.is_complete(journal, request):
            _generate(host, out, request, journal)
        with stage("Comparing"):
            found = results.summarise(out, journal, request)
        deliver(results.table(found), lambda: results.write(found, out, request), out)


def _digest(request: Request) -> dict[str, Any]:
    if request.checkpoint is None:
        return {}
    with stage(f"Reading {request.checkpoint.name}"):
        return {"sha256": files.digest(request.checkpoint)[:10]}


def _generate(host: Path, out: Path, request: Request, journal: Journal) -> None:
    base = CACHE / "base-compare"
    custom_nodes = files.make_folder(base / "custom_nodes")
    server.put_pack(custom_nodes, NODES, PACKS[1])
    own = request.workflow is not None and host != comfyui.FETCHED
    comfy = server.ComfyServer(
        host,
        base,
        comfyui.interpreter(host, Path(sys.executable)),
        arguments=(*comfyui.models_beside(request.checkpoint), *(comfyui.models_of(host, PACKS) if own else ())),
        # Tuned anew in each comparison, and kept with it: the first picture's time holds the tuning.
        environment={"TOME_DEMO": "1", "TOME_CACHE": str(out / "tuning")},
    )
    hint = "" if own else "A workflow finds its models in the ComfyUI that --comfyui names."
    with server.running(comfy, hint) as (client, stats):
        Session(client, request, journal, out, comfy.log).run(stats)


class Session:
    """The generations of one start of the server."""

    def __init__(self, client: ComfyClient, request: Request, journal: Journal, out: Path, log: Path) -> None:
        self.client, self.request, self.journal, self.out, self.log = client, request, journal, out, log
        self.known = client.get("/object_info")
        self.nonce = int(time.time()) % 2**24  # another one in each start
        self.base = self._base()
        presets = {name: preset.options for name, preset in PRESETS.items()}
        self.variants, self.notes = plan.possible(
            plan.all_variants(presets), plan.CACHE in self.known, self.base.own_cache, self.base.steps()
        )

    def run(self, stats: dict[str, Any]) -> None:
        """Whatever is not in the journal yet."""
        self.journal.write_settings(
            # Between releases the version alone says little: a hash of the core's source is with it.
            tome=f"{version() or '0.0'}+{SOURCE}",
            machine=_machine(stats),
            variants=[vars(variant) for variant in self.variants],
            notes=self.notes,
            model_files=self.base.loaded(),
            steps_found=self.base.steps(),
        )
        for note in self.notes:
            say(f"  {note}")
        for size in self.request.sizes:
            for picture in range(len(self.request.pictures)):
                self._graph(size, picture)  # what cannot be placed is told before the first generation
        jobs = plan.jobs(self.request.sizes, self.variants, len(self.request.pictures))
        todo = [job for job in jobs if not self.journal.has(job.key)]
        if len(todo) < len(jobs):
            say(f"  {len(jobs) - len(todo)} of {len(jobs)} generations are done already.")
            self._warm_up(todo)
        done: list[Job] = []
        began = time.monotonic()
        for number, job in enumerate(todo):
            count = f"{len(jobs) - len(todo) + number + 1} of {len(jobs)}"
            title = f"{count}: {job.size}, {job.variant.name}, picture {job.picture + 1}"
            with stage(f"{title}, first" if job.kind == FIRST else title) as current:
                record = self.generate(
                    job, lambda step, steps, current=current: current.note(f"step {step} of {steps}")
                )
                self.journal.add(job.key, record)
                done.append(job)
                left = plan.time_left(todo[number + 1 :], done, time.monotonic() - began)
                current.result = f"{record['seconds']:.1f} s, {left}"

    def _base(self) -> Graph:
        request = self.request
        if request.workflow is not None:
            base = Graph(graphs.load(request.workflow), self.known)
            if request.checkpoint is not None:
                base.set_checkpoint(request.checkpoint.name)
            return base
        subject = workflow.Subject("", request.pictures[0].prompt or "", request.pictures[0].seed)
        if request.checkpoint is not None:
            settings = workflow.Settings(request.steps, cfg=7.0)
            return Graph(workflow.checkpoint_workflow(request.checkpoint.name, subject, settings, None), self.known)
        settings = workflow.Settings(request.steps, cfg=3.0, scheduler="simple")
        return Graph(workflow.demo_workflow(self.known["ToMeDemoModel"], subject, settings, None), self.known)

    def _graph(self, size: str, picture: int) -> Graph:
        made, chosen = self._base(), self.request.pictures[picture]
        if self.request.is_demo:
            made.workflow["model"]["inputs"] |= {"size": int(size.split("x")[0]), "subject": chosen.prompt}
        elif size != "own":
            made.set_size(size)
        if chosen.prompt is not None and not self.request.is_demo:
            made.set_prompt(chosen.prompt)
        made.set_seed(chosen.seed)
        return made

    def _prompt(self, job: Job) -> tuple[dict[str, Any], set[str]]:
        """The workflow of a generation, and the nodes that it consists of."""
        made = self._graph(job.size, job.picture)
        self.nonce += 1
        return made.with_variant(job.variant, self.nonce), made.timed()

    def generate(self, job: Job, progress: Any) -> dict[str, Any]:
        """Generate, keep the pictures, and return what was measured."""
        prompt, timed = self._prompt(job)
        before = self.log.stat().st_size
        result = self.client.run(prompt, progress, timeout=PATIENCE)
        told = result.outputs.get(TAKE)
        if told is None or not timed & result.seconds.keys():
            raise SetupError(f"ComfyUI made no picture of {job.variant.name}")
        record = {
            # A node that others are put in place of while it runs tells their numbers, which the prompt has not.
            "seconds": sum(s for id, s in result.seconds.items() if id in timed or id not in prompt),
            "peak_bytes": told["peak_bytes"][0],
            "family": told["family"][0],
            "dtype": told["dtype"][0],
            "skipped": self._skipped(before) if job.variant.cache else None,
        }
        if job.kind != FIRST:
            record["pictures"] = self._keep(job, result)
        return record

    def _keep(self, job: Job, result: Result) -> list[str]:
        names = []
        folder = files.make_folder(self.out / "pictures")
        result.outputs = {TAKE: result.outputs[TAKE]}
        for number, data in enumerate(self.client.images(result)):
            name = re.sub(r"[^A-Za-z0-9]+", "-", f"{job.size} {job.picture} {job.variant.name} {number}") + ".png"
            Image.open(io.BytesIO(data)).convert("RGB").save(folder / name)
            names.append(name)
        return names

    def _skipped(self, before: int) -> float | None:
        """The share of the steps that EasyCache says it skipped, of all samplings since; None where it says nothing."""
        with self.log.open("rb") as log:
            log.seek(before)
            found = re.findall(r"skipped (\d+)/(\d+) steps", log.read().decode(errors="replace"))
        total = sum(int(steps) for _, steps in found)
        return sum(int(skipped) for skipped, _ in found) / total if total else None

    def _warm_up(self, todo: Sequence[Job]) -> None:
        with stage("Loading the model and warming up") as current:
            for job in plan.to_warm_up(todo):
                current.note(job.variant.name)
                variant = plan.Variant(**{**vars(job.variant), "share": WARM_UP})
                self.client.run(self._prompt(Job(job.size, variant, job.picture, job.kind))[0], timeout=PATIENCE)


def _machine(stats: dict[str, Any]) -> dict[str, Any]:
    """The device and versions, without any name of the person's."""
    system, device = stats["system"], stats["devices"][0]
    return {
        "device": re.sub(r"^\w+:\d+ | : .*$", "", server.device(stats)),
        "kind": device["type"],
        "memory_gib": round(device.get("vram_total", 0) / 2**30, 1),
        "torch": str(system.get("pytorch_version")),
        "comfyui": str(system.get("comfyui_version")),
        "system": str(system.get("os")),
    }


if __name__ == "__main__":
    sys.exit(main())
