"""Whether merging pays in a vision transformer on a GPU, measured at its first picture (auto.py)."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
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


def by_pixels(
    args: tuple, kwargs: dict[str, Any], names: Sequence[str] = ("pixel_values",)
) -> tuple[Any, Callable[[Callable[..., Any]], Callable[[Tensor], Any]]]:
    """(the pictures of a model's call, by place or by one of these names; what makes of a model a function of them)."""
    if args:
        return args[0], lambda model: lambda pixels: model(pixels, *args[1:], **kwargs)
    name = next((name for name in names if name in kwargs), names[0])
    return kwargs.get(name), lambda model: lambda pixels: model(**{**kwargs, name: pixels})


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
        pixels, on = by_pixels(args, kwargs, ("pixel_values", "x"))

        def run(pauses: bool, *args: Any, **kwargs: Any) -> Any:
            self._attachment.pause(pauses)
            return model(*args, **kwargs)

        full, merged = (on(functools.partial(run, pauses)) for pauses in (True, False))
        self._measuring.add(thread)
        try:
            name = type(model).__name__
            verdict = verdict_of(name, self._tower, self._attachment.options, pixels, full, merged)
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
