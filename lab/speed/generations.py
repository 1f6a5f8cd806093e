"""Whole generations in a real ComfyUI, full size, random weights: merging beside what people would use in its place.

    COMFYUI_DIR=... python -m lab.speed.generations --models sd15 --out lab/results/speed/generations.csv

Each choice samples a whole picture or video through ComfyUI's sampler: guidance on U-Nets, one call a step on
transformers. The choices take turns, each warm; `speedup` is turn against turn. `seconds` are the sampler's; decoding
the latent takes `decode_s` more, whatever was chosen, where images are made. The text encoder is not in it.
One command a model and attention, each within three minutes on an H200 (--minutes stops it, the same command goes on):

    --models sd15                          512², 1024², 2048²
    --models sdxl                          1024², 2048²
    --models flux                          1024², 2048² (here the short list of choices)
    --models wan --seconds 1 --least 1     720p, 4 steps of 20: the column `steps` beside `of_steps` says so
    ... --attention flash                  by flash in place of cuDNN's attention
    --models sd15 --sizes 2048² --choices unmerged Quality "Quality exact every 4"    (exact_every, from 3, 4 and 6)
    --models sd15 --sizes 1024² --choices torch.compile "torch.compile + Balanced"    (compiling takes minutes)

EasyCache and LazyCache: with random weights their own decision means nothing, so they skip as large a share of the
steps as on the lab's model of the kind at that threshold (lab/results/fidelity/frontier-*.csv, or --skip "EasyCache
0.2=0.4"). ComfyUI's sparse attention is not in 0.30.0. tomesd replaces `_forward`, which ComfyUI's blocks do not have:
what it does is core's node TomePatchModel there. What cannot run has a row with a remark and no time.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shared_tome.methods import PRESETS

from ..fidelity.methods import EXACT_EVERY
from ..store import RESULTS, read
from ..timing import columns, spread, take_turns
from . import dit, forced, hosts
from .common import BACKENDS, DTYPES, Arguments, Job, run_jobs, seconds_of, speedup

TOMESD = "TomePatchModel 0.5"
EXACTS = tuple(f"Quality{EXACT_EVERY}{every}" for every in (3, 4, 6))
COMMON = ("unmerged", *PRESETS, "EasyCache 0.2", "EasyCache 0.2 + Balanced", "75% of the steps", "SageAttention")
UNETS = (*COMMON, "EasyCache 0.2 + Fast", TOMESD, "HyperTile 256", "SageAttention + Balanced", "tomesd 0.5")
DITS = (*COMMON, "EasyCache 0.2 + Fast", "SageAttention + Balanced", "sparse attention")
SHORT = ("unmerged", "Balanced", "Fast", "EasyCache 0.2", "EasyCache 0.2 + Balanced")
NEVER = {
    "tomesd 0.5": "replaces _forward, which ComfyUI's blocks do not have: see TomePatchModel",
    "sparse attention": "this ComfyUI has none",
}


# ComfyUI's own nodes: their module, class and inputs, of what follows the name.
NODES: dict[str, tuple[str, str, Callable[[str], list[Any]]]] = {
    "TomePatchModel": ("nodes_tomesd", "TomePatchModel", lambda ratio: [float(ratio)]),
    "HyperTile": ("nodes_hypertile", "HyperTile", lambda tile: [int(tile), 2, 0, False]),
    "torch.compile": ("nodes_torch_compile", "TorchCompileModel", lambda _: ["inductor"]),
}


@dataclass(frozen=True)
class Model:
    """sizes: name and its choices. steps: how many are run; of: how many a user takes.

    lab: the model of lab/results/fidelity/frontier-LAB.csv that says what caches skip. least: tokens of a merged layer.
    """

    sizes: dict[str, Sequence[str]]
    lab: str
    steps: int = 20
    of: int = 20
    dtype: str = "float16"
    least: int = 2048


MODELS = {
    "sd15": Model({"512²": UNETS, "768²": UNETS, "1024²": UNETS, "1536²": UNETS, "2048²": (*UNETS, *EXACTS)}, "lab"),
    "sdxl": Model({"1024²": UNETS, "2048²": UNETS}, "lab"),
    "flux": Model({"1024²": DITS, "2048²": SHORT}, "dit", dtype="bfloat16"),
    "wan": Model({"1280x720, 81 frames": SHORT}, "dit", steps=4, dtype="bfloat16"),
    "tiny": Model({"128²": (*UNETS, *EXACTS)}, "lab", steps=10, of=10, dtype="float32", least=64),
    "flux-tiny": Model({"192x128": DITS}, "dit", steps=10, of=10, dtype="float32", least=64),
    "wan-tiny": Model({"96x64, 9 frames": SHORT}, "dit", steps=10, of=20, dtype="float32", least=64),
}
AUTOENCODER = {
    "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
LEFT_OUT = ("768²", "1536²")  # unless they are asked for


def build(name: str, device: torch.device) -> Any:
    dtype = DTYPES[MODELS[name].dtype if device.type == "cuda" else "float32"]
    if name in hosts.MODELS:
        return hosts.build(name, device, dtype, seed=0)  # weights with which numbers stay numbers
    return dit.build(name, device, dtype, whole=not name.endswith("tiny"))


def generate(model: Any, name: str, size: str, steps: int) -> torch.Tensor:
    """The latent that ComfyUI's sampler makes, always of the same seed."""
    if name in hosts.MODELS:
        # The lab's own schedule, where caches may skip what they may there.
        return hosts.sample(model, name, int(size.rstrip("²")), steps, scheduler="simple")
    import comfy.sample

    which, generator = dit.MODELS[name], torch.Generator().manual_seed(0)
    told = {"pooled_output": torch.randn(which.told["y"], generator=generator)} if "y" in which.told else {}
    prompt = [[torch.randn((1, *which.text), generator=generator), {**told, "guidance": 3.5}]]
    noise = torch.randn(which.latents[size], generator=generator)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise), disable_pbar=True, seed=0
    )


