"""The wrapper that ToMe puts around a diffusion transformer's `apply_model` in ComfyUI; each call's part: dit.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from ..shared_tome import ModelCall, ToMeConfig, kernels
from ..shared_tome.autotune.layer import ALWAYS
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.autotune.step import tokens_beside
from ..shared_tome.autotune.verdicts import verdict_of
from ..shared_tome.inspect.reasons import why_not_served
from .chosen import Chosen
from .dit import DiTCall, TriedDiTCall
from .dit_layout import Layout
from .dit_models import DiTModel, dit_model, unwrapped
from .dit_tokens import CallArguments
from .graphs import COMPARES_MODES, WithToMe
from .log import leave_alone, say_once
from .model_call import Answered, draw_of, find_options, halves_alike, put_options
from .outcome import ANSWERED, Outcome, outcome_of, tokens_of
from .record import COMPILE_KEY, CallRecord, begin, is_compiled
from .schedule import config_now
from .whole_step import about_model, decision_on_step

# What the log says.
_UNKNOWN = "ToMe skips this model: another node has replaced it by one that ToMe does not know"


class _Called(NamedTuple):
    """A call of apply_model(x, t, *args, **kwargs). base: the model that it is of; arguments: by name."""

    base: Any
    x: Tensor
    t: Tensor
    args: tuple
    kwargs: dict[str, Any]
    arguments: CallArguments


class DiTPatch:
    """The wrapper around `apply_model`. Holds the config alone; safe to share between clones and threads."""

    def __init__(self, config: ToMeConfig):
        self.by_times = config.levels == "auto"
        self.config = config if self.by_times else config.replace(levels="0")  # a transformer has one resolution

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, options = find_options(args, kwargs)
        with outcome_of(options) as outcome:
            base = executor.class_obj
            model, compiled = unwrapped(base.diffusion_model), is_compiled(executor, options)
            chosen = Chosen(options, model, compiled)
            # Whether the attentions are PyTorch's, in whose place a kernel of ours may go.
            asked = self.config.resolved(kernels.serves(x) and bool(chosen.kernels(x.device, declined=True)))
            if (less := self.config.why_less(asked)) is not None:
                say_once(less)
            config = config_now(asked, options, base, outcome)
            record = begin(executor, base, x, t, args, kwargs, asked, config)
            outcome.decided.resolve(self.config, asked)
            if record is not None:
                record.run.tally.decided = outcome.decided
            arguments = {**kwargs, **_prompt(args), "transformer_options": options}
            called = _Called(base, x, t, args, kwargs, arguments)
            patch = self._patch(config, called, options, record, outcome, compiled, chosen)
            if patch is None:
                return executor(x, t, *args, **kwargs)
            if patch.guarded:
                outcome.merged(patch.layout.grid)  # layers inside a graph tell nothing of themselves
                outcome.decided.all_merged(config)
                kwargs["tome"] = patch.key
            answered = None if compiled else Answered(patch.options)
            args, kwargs = put_options(args, kwargs, answered.options if answered is not None else patch.options)
            graph = WithToMe() if patch.outside else nullcontext()
            with patch.hooks(model), chosen.followed(), graph:
                out = executor(x, t, *args, **kwargs)
            if answered:
                outcome.left_alone(ANSWERED)
            else:
                patch.end(model)
            if record is not None:
                record.end()
            return out

    def _patch(
        self,
        config: ToMeConfig,
        called: _Called,
        options: dict[str, Any],
        record: CallRecord | None,
        outcome: Outcome,
        compiled: bool,
        chosen: Chosen,
    ) -> DiTCall | None:
        """What this call gets, or None where it is left alone."""
        base, x, arguments = called.base, called.x, called.arguments
        model = unwrapped(base.diffusion_model)
        if outcome.is_skipped(self.config, config.ratio):
            return None
        facts = dit_model(model)
        if facts is None:
            leave_alone(record, _UNKNOWN, type(model).__name__, outcome=outcome)
            return None
        layout = Layout.of(facts, model, x.shape, arguments)
        if layout is None:
            reason = "ToMe skips an image whose tokens do not lie on one grid"
            leave_alone(record, reason, facts.name, outcome=outcome)
            return None
        if record is not None:
            record.lies_on(layout.grid)
        reason = None if facts.compiles or not compiled else _why_unnoticed(base, options)
        if reason is not None:
            leave_alone(record, reason, facts.name, grid=layout.grid, outcome=outcome)
            return None
        reason = why_not_served(config, layout.grid, layout.grid)
        if reason is not None:
            outcome.left_alone(reason, tokens_of(layout.grid), layout.grid)
            if record is not None:
                record.left_alone(reason, facts.name, layout.grid)
            return None
        record = None if record is None or record.run.compiled else record

        def measured(config: ToMeConfig) -> Decision | None:
            return None if compiled else _decision_on_step(called, facts, layout, options, config, chosen)

        verdict = verdict_of(outcome.decided, config, layout.grid, measured, is_told=not compiled)
        unpaid = verdict.unpaid
        if unpaid is not None and compiled:
            leave_alone(record, unpaid, facts.name, grid=layout.grid, outcome=outcome)
            return None
        if unpaid is not None and record is None and outcome.knows(layout.grid):
            return None  # a call before this one has told what becomes of its layers
        if verdict.speedup is not None:
            outcome.measured(verdict.speedup)
        step, alike = draw_of(options, x.device, base), halves_alike(options, x, config)
        call = ModelCall(config, layout.grid, x.device, step=step, alike=alike)
        judged = verdict.judge, unpaid
        return DiTCall(call, facts, layout, options, record, self.by_times, outcome, compiled, chosen, *judged)


def _decision_on_step(
    called: _Called, facts: DiTModel, layout: Layout, options: dict[str, Any], config: ToMeConfig, chosen: Chosen
) -> Decision | None:
    """What is known of the times of whole steps, or None; on one row, as layers are."""
    base, x = called.base, called.x
    keeps = "ar_state" in options or layout.elsewhere > 0  # from call to call: one more would change the next ones
    if layout.tokens >= ALWAYS or keeps:
        return None

    def merged(plain: dict[str, Any], run: Callable[[dict[str, Any], dict[str, Any]], Any], judge: Judge) -> Any:
        call = ModelCall(config, layout.grid, x.device, step=draw_of(plain, x.device, base))
        patch = TriedDiTCall(call, facts, layout, plain, None, True, chosen=chosen, judge=judge)
        with patch.hooks(base.diffusion_model), chosen.followed():
            return run(patch.options, {})

    others = tokens_beside(layout.beside(called.arguments), called.arguments.get("attention_mask") is not None)
    about = f"{about_model(base)}, {others}"
    given = called.t, called.args, called.kwargs, layout.grid, 1, config, merged, chosen
    return decision_on_step(base, x, *given, chosen.kernels(x.device), about)


def _why_unnoticed(base: Any, options: dict[str, Any]) -> str | None:
    """Why a compiled model that takes no keyword is left alone, or None (graphs.py)."""
    if COMPILE_KEY in options.get("wrappers", {}).get("apply_model", {}) and not COMPARES_MODES:
        return "ToMe skips this model under torch.compile: the compiled graph would not notice ToMe"
    arguments = getattr(getattr(base, "current_patcher", None), "model_options", {}).get("torch_compile_kwargs", {})
    if arguments.get("fullgraph"):
        return "ToMe skips this model under torch.compile with fullgraph: its attentions run outside of the graph"
    return None


def _prompt(args: tuple) -> CallArguments:
    """apply_model's c_crossattn, where it comes by place."""
    return {"c_crossattn": args[1]} if len(args) > 1 else {}
