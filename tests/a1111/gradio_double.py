"""As much of gradio as the panel uses: controls that remember what they were given, and their events."""

from __future__ import annotations

from typing import Any


class Component:
    """A control. Raises TypeError for an argument that the real one (3.41 and 4.40) does not take."""

    takes: frozenset[str] = frozenset()
    _common = frozenset({"label", "info", "elem_id", "visible", "elem_classes", "interactive"})

    def __init__(self, value: Any = None, **arguments: Any):
        unknown = set(arguments) - self._common - self.takes
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")
        self.value = value
        self.label = arguments.get("label")
        self.listeners: dict[str, list[tuple]] = {"change": [], "input": []}
        for name, argument in arguments.items():
            setattr(self, name, argument)

    def change(self, fn: Any, inputs: list, outputs: list, *, queue: bool, show_progress: str, api_name: Any) -> None:
        """Whenever the value is another one, whoever set it."""
        self.listeners["change"].append((fn, inputs, outputs))

    def input(self, fn: Any, inputs: list, outputs: list, *, queue: bool, show_progress: str, api_name: Any) -> None:
        """When a person sets the value."""
        self.listeners["input"].append((fn, inputs, outputs))

    def choose(self, value: Any) -> int:
        """As a person does. Returns how many functions ran."""
        return _set({self: value}) + _run(self.listeners["input"])

    def paste(self, value: Any) -> int:
        """As the host does with a picture's text."""
        return _set({self: value})


def update(*, interactive: bool) -> dict[str, Any]:
    """What changes of a control, and not its value."""
    return {"interactive": interactive}


def _set(values: dict[Component, Any]) -> int:
    """All values first, then the events of those that changed: as the page does with what a function returns."""
    for control, value in values.items():
        for name, part in value.items() if isinstance(value, dict) else ():  # of update()
            setattr(control, name, part)
    values = {control: value for control, value in values.items() if not isinstance(value, dict)}
    changed = [control for control, value in values.items() if control.value != value]
    for control, value in values.items():
        control.value = value
    return sum(_run(control.listeners["change"]) for control in changed)


def _run(listeners: list[tuple]) -> int:
    count = 0
    for fn, inputs, outputs in listeners:
        made = fn(*(control.value for control in inputs))
        made = made if len(outputs) > 1 else [made]
        count += 1 + _set(dict(zip(outputs, made, strict=True)))
    return count


class Slider(Component):
    takes = frozenset({"minimum", "maximum", "step"})


class Number(Component):
    takes = frozenset({"precision", "minimum", "maximum", "step"})


class Dropdown(Component):
    takes = frozenset({"choices", "multiselect"})


class Radio(Component):
    takes = frozenset({"choices"})


class Checkbox(Component):
    takes = frozenset()


class HTML(Component):
    takes = frozenset()


class Textbox(Component):
    takes = frozenset({"lines", "max_lines", "placeholder"})


class _Context:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


Row = Column = Group = Blocks = Accordion = _Context
