"""Whether merging pays in a vision transformer on a GPU, measured at its first picture (auto.py)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .auto import Verdict, compared, known_or_measured, may_measure
from .curve import is_compiling
from .vit_hooks import Attachment, Options, Tower

log = logging.getLogger("ToMe")


def verdict_of(
    name: str,
    tower: Tower,
    options: Options,
    pixels: Any,
    full: Callable[[Tensor], Any],
    merged: Callable[[Tensor], Any],
) -> Verdict | None:
    """What is known of the times of a model's calls, measured at the first of a shape; None: not measured.

    Args:
        name: of the model's class. pixels: [B, 3, H, W]; one picture is timed, whatever the batch: what a picture gets
            must not hang on how many there are.
        full, merged: the model, called on pictures, without and with merging.
    """
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or is_compiling() or not may_measure(pixels.device):
        return None
    weight = next(tower.blocks[0].parameters())
    how = f"{options.ratio:.4f}" if options.ratio is not None else f"r {options.r}"
    key = (
        f"{name} of {len(tower.blocks)} blocks, {weight.shape[-1]} channels, {'x'.join(map(str, pixels.shape[1:]))}, "
        f"{str(weight.dtype).removeprefix('torch.')}, {how}, {options.schedule}, proportional {options.proportional}"
    )

    def measure() -> Verdict:
        with torch.no_grad():
            return compared(lambda: full(pixels[:1]), lambda: merged(pixels[:1]), pixels.device, repeats=4)

    return known_or_measured(key, pixels.device, measure)


class Judge:
    """Hooks around a patched model's calls, which pause its merging where it does not pay. Not in training."""

    def __init__(self, model: nn.Module, tower: Tower, attachment: Attachment):
        self._tower, self._attachment = tower, attachment
        self._measuring: set[int] = set()  # threads
        self._said: set[str] = set()
        attachment.add_handles(
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Runs after an exception too: a pause must not stay behind.
            model.register_forward_hook(self._after, always_call=True),
        )

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if thread in self._measuring or model.training or torch.is_grad_enabled():
            return
        name = next((name for name in ("pixel_values", "x") if name in kwargs), None)

        def run(pixels: Tensor, pauses: bool) -> Any:
            self._attachment.pause(pauses)
            return model(pixels, *args[1:], **kwargs) if args else model(**{**kwargs, name: pixels})

        pixels = args[0] if args else kwargs.get(name)
        self._measuring.add(thread)
        try:
            verdict = verdict_of(
                type(model).__name__, self._tower, self._attachment.options, pixels,
                lambda pixels: run(pixels, True), lambda pixels: run(pixels, False),
            )  # fmt: skip
        finally:
            self._measuring.discard(thread)
            self._attachment.pause(False)
            self._attachment.last = None  # a trace is of the calls of the model's owner
        if verdict is None or verdict.pays():
            return
        if verdict.reason not in self._said:
            self._said.add(verdict.reason)
            log.info("[ToMe] %s (%s)", verdict.reason, type(model).__name__)
        self._attachment.pause(True)

    def _after(self, model: nn.Module, args: tuple, out: Any) -> None:
        if threading.get_ident() not in self._measuring:
            self._attachment.pause(False)
