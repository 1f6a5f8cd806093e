"""One picture on two GPUs by ComfyUI's own MultiGPU CFG Split: `COMFYUI_DIR=... python -m lab.speed.multigpu`.

ComfyUI runs the prompted rows on one GPU and the unprompted ones on the other, each with a copy of the model and a
thread of its own. Models, steps and how they are timed are those of hosts.py; all variants on one and on two GPUs take
turns, and the speedup is against unmerged on one. `differs`: how far the latent after a few steps is from that of one
GPU with the same variant and seed, at most, in units of the largest value; a batch of both rows is rounded otherwise
than the rows alone, with or without merging.

On the CPU, for a try, ComfyUI is given the CPU under two names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from installer import inprocess

from . import hosts
from .common import Budget, Store, add_output_options, machine, show, step_columns, take_turns, versions

KEYS = ("model", "pixels", "images", "gpus", "variant")
VARIANTS = ("unmerged", "sample 0.75", "sample 0.9375")
GPUS = (1, 2)
# What is measured: a variant, and on how many GPUs.
Case = tuple[str, int]


@contextmanager
def two_devices(device: torch.device) -> Iterator[None]:
    """ComfyUI finds two devices on the CPU, its names "cpu" and "cpu:0"; GPUs it finds by itself."""
    import comfy.model_management as management

    kept = management.get_all_torch_devices
    if device.type == "cpu":
        management.get_all_torch_devices = lambda exclude_current=False: [device, torch.device("cpu", 0)]
    try:
        yield
    finally:
        management.get_all_torch_devices = kept


def build(kind: str, device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
    """{number of GPUs: ModelPatcher}: the model on `device`, and the same one with a copy on a second device.

    Raises ValueError where there is no second one.
    """
    import comfy.multigpu

    model = hosts.build(kind, device, dtype, seed=0)
    # What ComfyUI makes another GPU's copy by; its own loaders leave here how to load the file once more.
    model.cached_patcher_init = (hosts.build, (kind, device, dtype, 0))
    with two_devices(device):
        split = comfy.multigpu.create_multigpu_deepclones(model, 2)  # the node MultiGPU CFG Split
    if len(split.get_additional_models_with_key("multigpu")) != 1:
        raise ValueError(f"ComfyUI finds no second GPU beside {device}")
    return {1: model, 2: split}


def difference(latent: torch.Tensor, from_one: torch.Tensor) -> float:
    """The largest difference in units of the largest value."""
    return float((latent - from_one).abs().max() / from_one.abs().max())


def measure(
    models: dict[int, Any], kind: str, size: int, cases: Sequence[Case], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds.

    cases: unmerged on one GPU among them, and each variant that runs on two also on one.
    """

    def patched(case: Case) -> Any:
        name, gpus = case
        return hosts.variant(models[gpus], kind, name)

    def compared(case: Case) -> torch.Tensor:
        return hosts.sample(patched(case), kind, size, args.compared, args.images).float().cpu()

    def turn(case: Case) -> list[float]:
        return hosts.step_times(patched(case), kind, size, args.steps, args.images)

    latents = {case: compared(case) for case in cases}  # these runs warm up too
    found = take_turns({case: lambda case=case: turn(case) for case in cases}, args.seconds, args.least)
    for (name, gpus), times in found.items():
        yield {
            "host": "ComfyUI",
            "model": kind,
            "pixels": size,
            "images": args.images,
            "gpus": gpus,
            "variant": name,
            **step_columns(found["unmerged", 1], times),
            "differs": f"{difference(latents[name, gpus], latents[name, 1]):.2e}" if gpus > 1 else "",
            "compared_steps": args.compared,
            "steps": len(times),
            "device": args.device,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = os.environ.get("COMFYUI_DIR")
    parser.add_argument("--comfyui", type=Path, default=named, required=named is None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", choices=list(hosts.MODELS), help="sd15 and sdxl; on the CPU tiny")
    parser.add_argument("--sizes", nargs="+", type=int, help="1024 and 2048; on the CPU 128")
    parser.add_argument("--images", type=int, default=1, help="of a batch")
    able = [name for name in hosts.VARIANTS if name != "limit"]  # which changes the first GPU's copy alone
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=able)
    parser.add_argument("--steps", type=int, default=6, help="of each run that is timed; the first two do not count")
    parser.add_argument("--compared", type=int, default=4, help="steps of the runs whose latents are compared")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the rounds of one model and size")
    parser.add_argument("--least", type=int, default=2, help="rounds that are run in any case")
    add_output_options(parser)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps must be 3 or more, for two do not count, got {args.steps}")
    if args.images < 1 or args.compared < 1:
        parser.error(f"--images and --compared must be 1 or more, got {args.images} and {args.compared}")
    on_gpu = args.device == "cuda"
    inprocess.start(Path(args.comfyui), ["--gpu-only"] if on_gpu else ["--cpu"], absent=["av"])
    # With its number: ComfyUI takes "cuda" and "cuda:0" for two devices.
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("triton")}
    about["machine"] = f"{max(GPUS)} x {about['machine']}" if on_gpu else about["machine"]
    kinds = args.models or (["sd15", "sdxl"] if on_gpu else ["tiny"])
    sizes = args.sizes or ([1024, 2048] if on_gpu else [128])
    built: dict[str, dict[int, Any]] = {}
    for kind, size in tqdm([(kind, size) for kind in kinds for size in sizes], file=sys.stderr):
        key = {"model": kind, "pixels": size, "images": args.images}
        every = [(name, gpus) for name in args.variants for gpus in GPUS]
        wanted = [(name, gpus) for name, gpus in every if not store.has(**key, gpus=gpus, variant=name)]
        if not wanted:
            continue
        if budget.spent:
            print("stopped by --minutes; the same command goes on", file=sys.stderr)
            break
        if kind not in built:
            built[kind] = build(kind, device, torch.float16 if on_gpu else torch.float32)
        compared = [case for name, gpus in wanted for case in ((name, 1), (name, gpus))]
        for row in measure(built[kind], kind, size, list(dict.fromkeys([("unmerged", 1), *compared])), args):
            store.add({**row, **about})
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
