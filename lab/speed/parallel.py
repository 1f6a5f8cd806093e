"""One picture on two GPUs by diffusers' Ulysses (`enable_parallelism`): `python -m lab.speed.parallel`.

diffusers' Flux at full depth with random weights in bfloat16: one image, 512 tokens of text, no guidance. Two
processes, one a GPU, on NCCL: each has a part of the tokens, and in the attentions a part of the heads. On one GPU the
first process runs alone while the other one waits. All variants on one and on two GPUs take turns. `step_ms` is one
call of the model, and the speedup is against unmerged on one GPU. `sent_mb`: what each process sends in one call,
`sent`: in how many messages. `differs`: how far the output is from that of one GPU with the same variant, at most, in
units of the largest value.

On the CPU, for a try, the two processes talk by gloo.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import shared_tome
from shared_tome import ToMeConfig

from ..timing import take_turns
from .common import DTYPES, Arguments, Job, options_of, seconds_of, step_columns
from .multigpu import GPUS, Case, difference, run_on_gpus
from .step import sharing

# Whatever it costs (levels 0), but for the one whose layers are merged where that pays in each process.
VARIANTS = (*("unmerged", "Balanced", "Balanced, levels auto", "sample 0.75, own token", "sample 0.75", "merge 0.5"),)
_FLUX = {"in_channels": 64, "guidance_embeds": True}  # the rest is diffusers' default, which is Flux's own
_TINY = {
    **_FLUX, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
# Name: of the model's class, tokens of the text.
MODELS: dict[str, tuple[dict[str, Any], int]] = {"flux": (_FLUX, 512), "flux-tiny": (_TINY, 6)}


def build(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, the same in each process."""
    import diffusers

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # it is made in no other, which would take twice the memory
    try:
        with torch.device(device):
            model = diffusers.FluxTransformer2DModel(**MODELS[name][0])
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02)
    return model.eval().requires_grad_(False)


