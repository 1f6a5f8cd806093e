"""What a call of ComfyUI's `apply_model` carries: its transformer_options, and how far the sampler is."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.core.progress import Draws, percent_of_level, percent_table, place_of
from ..shared_tome.merging.call import same_halves, shares_match

KEY = "ToMe"
APPLY_MODEL = "apply_model"  # comfy.patcher_extension.WrappersMP.APPLY_MODEL
DIFFUSION_MODEL = "diffusion_model"  # comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


def step_of_options(options: dict[str, Any]) -> dict[str, Any]:
    """What of a call's transformer_options tells the step, and is no node's."""
    return {name: options[name] for name in ("sample_sigmas", "sigmas") if name in options}


def find_options(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """apply_model(x, t, c_concat, c_crossattn, control, transformer_options): by place or by name."""
    if len(args) > 3:
        return args, args[3]
    return args, kwargs.get("transformer_options", {})


def put_options(args: tuple, kwargs: dict[str, Any], options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if len(args) > 3:
        return (*args[:3], options, *args[4:]), kwargs
    return args, {**kwargs, "transformer_options": options}


def without_wrapper(options: dict[str, Any], kind: str) -> dict[str, Any]:
    """transformer_options without ToMe's wrapper of a kind; what other nodes have put there stays."""
    wrappers = options.get("wrappers", {})
    if KEY not in wrappers.get(kind, {}):
        return options
    others = {key: value for key, value in wrappers[kind].items() if key != KEY}
    return {**options, "wrappers": {**wrappers, kind: others}}


class Answered:
    """Whether another node answers a call in the model's place (EasyCache); true once it has.

    options: the call's transformer_options with a wrapper before and behind those of other nodes, if there are any.
    """

    def __init__(self, options: dict[str, Any]):
        self._asked = self._ran = False
        wrappers = options.get("wrappers", {})
        others = {key: found for key, found in wrappers.get(DIFFUSION_MODEL, {}).items() if found}
        if others:
            others = {f"{KEY} before": [self._ask], **others, f"{KEY} behind": [self._run]}
            options = {**options, "wrappers": {**wrappers, DIFFUSION_MODEL: others}}
        self.options = options

    def _ask(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._asked = True
        return executor(*args, **kwargs)

    def _run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._ran = True
        return executor(*args, **kwargs)

    def __bool__(self) -> bool:
        return self._asked and not self._ran


def call_key(call: ModelCall) -> str:
    """What a compiled graph takes for granted of a call: all options but the seed, which is a tensor there, and
    exact_every, which does nothing there."""
    return _config_key(call.config, call.alike)


@functools.lru_cache(maxsize=64)
def _config_key(config: ToMeConfig, alike: bool) -> str:
    return repr(config.replace(seed=0, exact_every=0)) + (" alike" if alike and config.share_match else "")


def halves_alike(options: dict[str, Any], x: Tensor, config: ToMeConfig) -> bool:
    """Whether both halves of the batch x [B, ...] are the same images: prompted and unprompted.

    Other nodes put tiles into one call, and areas of a prompt are other parts of the picture: where a match is to be
    shared the halves are compared, which synchronises.
    """
    if sorted(options.get("cond_or_uncond", ())) != [0, 1]:
        return False
    return not shares_match(config) or same_halves(x)


def step_of(options: dict[str, Any], device: torch.device) -> Tensor | int:
    """Which step of this sampler it is, for people, as a 0-d tensor on the device: no synchronisation.

    Counted in noise levels and not in calls: samplers that call the model twice a step, area conditioning and
    split batches all come to the same number.
    """
    levels, level = _levels(options, device)
    return 0 if levels is None else place_of(levels, level)


def place_now(options: dict[str, Any]) -> int | None:
    """step_of as a number, None where no noise levels are told. Synchronises."""
    levels, level = _levels(options, torch.device("cpu"))
    return None if levels is None or len(levels) < 2 else int(place_of(levels, level))


def level_now(options: dict[str, Any]) -> float:
    """The present noise level. Synchronises."""
    return float(options["sigmas"].flatten()[0])


def draw_of(options: dict[str, Any], device: torch.device, base: Any) -> Tensor | int:
    """The number of this call's draw (progress.Draws), as a 0-d tensor on the device: no synchronisation.

    base: the BaseModel that apply_model is of.
    """
    levels, level = _levels(options, device)
    if levels is None or len(levels) < 2:
        return 0
    table = _table_of(base)
    return place_of(levels, level) if table is None else _draws(levels, table).number(level)


def progress_of(options: dict[str, Any], base: Any) -> tuple[float, bool]:
    """How far the model is by its noise level, 0 to 1, and whether the level is one of the sampler's own, not one
    between two steps. Synchronises.

    The percent whose `percent_to_sigma` is the present level; by steps where a model has no such function.
    """
    levels, level = _levels(options, torch.device("cpu"))
    if levels is None:
        return 0.0, False
    at_a_step, table = bool((levels == level).any()), _table_of(base)
    if table is not None:
        return percent_of_level(level, table), at_a_step
    return int(place_of(levels, level)) / max(1, len(levels) - 1), at_a_step


def _levels(options: dict[str, Any], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The sampler's noise levels [n] and the present one []; None where they are not told."""
    levels, level = options.get("sample_sigmas"), options.get("sigmas")
    if levels is None or level is None:
        return None, None
    return levels.to(device, torch.float32), level.to(device, torch.float32).flatten()[0]


# A table asks the host a thousand times; a sampler's draws take more launches than a small step should wait for.
_tables: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
_known_draws: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the sampler's list: (table, its draws)


def _table_of(base: Any) -> Tensor | None:
    """progress.percent_table of the model's sampling, on the CPU; None where it cannot tell."""
    sampling = getattr(base, "model_sampling", None)
    if not hasattr(sampling, "percent_to_sigma"):
        return None
    if sampling not in _tables:
        _tables[sampling] = percent_table(sampling.percent_to_sigma)
    return _tables[sampling]


def _draws(levels: Tensor, table: Tensor) -> Draws:
    known, draws = _known_draws.get(levels, (None, None))
    if known is not table:
        # A copy: an entry that holds its own key would stay. On the CPU where a device may lack a search.
        copy = levels.clone() if levels.device.type in ("cpu", "cuda") else levels.cpu()
        draws = Draws.of(copy, table.to(copy.device)).to(levels.device)
        _known_draws[levels] = table, draws
    return draws
