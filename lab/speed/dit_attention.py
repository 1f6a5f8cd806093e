"""Weighing keys in one softmax with text, by attention alone: `python -m lab.speed.dit_attention`.

A transformer's attention to image and text where the image's keys are sampled: each of them stands for several tokens
and must weigh as much. Ways: "joined" attends to image and text in two calls and joins them by their log-sum-exps (what
ToMe does with cuDNN), "at once" adds the weights in a kernel of ToMe's (what it does in place of torch's other
kernels), "channels" adds channels to the heads (128 become 136; elsewhere), "mask" adds the weights as a mask,
"unweighted" leaves them out: wrong, and the floor. "full" attends to all tokens. Queries are the same in all; what is
drawn and gathered is not counted. `error` is the largest difference to float64 on the first queries, of the largest
value.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from shared_tome.attention.bias import attend, attend_wider
from shared_tome.attention.combine import attend_in_parts, choose_kernel

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
    spread,
    take_turns,
    turn_of,
    versions,
)

# name: (image tokens, text tokens, heads of 128).
SHAPES = {
    "flux 1024²": (64 * 64, 512, 24),
    "flux 2048²": (128 * 128, 512, 24),
    "qwen 1328²": (83 * 83, 128, 24),
    "wan 832x480, 81 frames": (21 * 30 * 52, 0, 40),
    "wan 1280x720, 81 frames": (21 * 45 * 80, 0, 40),
    "tiny": (96, 7, 2),
}
RATIOS = (0.75, 0.9375)
WAYS = ("full", "unweighted", "channels", "joined", "at once", "mask")
KEYS = ("shape", "backend", "dtype", "ratio", "way")


def joined(q: Tensor, k: Tensor, v: Tensor, image: int, weight: float, backend: str) -> Tensor:
    """The first `image` keys, each of this weight, and the rest in two calls. q [B, H, N, d], k and v [B, H, M, d]."""
    if image == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v)
    cut = (image, k.shape[2] - image)
    (image_k, text_k), (image_v, text_v) = k.split(cut, dim=2), v.split(cut, dim=2)
    order = [backend, *BACKENDS] if backend in BACKENDS else list(BACKENDS)
    kernel = choose_kernel(order, q.device, q.dtype, q.shape[-1])
    if kernel is None:
        raise RuntimeError(f"no kernel of {', '.join(order)} tells its log-sum-exps here")
    parts = [(image_k, image_v, math.log(weight)), (text_k, text_v, 0.0)]
    return attend_in_parts(q, parts, kernel).transpose(1, 2)


def exactly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """In float64, for the first 32 queries. bias: [1, M]."""
    q, k, v = q[:, :, :32].double(), k.double(), v.double()
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5) + bias.double()).softmax(-1) @ v


def ways(shape: str, ratio: float, args: argparse.Namespace) -> dict[str, tuple[Callable[[], Tensor], Tensor | None]]:
    """What is timed, and what its outcome should be."""
    tokens, text, heads = SHAPES[shape]
    kept, d = max(1, round(tokens * (1 - ratio))), 32 if shape == "tiny" else 128
    generator = torch.Generator(args.device).manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(1, heads, length, d, generator=generator, device=args.device, dtype=DTYPES[args.dtype])

    q, weight = draw(tokens + text), tokens / kept
    all_k, all_v = draw(tokens + text), draw(tokens + text)
    k, v = (torch.cat((x[:, :, :kept], x[:, :, tokens:]), dim=2) for x in (all_k, all_v))
    bias = F.pad(torch.full((1, kept), math.log(weight), device=args.device), (0, text))
    mask = bias.to(q.dtype)[:, None, None].expand(1, 1, q.shape[2], -1)
    attention = F.scaled_dot_product_attention
    wanted = exactly(q, k, v, bias)
    return {
        "full": (lambda: attention(q, all_k, all_v), None),
        "unweighted": (lambda: attention(q, k, v), None),
        "channels": (lambda: attend_wider(q, k, v, bias, d**-0.5), wanted),
        "joined": (lambda: joined(q, k, v, kept, weight, args.backend), wanted),
        "at once": (lambda: attend(q, k, v, bias), wanted),
        "mask": (lambda: attention(q, k, v, attn_mask=mask), wanted),
    }


def measure(shape: str, ratio: float, names: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one shape and ratio, all from the same rounds."""
    tokens, text, heads = SHAPES[shape]
    turns: dict[str, Callable[[], list[float]]] = {}
    errors, remarks = dict.fromkeys(names, ""), dict.fromkeys(names, "")
    for name, (call, wanted) in ways(shape, ratio, args).items():
        if name not in names:
            continue
        try:
            out = call()
            if wanted is not None:
                error = (out[:, :, : wanted.shape[2]].double() - wanted).abs().max() / wanted.abs().max()
                errors[name] = f"{float(error):.1e}"
            del out
            timed = captured(call) if args.device == "cuda" else call
        except RuntimeError as error:  # a kernel that this device or torch does not have
            remarks[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        turns[name] = turn_of(timed, args.device, together=0.01)
    found = take_turns(turns, args.seconds, args.least)
    for name in names:
        time = spread(found[name]) if name in found else None
        yield {
            "shape": shape,
            "tokens": tokens,
            "text": text,
            "heads": heads,
            "ratio": ratio,
            "way": name,
            "dtype": args.dtype,
            "backend": args.backend,
            "us": 1e6 * time["median"] if time else "",
            "p20": 1e6 * time["p20"] if time else "",
            "p80": 1e6 * time["p80"] if time else "",
            "error": errors[name],
            "rounds": len(found.get(name, ())),
            "remark": remarks[name],
            "device": args.device,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--shapes", nargs="+", default=None, choices=list(SHAPES))
    parser.add_argument("--backends", nargs="+", default=None, choices=["default", *BACKENDS])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the rounds of one shape and ratio")
    parser.add_argument("--least", type=int, default=5, help="rounds that are run in any case")
    add_output_options(parser)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    shapes = args.shapes or ([name for name in SHAPES if name != "tiny"] if on_gpu else ["tiny"])
    backends = args.backends or (["cudnn", "flash"] if on_gpu else ["default"])
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("triton")}
    jobs = [(shape, ratio, backend) for backend in backends for shape in shapes for ratio in RATIOS]
    for shape, ratio, args.backend in tqdm(jobs, file=sys.stderr):
        key = {"shape": shape, "ratio": ratio, "backend": args.backend, "dtype": args.dtype}
        # The mask of a long video is as large as its scores.
        names = [way for way in WAYS if not store.has(**key, way=way) and (SHAPES[shape][1] or way != "mask")]
        if not names:
            continue
        if budget.spent:
            print("stopped by --minutes; the same command goes on", file=sys.stderr)
            break
        with torch.no_grad(), attention_by(args.backend):
            for row in measure(shape, ratio, names, args):
                store.add({**row, **about})
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