def share_skipped(choice: str, model: Model, args: Namespace) -> float:
    """Of all steps, by --skip or as on the lab's model. Raises ValueError where neither says it."""
    if choice in args.skip:
        return args.skip[choice]
    path = args.frontier / f"frontier-{model.lab}.csv"
    for row in read(path):
        if row["variant"] == choice:
            return 1.0 - float(row["calls_whole"]) - float(row["calls_merged"])
    raise ValueError(f'{path} has no row {choice!r}: measure it, or give --skip "{choice}=0.4"')


@dataclass
class Ready:
    """A choice put on a model. skips, done: the steps that a cache is to skip, and those that it did. remark: why it
    cannot run, and then nothing else holds."""

    model: Any
    steps: int
    skips: Sequence[int] = ()
    done: Sequence[int] = ()
    remark: str = ""


def made_ready(model: Any, name: str, choice: str, args: Namespace) -> Ready:
    """A choice is parts joined by " + ", which are put on in this order, but torch.compile as the last."""
    which, steps = MODELS[name], args.steps or MODELS[name].steps
    ready = Ready(model, steps, remark=NEVER.get(choice, ""))
    if ready.remark:
        return ready
    for part in sorted(choice.split(" + "), key=lambda part: part == "torch.compile"):
        kind, _, amount = part.partition(" ")
        if kind in PRESETS:
            every = part.partition(EXACT_EVERY)[2]
            more = {"exact_every": int(every or 0), "min_tokens": which.least}
            ready.model = hosts.with_tome(ready.model, {**PRESETS[kind].options, **more})
        elif kind in ("EasyCache", "LazyCache"):
            try:
                ready.skips = forced.skipped(kind, steps, share_skipped(choice, which, args))
            except forced.TooManyError as error:
                return Ready(model, steps, remark=str(error))
            ready.model, ready.done = forced.cached(ready.model, kind, ready.skips)
        elif part.endswith("% of the steps"):
            ready.steps = round(float(kind.rstrip("%")) / 100 * steps)
        elif kind in NODES:
            module, node, told = NODES[kind]
            ready.model = hosts.core_node(ready.model, module, node, *told(amount))
        elif part == "SageAttention":
            from comfy.ldm.modules import attention

            if not attention.SAGE_ATTENTION_IS_AVAILABLE:
                return Ready(model, steps, remark="sageattention cannot be imported")
            ready.model = with_sage(ready.model)
        elif part != "unmerged":
            raise ValueError(f"no choice is named {part!r}, in {choice!r}")
    return ready


def run(ready: Ready, name: str, size: str) -> None:
    """A whole generation. Raises RuntimeError where a cache did not skip what it was to."""
    generate(ready.model, name, size, ready.steps)
    if sorted(ready.done) != list(ready.skips):
        raise RuntimeError(f"steps {sorted(ready.done)} were skipped, it was to be {ready.skips}")


