"""One picture on two GPUs by ComfyUI's own MultiGPU CFG Split: `COMFYUI_DIR=... python -m lab.speed.multigpu`.

ComfyUI runs the prompted rows on one GPU and the unprompted ones on the other, each with a copy of the model and a
thread of its own. Models, steps and how they are timed are those of hosts.py; all variants on one and on two GPUs take
turns, and the speedup is against unmerged on one. `differs`: how far the latent after a few steps is from that of one
GPU with the same variant and seed, at most, in units of the largest value; a batch of both rows is rounded otherwise
than the rows alone, with or without merging.

On the CPU, for a try, ComfyUI is given the CPU under two names.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from ..timing import take_turns
from . import hosts
from .common import DTYPES, Arguments, Job, machine, run_jobs, step_columns

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
    """{number of GPUs: ModelPatcher}: the model on `device`, and the same one with a copy on a second device. Raises
    ValueError where there is no second one."""
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


def measure(models: dict[int, Any], job: Job, wanted: Sequence[Case], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds; each variant that runs on two GPUs also runs on one."""
    kind, size = job["model"], job["pixels"]
    cases = dict.fromkeys(case for name, gpus in wanted for case in ((name, 1), (name, gpus)))

    def patched(case: Case) -> Any:
        return hosts.variant(models[case[1]], kind, case[0])

    def compared(case: Case) -> torch.Tensor:
        return hosts.sample(patched(case), kind, size, args.compared, args.images).float().cpu()

    def turn(case: Case) -> list[float]:
        return hosts.step_times(patched(case), kind, size, args.steps, args.images)

    latents = {case: compared(case) for case in cases}  # these runs warm up too
    found = take_turns({case: lambda case=case: turn(case) for case in cases}, args.seconds, args.least)
    for (name, gpus), times in found.items():
        yield {
            "gpus": gpus, "variant": name, **step_columns(found["unmerged", 1], times),
            "differs": f"{difference(latents[name, gpus], latents[name, 1]):.2e}" if gpus > 1 else "",
            "compared_steps": args.compared, "steps": len(times), "device": args.device,
        }  # fmt: skip


def positive(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def main() -> None:
    parser = Arguments(__doc__, rounds=(4.0, 2), comfyui=True, steps=6)
    parser.some_of("--models", hosts.MODELS, ["sd15", "sdxl"], ["tiny"])
    parser.some_of("--sizes", None, [1024, 2048], [128], type=int)
    parser.add_argument("--images", type=positive, default=1, help="of a batch")
    able = [name for name in hosts.VARIANTS if name != "limit"]  # which changes the first GPU's copy alone
    parser.some_of("--variants", able, VARIANTS)
    parser.add_argument("--compared", type=positive, default=4, help="steps of the runs whose latents are compared")
    args = parser.parsed()
    # With its number: ComfyUI takes "cuda" and "cuda:0" for two devices.
    device = torch.device("cuda", torch.cuda.current_device()) if args.on_gpu else torch.device("cpu")
    jobs = [
        {"host": "ComfyUI", "model": kind, "pixels": size, "images": args.images}
        for kind in args.models
        for size in args.sizes
    ]
    models = lru_cache(lambda kind: build(kind, device, DTYPES["float16" if args.on_gpu else "float32"]))
    run_on_gpus(args, jobs, measure, model=models)


def run_on_gpus(args: Namespace, jobs: Sequence[Job], measure: Any, **more: Any) -> None:
    """run_jobs with every variant on one and on two GPUs, beside unmerged on one."""
    cases = [(name, gpus) for name in args.variants for gpus in GPUS]
    about = {"machine": f"{max(GPUS)} x {machine(args.device)['machine']}"} if args.on_gpu else {}
    run_jobs(args, jobs, measure, lambda _: cases, by="variant gpus", first=[("unmerged", 1)], about=about, **more)


if __name__ == "__main__":
    main()
