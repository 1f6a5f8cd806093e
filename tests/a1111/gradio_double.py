"""As much of gradio as the panel uses: controls that remember what they were given."""

from __future__ import annotations

from typing import Any


class Component:
    """A control. Raises TypeError for an argument that the real one (3.41 and 4.40) does not take."""

    takes: frozenset[str] = frozenset()
    _common = frozenset({"label", "info", "elem_id", "visible", "elem_classes"})

    def __init__(self, value: Any = None, **arguments: Any):
        unknown = set(arguments) - self._common - self.takes
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")
        self.value = value
        self.label = arguments.get("label")
        for name, argument in arguments.items():
            setattr(self, name, argument)


class Slider(Component):
    takes = frozenset({"minimum", "maximum", "step"})


class Number(Component):
    takes = frozenset({"precision", "minimum", "maximum", "step"})


class Dropdown(Component):
    takes = frozenset({"choices", "multiselect"})


class Checkbox(Component):
    takes = frozenset()


class _Context:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


Row = Column = Group = Blocks = Accordion = _Context