class Call:
    """One call of a model for a picture of `pixels` x `pixels`: a token for each 16 x 16."""

    def __init__(self, name: str, pixels: int, device: torch.device, dtype: torch.dtype):
        config, text = MODELS[name]
        side, generator = pixels // 16, torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack((torch.zeros_like(y), y, x), dim=-1).reshape(-1, 3)
        self.tokens, self.text = side * side, text
        self.told = {
            "hidden_states": draw(1, self.tokens, config["in_channels"]),
            "encoder_hidden_states": draw(1, text, config.get("joint_attention_dim", 4096)),
            "pooled_projections": draw(1, config.get("pooled_projection_dim", 768)),
            "timestep": torch.full((1,), 0.7, device=device, dtype=dtype),
            "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
            "img_ids": ids.to(device, dtype),
            "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        }

    def __call__(self, model: nn.Module) -> Tensor:
        # The gathered output is waited for at its first use, as a sampler has one.
        return model(**self.told, return_dict=False)[0].clone()


class Sent(TorchDispatchMode):
    """What this process sends to others while it is on: `bytes`, in `messages`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.messages = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.__name__ if func.namespace in ("_c10d_functional", "c10d") else ""
        if name.startswith(("all_to_all", "all_gather", "_allgather", "allgather", "all_reduce", "allreduce")):
            x = args[0] if isinstance(args[0], Tensor) else args[0][0]
            # Of n processes: each keeps a part of an exchange, sends all of a gathering n - 1 times, and in a sum (in a
            # ring) each part twice, n - 1 times.
            n = torch.distributed.get_world_size()
            each = {"all_t": 1 / n, "all_r": 2 / n, "allre": 2 / n}.get(name[:5], 1.0)
            self.bytes += each * (n - 1) * x.numel() * x.element_size()
            self.messages += 1
        return func(*args, **(kwargs or {}))


def measure(rank: int, job: Job, wanted: Sequence[Case], args: Namespace) -> list[dict[str, Any]]:
    """In each of the two processes: the rows of one model and size, all from the same rounds (empty but in the first);
    each variant that runs on two GPUs also runs on one."""
    import diffusers

    device = torch.device("cuda", rank) if args.on_gpu else torch.device("cpu")
    cases = list(dict.fromkeys(case for name, gpus in wanted for case in ((name, 1), (name, gpus))))
    model, dtype = build(job["model"], device, DTYPES[args.dtype]), DTYPES[args.dtype]
    call, models = Call(job["model"], job["pixels"], device, dtype), {}
    for name, gpus in cases:
        models[name, gpus] = made = sharing(model)
        if gpus > 1:
            made.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=gpus))
        if name != "unmerged":
            options = {"min_tokens": min(call.tokens, 2048), "levels": "0", **options_of(name)}
            shared_tome.apply_patch(made, config=ToMeConfig(**options))
    outputs, sent = {}, {}
    for case in cases:
        if case[1] > 1 or rank == 0:
            outputs[case] = call(models[case]).float().cpu()  # and warm
            with Sent() as sent[case]:
                call(models[case])

    def turn(case: Case | None) -> list[float]:
        """Of the first process, which tells the others."""
        told = [case]
        torch.distributed.broadcast_object_list(told, src=0)
        case = told[0]
        if case is None or (case[1] == 1 and rank > 0):
            return [] if case is None else [0.0]
        return [seconds_of(lambda: call(models[case]), args.device)]

    if rank > 0:
        while turn(None):
            pass
        return []
    found = take_turns({case: lambda case=case: turn(case) for case in cases}, args.seconds, args.least)
    turn(None)
    return [
        {
            "gpus": gpus, "variant": name, "tokens": call.tokens, "text": call.text,
            **step_columns(found["unmerged", 1], times),
            "sent_mb": sent[name, gpus].bytes / 1e6, "sent": sent[name, gpus].messages,
            "differs": f"{difference(outputs[name, gpus], outputs[name, 1]):.2e}" if gpus > 1 else "",
            "steps": len(times), "device": args.device,
        }
        for (name, gpus), times in found.items()
    ]  # fmt: skip


def in_processes(work: Callable[..., Any], args: tuple, device: str, count: int = 2) -> list[Any]:
    """What work(rank, *args) gave in each of `count` processes that can talk: on GPUs, one a process, by NCCL, on the
    CPU by gloo. work: a function of a module. Raises what one of them raised."""
    # A fork need not import torch and diffusers again, but may not use a GPU that this process holds.
    method = "fork" if device == "cpu" and "fork" in torch.multiprocessing.get_all_start_methods() else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        given = work, args, device, count, Path(folder)
        torch.multiprocessing.start_processes(_process, given, nprocs=count, start_method=method)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(count)]


def _process(rank: int, work: Callable[..., Any], args: tuple, device: str, count: int, folder: Path) -> None:
    about = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": count}
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.distributed.init_process_group("nccl", **about)
    else:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", **about)
        # What diffusers asks for the device: here the CPU, which counts as none.
        torch._C._get_accelerator, torch.accelerator.device_count = lambda: torch.device("cpu"), lambda: 1
    try:
        with torch.no_grad():
            torch.save(work(rank, *args), folder / str(rank))
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = Arguments(__doc__, "bfloat16", (6.0, 3))
    parser.some_of("--models", MODELS, ["flux"], ["flux-tiny"])
    parser.some_of("--sizes", None, [1024, 2048], [256], type=int, help="pixels a side")
    parser.some_of("--variants", VARIANTS, VARIANTS)
    args = parser.parsed()
    if args.on_gpu and torch.cuda.device_count() < max(GPUS):
        parser.error(f"{max(GPUS)} GPUs are needed, torch sees {torch.cuda.device_count()}")
    jobs = [{"model": name, "pixels": size, "dtype": args.dtype} for name in args.models for size in args.sizes]

    def rows(*given: Any) -> list[dict[str, Any]]:
        return in_processes(measure, given, args.device)[0]

    run_on_gpus(args, jobs, rows, packages=("diffusers", "triton"))


if __name__ == "__main__":
    main()
