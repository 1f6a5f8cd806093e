"""Whether merging pays in a vision transformer on a GPU, measured at its first picture (shared_tome/autotune/layer.py).

Copies without hooks are run, so that nobody else sees a call more.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autotune import timing
from ..autotune.detached import about_model, detached_model
from ..autotune.layer import known_or_measured, may_measure, name_of
from ..autotune.paying import Decision
from ..autotune.store import NotNow
from ..core.curve import is_compiling
from .hooks import VitAttachment
from .options import Options
from .towers import Tower, find_tower

log = logging.getLogger("ToMe")

# Walking through a model takes longer than a small one's call may. A fact about a model, not state of a call.
_about: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str]] = weakref.WeakKeyDictionary()


def decision_of(
    model: nn.Module,
    tower: Tower,
    options: Options,
    pixels: Any,
    on: Callable[[Callable[..., Any]], Callable[[Tensor], Any]],
    kind: type[VitAttachment] = VitAttachment,
) -> Decision | None:
    """What is known of the times of a model's calls, measured at the first of a shape; None: not measured.

    Args:
        pixels: [B, 3, H, W]; one picture is timed, whatever the batch: what a picture gets must not hang on how many
            there are.
        on: makes of a model a function of pictures (by_pixels). kind: how it is merged.
    """
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or is_compiling() or not may_measure(pixels.device):
        return None

    def measure() -> Decision:
        whole, merged = detached_model(model), detached_model(model)
        if whole is None or merged is None:
            raise NotNow("another package replaces a module's forward")
        kind(find_tower(merged), options)
        with torch.no_grad():
            return timing.compared(lambda: on(whole)(pixels[:1]), lambda: on(merged)(pixels[:1]), pixels.device, 4)

    return known_or_measured(_key(model, tower, options, pixels), pixels.device, measure)


def _key(model: nn.Module, tower: Tower, options: Options, pixels: Tensor) -> str:
    how = f"{options.ratio:.4f}" if options.ratio is not None else f"r {options.r}"
    channels = next(tower.blocks[0].parameters()).shape[-1]
    parts = [f"{type(model).__name__} of {len(tower.blocks)} blocks, {channels} channels"]
    parts += ["x".join(map(str, pixels.shape[1:]))]
    parts += [str(pixels.dtype).removeprefix("torch."), name_of(None, pixels.device), _about_now(model, tower, pixels)]
    return ", ".join(
        [*parts, how, options.schedule, f"proportional {options.proportional}", f"restore {options.restore}"]
    )


def _about_now(model: nn.Module, tower: Tower, pixels: Tensor) -> str:
    """detached.about_model and the model's size, asked anew where the blocks' weights have changed."""
    weights = [next(block.parameters()) for block in tower.blocks]
    now = (pixels.device, *((weight.dtype, weight.device) for weight in weights))
    if model not in _about or _about[model][0] != now:
        size = sum(parameter.numel() for parameter in model.parameters())
        _about[model] = now, f"{size} parameters, {about_model(model, pixels.device)}"
    return _about[model][1]


def by_pixels(
    args: tuple, kwargs: dict[str, Any], names: Sequence[str] = ("pixel_values",)
) -> tuple[Any, Callable[[Callable[..., Any]], Callable[[Tensor], Any]]]:
    """(the pictures of a model's call, by place or by one of these names; what makes of a model a function of them)."""
    if args:
        return args[0], lambda model: lambda pixels: model(pixels, *args[1:], **kwargs)
    name = next((name for name in names if name in kwargs), names[0])
    return kwargs.get(name), lambda model: lambda pixels: model(**{**kwargs, name: pixels})


class AutoPause:
    """Hooks around a patched model's calls, which pause its merging where it does not pay. Not in training."""

    def __init__(self, model: nn.Module, tower: Tower, attachment: VitAttachment):
        self._tower, self._attachment = tower, attachment
        self._said: set[str] = set()
        attachment.handles += [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Runs after an exception too: a pause must not stay behind.
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training or torch.is_grad_enabled():
            return
        pixels, on = by_pixels(args, kwargs, ("pixel_values", "x"))
        options, kind = self._attachment.options, type(self._attachment)
        decision = decision_of(model, self._tower, options, pixels, on, kind)
        if decision is None or decision.pays():
            return
        if decision.reason not in self._said:
            self._said.add(decision.reason)
            log.info("[ToMe] %s (%s)", decision.reason, type(model).__name__)
        self._attachment.pause(True)

    def _after(self, model: nn.Module, args: tuple, out: Any) -> None:
        self._attachment.pause(False)
