"""Keys at three resolutions by attention alone: `python -m lab.speed.multires`.

One layer of a transformer in half precision. Ways: "multires R" leaves 1 - R of the work of the image's queries,
choosing included; "choosing" is its first two launches; "cudnn" and "flash" attend to all tokens;
"sample R" attends to so many gathered tokens less, without what keeps each query's own; "sol_attn S" is the sparse
attention of comfy-kitchen (S of its tiles whole), where that is installed. Draws, once a step for all layers, are not
counted. `error` is the largest difference to float32 on the same keys, of the largest value.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_tome.core import multires
from shared_tome.core.grid import Grid

from ..timing import columns, spread, take_turns
from .common import DTYPES, Arguments, Job, attention_by, captured, run_jobs, speedup, turn_of

# name: (grid of the image, text tokens, heads, channels of a head).
SHAPES: dict[str, tuple[Grid, int, int, int]] = {
    "flux 1024²": ((64, 64), 512, 24, 128),
    "4608 image tokens": ((64, 72), 0, 24, 128),
    "flux 2048²": ((128, 128), 512, 24, 128),
    "wan 1280x720, 81 frames": ((21, 45, 80), 48, 12, 128),
    "heads of 64": ((96, 96), 154, 24, 64),
}
WORKS = (0.10, 0.16, 0.23, 0.33, 0.50)
SPARSE = (0.10, 0.15)
BESIDE = (1.0, 0.0)  # shares whole and half for queries beside the image


def ways(shape: str, args: Namespace) -> dict[str, tuple[Callable[[], Tensor], Tensor | None]]:
    """What is timed, and what its outcome should be on the first query tile."""
    from shared_tome.kernels.impl.multires import config_for, launch_choose, launch_multires

    grid, text, heads, d = SHAPES[shape]
    device, length, scale = torch.device("cuda"), text + math.prod(grid), d**-0.5
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, d, generator=generator, device=device, dtype=DTYPES[args.dtype]).transpose(1, 2)
        for _ in range(3)
    )
    tiles = multires.cut_tiles(grid, device, text, length)
    drawn = multires.draw_keys(tiles, torch.tensor(0, device=device), 0)

    def attend(kernel: str, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with attention_by(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    found: dict[str, tuple[Callable[[], Tensor], Tensor | None]] = {
        kernel: (attend(kernel, k, v), None) for kernel in ("cudnn", "flash")
    }
    for work in WORKS:
        counts = multires.tile_counts(tiles, *multires.shares(1 - work), BESIDE)
        config = config_for(d, device)
        lists = launch_choose(q, k, tiles, counts, scale, config)
        wanted = exactly(q, k, v, tiles, drawn, lists, counts, scale)
        found[f"multires {1 - work:.2f}"] = (
            lambda counts=counts: launch_multires(q, k, v, tiles, drawn, counts, 0, scale),
            wanted,
        )
    found["choosing"] = (lambda: launch_choose(q, k, tiles, counts, scale, config), None)
    kept = torch.cat((torch.arange(text, device=device), text + torch.arange(0, length - text, 4, device=device)))
    found["sample 0.75"] = (attend("cudnn", *(x.index_select(2, kept).contiguous() for x in (k, v))), None)
    for share in SPARSE:
        sparse = sol_attention(q, k, v, text, share) if d == 128 else None
        if sparse is not None:
            found[f"sol_attn {share}"] = (sparse, None)
    return found


def sol_attention(q: Tensor, k: Tensor, v: Tensor, text: int, share: float) -> Callable[[], Tensor] | None:
    """ComfyUI's sparse attention with that share of its tiles whole, None where comfy-kitchen is missing."""
    try:
        attention = import_module("comfy_kitchen").sol_attn
    except (ImportError, AttributeError):
        return None
    sink = [0, -(-text // 64)] if text else None  # tiles of text are whole, and attend to all
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attention(q, k, v, topk_ratio=share, sink_blocks=sink, sink_q=sink).transpose(1, 2)


def exactly(q, k, v, tiles, drawn, lists, counts, scale) -> Tensor:
    """In float32, for the first query tile: [1, H, queries, d]."""
    places = multires.key_places(tiles, drawn, lists[:, :, 0], counts.whole, counts.half, 0)
    weights = multires.key_weights(tiles, counts.whole, counts.half, q.device).log()
    place = places[..., None].expand(-1, -1, -1, q.shape[-1])
    logits = q[:, :, tiles.rows[: tiles.queries]].float() @ k.gather(2, place).float().mT * scale + weights
    return logits.softmax(-1) @ v.gather(2, place).float()


def measure(job: Job, _: Any, args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one shape, all from the same rounds; speedups are over cuDNN's attention to all tokens."""
    shape = job["shape"]
    grid, text, heads, d = SHAPES[shape]
    tiles = multires.cut_tiles(grid, torch.device("cuda"), text, text + math.prod(grid))
    turns, errors = {}, {}
    for name, (call, wanted) in ways(shape, args).items():
        try:
            out = call()
            if wanted is not None:
                error = (out[:, :, tiles.rows[: tiles.queries]].float() - wanted).abs().max() / wanted.abs().max()
                errors[name] = f"{float(error):.1e}"
            turns[name] = turn_of(captured(call), "cuda", together=0.01)
        except RuntimeError as error:  # a kernel that this device or torch does not have
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
    found = take_turns(turns, args.seconds, args.least)
    for name, times in found.items():
        yield {
            "tokens": len(tiles.rows), "text": text, "heads": heads, "channels": d, "way": name,
            **columns(spread([1e6 * time for time in times]), "us"), **speedup(found["cudnn"], times),
            "error": errors.get(name, ""), "rounds": len(times),
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__, rounds=(1.0, 5))
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16"])
    parser.some_of("--shapes", SHAPES, SHAPES)
    args = parser.parsed()
    if not args.on_gpu:
        parser.error("there is no CUDA GPU here")
    fixed = {"dtype": args.dtype, "beside": "/".join(map(str, BESIDE))}
    jobs, every = [{"shape": shape, **fixed} for shape in args.shapes], ["choosing"]  # a way that every shape has
    run_jobs(args, jobs, measure, lambda _: every, by="way", first=(), packages=("triton", "comfy-kitchen"))


if __name__ == "__main__":
    main()
