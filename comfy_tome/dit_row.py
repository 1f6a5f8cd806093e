"""What a row of the table of transformers (dit_models.py) says of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared_tome.core.grid import Grid
from . import dit_tokens as of
from .dit_tokens import CallArguments, Shape


def _one(model: Any) -> int:
    return 1


def _none(model: Any) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class DiTModel:
    """A family of models with one order of tokens: [head, image, tail].

    name: for people. classes: below comfy.ldm.
    forge: its classes below backend.nn in Forge and Forge Neo; none: they do not have it. blocks: the lists of blocks
        in these, or of a part of each ("list.part"); what runs outside (refiners) is left alone there.
    grid(model, latent's shape, told): the image's (rows, columns) or (frames, rows, columns); None where this call's
        tokens do not lie on one.
    head(model, told): how many tokens stand before the image's; None: as many as are left over.
    tail(model, told, grid): how many stand after them; None: as many as are left over. At least one of the two.
    numbered: the model tells the number of its block, and what runs without one (refiners) is to be left alone. Not of
        models that have nothing of that kind: ComfyUI tells no numbers up to 0.3.64, of Cosmos-Predict2 up to 0.27.
    alone(model, told): some layers attend without the text; how many tokens stand before the image's there.
    others(model, told): lengths of attentions to other tokens (cross-attentions, refiners, sound), to be told from the
        image's by their length alone.
    calls(model): attention calls of one layer that want the same tokens.
    twice(model): numbers of the blocks that hold two layers to be served.
    parts: some layers call attention with a part of the queries and all keys, once or several times.
    elsewhere(model, told, grid): queries of each layer that never come, because the model has them already or asks
        another attention.
    compiles: forward hands keywords that it does not know to its wrappers, which torch.compile can guard (unet.py); of
        the others see graphs.py.
    silent(model, options): self-attentions to be served whose calls do not tell their options, so that no override
        reaches them: they are met where they call torch (shared_tome/attention/sdpa.py). options: the call's.
    """

    name: str
    classes: tuple[str, ...]
    grid: Callable[[Any, Shape, CallArguments], Grid | None]
    head: Callable[[Any, CallArguments], int] | None = None
    tail: Callable[[Any, CallArguments, Grid], int] | None = None
    numbered: bool = False
    alone: Callable[[Any, CallArguments], int] | None = None
    others: Callable[[Any, CallArguments], tuple[int, ...]] | None = None
    calls: Callable[[Any], int] = _one
    twice: Callable[[Any], tuple[int, ...]] = _none
    parts: bool = False
    elsewhere: Callable[[Any, CallArguments, Grid], int] = of.nothing
    compiles: bool = True
    silent: Callable[[Any, dict[str, Any]], list[Any]] | None = None
    forge: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
