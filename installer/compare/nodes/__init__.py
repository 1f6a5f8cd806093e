"""Two nodes for the server that `install.py compare` starts; nobody else gets them.

ToMeCompareModel makes a sampling a new one, in another batch split where that is asked for. ToMeCompareTake hands out
the pictures and the peak of the memory since the last time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui

FRAMES = 8  # of a video


def in_another_split(
    executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, options: Any
) -> list[torch.Tensor]:
    """calc_cond_batch with each conditioning in a call of its own, or, where there is one, with each row twice.

    conds: [conditions or None]; x: [B, C, ...]; timestep: [B]. Returns [B, C, ...] for each of conds.
    """
    asked = [place for place, cond in enumerate(conds) if cond is not None]
    if len(asked) == 1:
        twice = executor(model, conds, torch.cat([x, x]), torch.cat([timestep, timestep]), options)
        return [out[: len(x)] for out in twice]
    found = [torch.zeros_like(x) for _ in conds]
    for place in asked:
        alone = [cond if number == place else None for number, cond in enumerate(conds)]
        found[place] = executor(model, alone, x, timestep, options)[place]
    return found


class ToMeCompareModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToMeCompareModel",
            category="ToMe/compare",
            inputs=[io.Model.Input("model"), io.Int.Input("nonce", min=0, max=2**31), io.Boolean.Input("split")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, nonce: int, split: bool) -> io.NodeOutput:
        clone = model.clone()
        if split:
            clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "tome_compare", in_another_split)
        return io.NodeOutput(clone)


class ToMeCompareTake(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToMeCompareTake",
            category="ToMe/compare",
            is_output_node=True,
            inputs=[io.Image.Input("images"), io.Model.Input("model")],
            outputs=[],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, model: Any) -> io.NodeOutput:
        peak = take_peak(management.get_torch_device())
        chosen = images[torch.linspace(0, len(images) - 1, min(FRAMES, len(images))).round().long()]
        told = {
            "peak_bytes": [peak],
            "family": [type(getattr(model.model, "model_config", model.model)).__name__],  # SD15, SDXL, Flux ...
            "dtype": [str(model.model.get_dtype()).removeprefix("torch.")],
        }
        return io.NodeOutput(ui={**ui.PreviewImage(chosen, cls=cls).as_dict(), **told})


def take_peak(device: torch.device) -> int | None:
    """The most bytes that were taken since the last call: of the GPU by torch, on a CPU of the process by Linux."""
    backend = getattr(torch, device.type, None)
    if device.type in ("cuda", "xpu"):
        peak = backend.max_memory_allocated(device)
        backend.reset_peak_memory_stats(device)
        return peak
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        lines = status.read_text().splitlines()
        clear.write_text("5")  # sets the peak back
    except OSError:
        return None  # not Linux, or not allowed
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


class CompareExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ToMeCompareModel, ToMeCompareTake]


async def comfy_entrypoint() -> CompareExtension:
    return CompareExtension()
