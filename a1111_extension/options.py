"""The options of the panel: those of ToMeConfig and the few that only this host has, and what comes back of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..shared_tome import ToMeConfig
from ..shared_tome.methods import CUSTOM, PRESETS
from ..shared_tome.options import Option, Widget

SEED_RULES = ("image", "fixed")

RATIO_STEP = ToMeConfig.options()["ratio"].step
PRESET_OPTIONS = tuple(dict.fromkeys(option for preset in PRESETS.values() for option in preset.options))

_RATIO, *_OTHERS = ToMeConfig.widgets()
_OWN = (
    Widget("enabled", False, Option("ToMe", "Merge tokens.")),
    Widget(
        "hires_ratio",
        -1.0,
        Option("Hires ratio", "The ratio of the hires pass. -1: the same.", minimum=-1.0, maximum=1.0, step=RATIO_STEP),
    ),
    Widget(
        "seed_rule",
        "image",
        Option(
            "Seed rule",
            "image: by each image's seed, the same in a batch and alone. fixed: by the number in 'Seed'.",
            choices=SEED_RULES,
            advanced=True,
        ),
    ),
)
_MAP = Widget(
    "map",
    False,
    Option(
        "Add a map to the gallery",
        "After each picture one more that shows over it which tokens became one in the last merged step.",
        advanced=True,
    ),
)
# The order of the API's list: do not change it, add to its end. What ToMeConfig got after `map` was there:
_LATER = ("own_token", "whole", "half", "decisions", "exact_every")
WIDGETS: tuple[Widget, ...] = (
    _OWN[0], _RATIO, *_OWN[1:], *(widget for widget in _OTHERS if widget.name not in _LATER), _MAP,
    *(widget for widget in _OTHERS if widget.name in _LATER),
)  # fmt: skip
NAMES = tuple(widget.name for widget in WIDGETS)
_OWN_NAMES = tuple(widget.name for widget in (*_OWN, _MAP))


@dataclass(frozen=True)
class Settings:
    """What one generation is to do. map: whether the gallery gets maps, which change no picture."""

    enabled: bool
    hires_ratio: float
    seed_rule: str
    config: ToMeConfig
    map: bool = False

    def resolved(self, multires: bool) -> Settings:
        """With a method in place of auto, see ToMeConfig.resolved."""
        hires = self.config.replace(ratio=self.hires_ratio) if self.hires_ratio >= 0.0 else None
        hires_ratio = self.hires_ratio if hires is None else hires.resolved(multires).ratio
        return replace(self, config=self.config.resolved(multires), hires_ratio=hires_ratio)

    def for_pass(self, hires: bool) -> ToMeConfig:
        """The config of the first or of the hires pass."""
        if hires and self.hires_ratio >= 0.0:
            return self.config.replace(ratio=self.hires_ratio)
        return self.config

    @property
    def is_off(self) -> bool:
        """Whether neither pass merges anything."""
        return not self.enabled or (self.for_pass(False).is_off and self.for_pass(True).is_off)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings from named values; a missing one, or None, is the default.

    Raises ValueError naming the option and its range. Where ToMe is off, the other values are not looked at.
    """
    unknown = sorted(set(values) - set(NAMES))
    if unknown:
        raise ValueError(f"unknown ToMe option {unknown[0]!r}; there are {', '.join(NAMES)}")
    known = {widget.name: widget.unnamed for widget in WIDGETS}
    known.update((name, value) for name, value in values.items() if value is not None)
    enabled, hires_ratio, seed_rule, wants_map = (known.pop(name) for name in _OWN_NAMES)
    if enabled not in (True, False):
        raise ValueError(f"enabled must be true or false, got {enabled!r}")
    if not enabled:
        return Settings(False, -1.0, SEED_RULES[0], ToMeConfig())
    if seed_rule not in SEED_RULES:
        raise ValueError(f"seed_rule must be one of {', '.join(SEED_RULES)}, got {seed_rule!r}")
    number = isinstance(hires_ratio, (int, float)) and not isinstance(hires_ratio, bool)
    if not number or not (hires_ratio == -1.0 or 0.0 <= hires_ratio <= 1.0):
        raise ValueError(f"hires_ratio must be -1 (the same) or a number in 0 to 1, got {hires_ratio!r}")
    if wants_map not in (True, False):
        raise ValueError(f"map must be true or false, got {wants_map!r}")
    return Settings(True, float(hires_ratio), seed_rule, ToMeConfig.from_widgets(**known), bool(wants_map))


def named(values: Sequence[Any]) -> dict[str, Any]:
    """The host's list of arguments by name. An API request may put one object with names in the first place.

    There "preset" stands for the options that it makes; those that are named beside it win, and null is as left out.
    Raises ValueError for an unknown preset.
    """
    if values and isinstance(values[0], Mapping):
        given = {name: value for name, value in values[0].items() if value is not None}
        preset = preset_options(given.pop("preset")) if "preset" in given else {}
        return {**dict(zip(NAMES[1:], values[1:], strict=False)), "enabled": True, **preset, **given}
    return dict(zip(NAMES, values, strict=False))  # a short list leaves the rest at its defaults


def preset_options(name: Any) -> dict[str, Any]:
    """The options that a preset makes. Raises ValueError naming the presets."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name].options)


def preset_of(*values: Any) -> str:
    """The preset that values of PRESET_OPTIONS are, or CUSTOM."""
    try:
        return ToMeConfig(**dict(zip(PRESET_OPTIONS, values, strict=True))).preset
    except ValueError:  # a field that somebody is still typing in
        return CUSTOM


def fit(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of every option that are possible together, and why others were refused, by name.

    values: by name, as they come from a file or a picture's text. Each is taken, in the order of WIDGETS, where it is
    possible beside those before it; else, and where it is missing, the default is.
    """
    taken: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for widget in WIDGETS:
        taken[widget.name] = value = values.get(widget.name, widget.unnamed)
        try:
            if value is None:
                raise ValueError(f"{widget.name} has no value")
            settings_from({**taken, "enabled": True if widget.name != "enabled" else value})
        except ValueError as error:
            taken[widget.name], refused[widget.name] = widget.default, str(error)
    return taken, refused


def control(widget: Widget) -> tuple[str, dict[str, Any]]:
    """The gradio class for an option and its arguments, without the value, label and help text."""
    option = widget.option
    if option.choices is not None:
        return "Dropdown", {"choices": list(option.choices)}
    if isinstance(widget.default, bool):
        return "Checkbox", {}
    if isinstance(widget.default, str):
        return "Textbox", {"max_lines": 1}
    if (option.maximum - option.minimum) / option.step > 1000:  # no slider can be set that finely
        return "Number", {"precision": 0}
    return "Slider", {"minimum": option.minimum, "maximum": option.maximum, "step": option.step}


def by_name(widgets: Iterable[Widget] = WIDGETS) -> dict[str, Widget]:
    """Every option by its name."""
    return {widget.name: widget for widget in widgets}
