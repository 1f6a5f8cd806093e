"""One step of diffusers' SD1.5 and SDXL U-Nets, full size, random weights: `python -m lab.speed.step --out step.csv`.

One picture with guidance, half precision. Everything is counted: seeds, draws, matches, merging and unmerging. The
variants take turns on the same inputs, eagerly or each captured as a CUDA graph (then without the gaps between
launches). In a graph timestep and step number are tensors, so that a host could replay it for every step; after
capturing, each is replayed at another timestep and compared with an eager call there.

"limit" leaves the attention of the layers that are merged out altogether: nothing at the same layers can be faster.
"half at no cost" runs it among half the tokens and counts nothing else: the bound of "merge" and tomesd at 0.5.
tomesd merges at the same levels; "unmerged again" shows how far two rows of the same lie apart. "downsample" is ToDo's
rule and "merge_queries" the one of ComfyUI's own node, both in this project's code. Steps that a schedule leaves
unmerged are not timed: they cost what "unmerged" does.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .full_unets import MODELS, TOMESD, VARIANTS, Inputs, Step, build, levels_of
from ..timing import take_turns
from .common import BACKENDS, DTYPES, Arguments, Job, attention_by, captured, run_jobs, step_columns, turn_of


def made_ready(
    model: nn.Module, name: str, variant: str, inputs: Inputs, levels: tuple[int, ...], mode: str
) -> tuple[Callable[[], Any] | None, str]:
    """(what is timed, warmed up; a remark). None where this variant cannot run here, and the remark says why."""
    try:
        step = Step(model, name, variant, inputs, levels)
    except ImportError as error:
        return None, f"not installed: {error.name}"
    step()
    if mode == "eager":
        return step, ""
    try:
        replay = captured(step, step.generators)
    except Exception as error:  # whatever a foreign patch does that a capture does not allow
        torch.cuda.synchronize()
        return None, f"cannot be captured: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return replay, "" if variant == TOMESD else differs(step, replay, inputs)  # tomesd draws anew in each call


def differs(step: Step, replay: Callable[[], Any], inputs: Inputs) -> str:
    """Says so where a graph, replayed at another timestep, is not what an eager call gives there."""
    out = step.out
    before = inputs.timestep.clone()
    inputs.timestep.copy_(inputs.timesteps[1])
    replay()
    found, expected = out.clone(), step()
    inputs.timestep.copy_(before)
    if torch.equal(found, expected):
        return ""
    worst = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return f"replayed at another step: off by {worst:.1e} of the largest value"


def measure(model: nn.Module, job: Job, variants: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model, size, mode and attention backend, all from the same rounds."""
    name, pixels = job["model"], job["pixels"]
    inputs, levels = Inputs(name, pixels, args.device, DTYPES[args.dtype]), levels_of(name, pixels)
    turns: dict[str, Callable[[], list[float]]] = {}
    remarks: dict[str, str] = {}
    with attention_by(job["backend"]):
        for variant in variants:
            call, remarks[variant] = made_ready(model, name, variant, inputs, levels, job["mode"])
            if call is not None:
                turns[variant] = turn_of(call, args.device)
        found = take_turns(turns, args.seconds, args.least)
    for variant in variants:
        times = found.get(variant)
        yield {
            "levels": " ".join(str(level) for level in levels),
            "batch": 2,
            "variant": variant,
            **step_columns(found["unmerged"], times),
            "rounds": len(times) if times else 0,
            "remark": remarks[variant],
            "device": args.device,
        }


def main() -> None:
    parser = Arguments(__doc__, "float16", (3.0, 5))
    parser.one_of("--models", MODELS, None)
    parser.add_argument("--pixels", nargs="+", type=int, help="those of the model's sizes alone")
    parser.one_of("--modes", ["graph", "eager"], None)
    parser.one_of("--backends", ["default", *BACKENDS], None)
    parser.one_of("--variants", VARIANTS, VARIANTS)
    args = parser.parsed()
    modes = args.modes or (["graph", "eager"] if args.on_gpu else ["eager"])
    if not args.on_gpu and "graph" in modes:
        parser.error("mode graph needs a GPU")
    jobs = [
        {"model": name, "pixels": pixels, "mode": mode, "backend": backend, "dtype": args.dtype}
        for backend in args.backends or (["cudnn", "flash", "efficient"] if args.on_gpu else ["default"])
        for mode in modes
        for name in args.models or (["sd15", "sdxl"] if args.on_gpu else ["tiny"])
        for pixels in MODELS[name].pixels
        if args.pixels is None or pixels in args.pixels
    ]
    model = lru_cache(lambda name: build(name, args.device, DTYPES[args.dtype]))
    run_jobs(
        args,
        [(job, args.variants) for job in jobs],
        lambda job, wanted: measure(model(job["model"]), job, wanted, args),
        first=["unmerged"],
        packages=("diffusers", "tomesd", "triton"),
    )


if __name__ == "__main__":
    main()
