"""ToMe in ComfyUI's Flux, Qwen-Image and Wan 14B: `COMFYUI_DIR=... python -m lab.speed.dit --out dit.csv`.

The real classes in bfloat16 with blocks of full size, random weights and few of them (models/full_dits.py), called as
the sampler calls them, ToMe through its node's own way. `step_ms` is what a model of full depth would take: the time
of the blocks, each kind times its depth, and the rest once; `measured_ms` is what was run. One image or video and no
guidance (guidance by two calls doubles both). "limit" leaves the attention itself out, its projections stay.
"unweighted" gives each sampled token the weight of one, which is wrong beside text and shows what weighing costs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from .full_dits import MODELS, BlockClock, ModelInputs, build, with_tome, without_attention
from .variants import options_of
from ..timing import columns, spread, take_turns
from .common import BACKENDS, DTYPES, Arguments, Job, run_jobs, start_comfyui
from .hosts import choose_attention

VARIANTS = (
    *("unmerged", "sample 0.5", "sample 0.75", "sample 0.9375", "sample 0.75, own token", "sample 0.9375, own token"),
    *("sample 0.75, unweighted", "sample 0.9375, unweighted", "multires 0.67", "multires 0.77", "multires 0.84"),
    *("multires 0.77, where it pays", "merge 0.25", "merge 0.5", "limit"),
)


def variant(model: Any, name: str, tokens: int) -> Any:
    if name in ("unmerged", "limit"):
        return without_attention(model, tokens) if name == "limit" else model
    # Whatever it costs: levels "auto" would leave alone what does not pay, and not show what it costs.
    return with_tome(model, {"min_tokens": min(tokens, 2048), "levels": "0", **options_of(name)})


def measure(model: Any, job: Job, names: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds."""
    name, size = job["model"], job["size"]
    which, device = MODELS[name], model.load_device
    call, clock, tokens = ModelInputs(name, size, device), BlockClock(model, name, device), which.tokens(size)
    turns: dict[str, Callable[[], list[tuple[float, float]]]] = {}
    with choose_attention(job["backend"]):
        for each in names:
            clone = variant(model, each, tokens)
            call(clone)  # warm
            turns[each] = lambda clone=clone: [clock.time(lambda: call(clone))]
        found = take_turns(turns, args.seconds, args.least)
    full = {each: spread([times[1] for times in all_times]) for each, all_times in found.items()}
    base = full["unmerged"]["median"]
    for each in names:
        yield {
            "tokens": tokens,
            "text": which.text[0] if which.joint else 0,
            "blocks": " + ".join(str(made) for made, _ in which.depths.values()),
            "depth": " + ".join(str(depth) for _, depth in which.depths.values()),
            "variant": each,
            **columns(full[each], "step_ms", "step_"),
            "speedup": f"{base / full[each]['median']:.3f}",
            "measured_ms": spread([times[0] for times in found[each]])["median"],
            "attention_share": f"{1 - full['limit']['median'] / base:.3f}" if "limit" in full else "",
            "rounds": len(found[each]),
            "device": device.type,
        }


def main() -> None:
    parser = Arguments(__doc__, "bfloat16", (4.0, 3), comfyui=True)
    parser.one_of("--models", MODELS, None)
    parser.one_of("--backends", ["default", *BACKENDS], None)
    parser.one_of("--variants", VARIANTS, VARIANTS)
    args = parser.parsed()
    start_comfyui(args)
    jobs = [
        ({"model": name, "size": size, "backend": backend, "dtype": args.dtype}, args.variants)
        for name in args.models or (["flux", "qwen", "wan"] if args.on_gpu else ["flux-tiny", "wan-tiny"])
        for size in MODELS[name].latents
        for backend in args.backends or (["cudnn", "flash"] if args.on_gpu else ["default"])
    ]
    # One at a time: two of them fill a GPU.
    model = lru_cache(1)(lambda name: build(name, torch.device(args.device), DTYPES[args.dtype]))
    run_jobs(args, jobs, lambda job, wanted: measure(model(job["model"]), job, wanted, args), first=["unmerged"])


if __name__ == "__main__":
    main()
