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

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..models.full_unets import MODELS, TOMESD, VARIANTS, Inputs, Step, build, levels_of
from .common import (
    BACKENDS,
    DTYPES,
    Budget,
    Store,
    add_output_options,
    attention_by,
    captured,
    machine,
    show,
    step_columns,
    take_turns,
    turn_of,
    versions,
)

KEYS = ("model", "pixels", "mode", "backend", "dtype", "variant")


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


def measure(
    model: nn.Module, name: str, pixels: int, mode: str, variants: Sequence[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one model, size, mode and attention backend, all from the same rounds."""
    inputs, levels = Inputs(name, pixels, args.device, DTYPES[args.dtype]), levels_of(name, pixels)
    turns: dict[str, Callable[[], list[float]]] = {}
    remarks: dict[str, str] = {}
    for variant in variants:
        call, remarks[variant] = made_ready(model, name, variant, inputs, levels, mode)
        if call is not None:
            turns[variant] = turn_of(call, args.device)
    found = take_turns(turns, args.seconds, args.least)
    for variant in variants:
        times = found.get(variant)
        yield {
            "model": name,
            "pixels": pixels,
            "levels": " ".join(str(level) for level in levels),
            "batch": 2,
            "dtype": args.dtype,
            "mode": mode,
            "backend": args.backend,
            "variant": variant,
            **step_columns(found["unmerged"], times),
            "rounds": len(times) if times else 0,
            "remark": remarks[variant],
            "device": args.device,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="float16 on a GPU, float32 on the CPU")
    parser.add_argument("--models", nargs="+", default=None, choices=list(MODELS))
    parser.add_argument("--pixels", nargs="+", type=int, default=None, help="those of the model's sizes alone")
    parser.add_argument("--modes", nargs="+", default=None, choices=["graph", "eager"])
    parser.add_argument("--backends", nargs="+", default=None, choices=["default", *BACKENDS])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of one model and size")
    parser.add_argument("--least", type=int, default=5, help="rounds that are run in any case")
    add_output_options(parser)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("float16" if on_gpu else "float32")
    modes = args.modes or (["graph", "eager"] if on_gpu else ["eager"])
    if not on_gpu and "graph" in modes:
        parser.error("mode graph needs a GPU")
    backends = args.backends or (["cudnn", "flash", "efficient"] if on_gpu else ["default"])
    jobs = [
        (backend, mode, name, pixels)
        for backend in backends
        for mode in modes
        for name in args.models or (["sd15", "sdxl"] if on_gpu else ["tiny"])
        for pixels in MODELS[name].pixels
        if args.pixels is None or pixels in args.pixels
    ]
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("diffusers", "tomesd", "triton")}
    models: dict[str, nn.Module] = {}
    for args.backend, mode, name, pixels in tqdm(jobs, file=sys.stderr):
        key = {"model": name, "pixels": pixels, "mode": mode, "backend": args.backend, "dtype": args.dtype}
        wanted = [variant for variant in args.variants if not store.has(**key, variant=variant)]
        if not wanted:
            continue
        if budget.spent:
            print("stopped by --minutes; the same command goes on", file=sys.stderr)
            break
        if name not in models:
            models[name] = build(name, args.device, DTYPES[args.dtype])
        with attention_by(args.backend):
            for row in measure(models[name], name, pixels, mode, list(dict.fromkeys(["unmerged", *wanted])), args):
                store.add({**row, **about})
        if on_gpu:
            torch.cuda.empty_cache()
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