def with_sage(model: Any) -> Any:
    """A clone whose attention is SageAttention's by ComfyUI's own function, as KJNodes' node puts it on."""
    from comfy.ldm.modules.attention import attention_sage

    def override(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention_sage(*args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


@torch.no_grad()
def decode_seconds(shape: tuple[int, ...], device: str, width: int = 128, repeats: int = 3) -> float:
    """The median of some decodings of a latent [B, C, h, w] by ComfyUI's own autoencoder, with random weights, warm; in
    bfloat16 on a GPU, as ComfyUI does there.

    width: channels of the first level; Stable Diffusion's and Flux's have 128.
    """
    from comfy.ldm.models.autoencoder import AutoencoderKL

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        layout = {**AUTOENCODER, "z_channels": shape[1], "ch": width}
        model = AutoencoderKL(ddconfig=layout, embed_dim=shape[1]).to(dtype)
        latent = torch.randn(shape, dtype=dtype)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(0.5)
    model.decode(latent)
    return spread([seconds_of(lambda: model.decode(latent), device) for _ in range(repeats)])["median"]


def measure(model: Any, job: Job, names: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model, size and attention, all from the same rounds."""
    name, size = job["model"], job["size"]
    turns = {}
    with hosts.choose_attention(job["backend"]):
        ready = {choice: made_ready(model, name, choice, args) for choice in names}
        for choice, one in ready.items():
            if not one.remark:
                # Kernels are compiled here, and auto decides what pays. Two steps: the second is behind every start.
                shape = generate(one.model, name, size, max(2, one.steps // 5)).shape
                turns[choice] = lambda one=one: [seconds_of(lambda: run(one, name, size), args.device)]
        found = take_turns(turns, args.seconds, args.least)
        is_image = len(shape) == 4  # [B, C, h, w]; of a video [B, C, frames, h, w]
        decode = decode_seconds(shape, args.device, 32 if name.endswith("tiny") else 128) if is_image else ""
    for choice, one in ready.items():
        times = found.get(choice)
        yield {
            "choice": choice,
            **columns(spread(times) if times else None, "seconds"), **speedup(found["unmerged"], times),
            "decode_s": decode, "steps": one.steps, "of_steps": MODELS[name].of,
            "skipped": " ".join(map(str, one.skips)), "rounds": len(times or ()), "remark": one.remark,
            "device": args.device,
        }  # fmt: skip


def _skip(text: str) -> tuple[str, float]:
    choice, _, share = text.rpartition("=")
    try:
        return choice, float(share)
    except ValueError:
        raise ArgumentTypeError(f'must be like "EasyCache 0.2=0.4", got {text!r}') from None


def main() -> None:
    parser = Arguments(__doc__, rounds=(12.0, 2), comfyui=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="small models alone: for a try on the CPU")
    parser.add_argument("--sizes", nargs="+", help="some of the model's")
    parser.add_argument("--choices", nargs="+", help="in place of the size's own")
    parser.some_of("--attention", ["default", *BACKENDS], ["cudnn"], ["default"], dest="backends")
    parser.add_argument("--steps", type=int, help="in place of the model's own")
    parser.add_argument("--skip", nargs="+", type=_skip, default=[], help='a share of the steps: "EasyCache 0.2=0.4"')
    parser.add_argument("--frontier", type=Path, default=RESULTS / "fidelity", help="where frontier-LAB.csv are")
    args = parser.parsed()
    args.skip = dict(args.skip)
    jobs = [
        {"model": name, "size": size, "backend": kind, "dtype": MODELS[name].dtype if args.on_gpu else "float32"}
        for name in args.models or [name for name in MODELS if name.endswith("tiny") == args.tiny]
        for kind in args.backends
        for size in MODELS[name].sizes
        if (size in args.sizes if args.sizes else size not in LEFT_OUT)
    ]
    model = lru_cache(1)(lambda name: build(name, torch.device(args.device)))

    def choices(job: Job) -> Sequence[str]:
        return args.choices or MODELS[job["model"]].sizes[job["size"]]

    about = {"comfyui": import_module("comfyui_version").__version__}
    packages = ("triton", "sageattention")
    run_jobs(args, jobs, measure, choices, model, by="choice", packages=packages, about=about)


if __name__ == "__main__":
    main()
