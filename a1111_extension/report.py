"""What was merged in a generation, in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..shared_tome.inspect.reasons import counted, what_to_change
from ..shared_tome.inspect.record import Run
from ..shared_tome.inspect.report import Layer, Report


def tell(runs: Mapping[bool, Run]) -> str:
    """The line for a batch's passes. runs: by whether it is the hires pass."""
    lines = {hires: _line(run.tally.report()) for hires, run in sorted(runs.items())}
    return "; ".join(f"hires pass: {line}" if hires else line for hires, line in lines.items())


def _line(report: Report) -> str:
    line = report.line()
    if report.merged:
        line += f", in {report.merged_steps} of {counted(report.steps, 'step')}"
    if report.follows:
        line += ", by the decisions that are set"
    left = ", ".join(_reasons(report.left_alone))
    if left:
        change = "" if report.merged else what_to_change(layer.reason for layer in report.left_alone)
        return f"{line}; left alone: {left}{change}"
    if report.merged:
        return line
    why = _why_nothing(report)
    return f"{line}: {why}{what_to_change([why])}"


def _why_nothing(report: Report) -> str:
    """Why a pass merged nothing in which no layer was left alone."""
    if report.calls == 0:
        return "no step was run" if report.of_steps is None else "another extension runs the model without ToMe"
    if report.merged_steps == 0:
        config, steps = report.config, report.steps
        if config.ratio_end >= 0.0:
            return "the ratio is 0 in each step that was run"
        all_steps = "the one step that was run" if steps == 1 else f"all {steps} steps that were run"
        return f"start {config.start:g} and end {config.end:g} leave out {all_steps}"
    return "another extension runs the model's self-attention"


def _reasons(layers: Iterable[Layer]) -> list[str]:
    """How many layers of which levels, for each reason."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.reason, []).append(layer)
    return [f"{_where(group)} ({reason})" for reason, group in groups.items()]


def _where(layers: list[Layer]) -> str:
    levels = sorted({layer.level for layer in layers if layer.level is not None})
    at = f" at level{'s' if len(levels) > 1 else ''} {', '.join(map(str, levels))}" if levels else ""
    return counted(len(layers), "layer") + at
