"""ToMe in ComfyUI's Flux, Qwen-Image and Wan 14B: `COMFYUI_DIR=... python -m lab.speed.dit --out dit.csv`.

The real classes in bfloat16 with blocks of full size, random weights and few of them (models/full_dits.py), called as
the sampler calls them, ToMe through its node's own way. `step_ms` is what a model of full depth would take: the time
of the blocks, each kind times its depth, and the rest once; `measured_ms` is what was run. One image or video and no
guidance (guidance by two calls doubles both). "limit" leaves the attention itself out, its projections stay.
"unweighted" gives each sampled token the weight of one, which is wrong beside text and shows what weighing costs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from installer import inprocess

from ..models.full_dits import MODELS, BlockClock, Call, build, without_attention
from .common import DTYPES, Budget, Store, add_output_options, machine, show, spread, take_turns, versions
from .hosts import BACKENDS, choose_attention

VARIANTS: dict[str, dict[str, Any] | None] = {
    "unmerged": None,
    "sample 0.5": {"ratio": 0.5, "own_token": False},
    "sample 0.75": {"ratio": 0.75, "own_token": False},
    "sample 0.9375": {"ratio": 0.9375, "own_token": False},
    "sample 0.75, own token": {"ratio": 0.75, "own_token": True},
    "sample 0.9375, own token": {"ratio": 0.9375, "own_token": True},
    "sample 0.75, unweighted": {"ratio": 0.75, "proportional": False},
    "sample 0.9375, unweighted": {"ratio": 0.9375, "proportional": False},
    "merge 0.25": {"ratio": 0.25, "method": "merge"},
    "merge 0.5": {"ratio": 0.5, "method": "merge"},
    "limit": None,
}
KEYS = ("model", "size", "backend", "dtype", "variant")


def variant(model: Any, name: str, tokens: int) -> Any:
    """The model with one variant on it."""
    if name == "limit":
        return without_attention(model, tokens)
    if VARIANTS[name] is None:
        return model
    patch = inprocess.pack_module("comfy_tome.patch")
    # Whatever it costs: levels "auto" would leave alone what does not pay, and not show what it costs.
    return patch.apply_to_model(model, patch.ToMeConfig(**VARIANTS[name], min_tokens=min(tokens, 2048), levels="0"))


def measure(
    model: Any, name: str, size: str, names: Sequence[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds."""
    which, device = MODELS[name], model.load_device
    call, clock, tokens = Call(name, size, device), BlockClock(model, name, device), which.tokens(size)
    turns: dict[str, Callable[[], list[tuple[float, float]]]] = {}
    for each in names:
        clone = variant(model, each, tokens)
        call(clone)  # warm
        turns[each] = lambda clone=clone: [clock.time(lambda: call(clone))]
    found = take_turns(turns, args.seconds, args.least)
    full = {each: spread([times[1] for times in all_times]) for each, all_times in found.items()}
    base = full["unmerged"]["median"]
    share = f"{1 - full['limit']['median'] / base:.3f}" if "limit" in full else ""
    for each in names:
        yield {
            "model": name,
            "size": size,
            "tokens": tokens,
            "text": which.text[0] if which.joint else 0,
            "blocks": " + ".join(str(made) for made, _ in which.depths.values()),
            "depth": " + ".join(str(depth) for _, depth in which.depths.values()),
            "dtype": args.dtype,
            "backend": args.backend,
            "variant": each,
            "step_ms": full[each]["median"],
            "step_p20": full[each]["p20"],
            "step_p80": full[each]["p80"],
            "speedup": f"{base / full[each]['median']:.3f}",
            "measured_ms": spread([times[0] for times in found[each]])["median"],
            "attention_share": share,
            "rounds": len(found[each]),
            "device": device.type,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = os.environ.get("COMFYUI_DIR")
    cuda = torch.cuda.is_available()
    parser.add_argument("--comfyui", type=Path, default=named, required=named is None)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--models", nargs="+", default=None, choices=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=None, choices=["default", *BACKENDS])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the rounds of one model and size")
    parser.add_argument("--least", type=int, default=3, help="rounds that are run in any case")
    add_output_options(parser)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    names = args.models or (["flux", "qwen", "wan"] if on_gpu else ["flux-tiny", "wan-tiny"])
    backends = args.backends or (["cudnn", "flash"] if on_gpu else ["default"])
    inprocess.start(Path(args.comfyui), ["--gpu-only"] if on_gpu else ["--cpu"], absent=["av"])
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("triton")}
    jobs = [(name, size, backend) for name in names for size in MODELS[name].latents for backend in backends]
    model, built = None, ""
    for name, size, args.backend in tqdm(jobs, file=sys.stderr):
        key = {"model": name, "size": size, "backend": args.backend, "dtype": args.dtype}
        wanted = [each for each in args.variants if not store.has(**key, variant=each)]
        if not wanted:
            continue
        if budget.spent:
            print("stopped by --minutes; the same command goes on", file=sys.stderr)
            break
        if built != name:
            model, built = None, name
            model = build(name, torch.device(args.device), DTYPES[args.dtype])
        with choose_attention(args.backend):
            for row in measure(model, name, size, list(dict.fromkeys(["unmerged", *wanted])), args):
                store.add({**row, **about})
        if on_gpu:
            torch.cuda.empty_cache()
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
