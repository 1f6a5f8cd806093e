"""What became of ToMe in one sampling: one line on the node at its end, in the log too where nothing was merged.

The node puts `OutcomePatch` around the sampler (OUTER_SAMPLE). It makes the sampling's Outcome and hands it to the
calls of the model in the sampler's own copy of transformer_options, so it ends with the sampling.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.autotune.decision_log import DecisionLog
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.core.grid import Grid
from ..shared_tome.inspect.reasons import counted, what_to_change, why_no_step
from ..shared_tome.merging.residual import ALONE
from .log import logger, say_once
from .mergers import merger_in
from .record import RECORD
from .residuals import SamplingResiduals
from .shown import show_on_node

OUTER_SAMPLE = "outer_sample"  # comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
NOT_MET = (
    "no attention of the model reached ToMe: another node has replaced them, or this ComfyUI is too old to pass them on"
)
ANSWERED = "another node answered from its cache each call that ToMe would have merged"
NEVER_ASKED = "no call of the model reached ToMe, because another node runs the model itself"
_OUTCOME = "ToMe outcome"
NOTHING = "nothing was merged in this sampling"
_MOST_PLACES = 6


class Outcome:
    """What the calls of one sampling tell of themselves. Safe to fill from several threads.

    falls: whether a call's noise level is never above those of the steps before (never_rises).
    passed: the progress, 0 to 1, that no later call falls behind; -1: not known.
    residuals: what exact steps leave for the others; None: the options do not ask for it.
    """

    def __init__(self, base: Any = None, what: str = "this sampling", falls: bool = False) -> None:
        # Only referred to: a call that ToMe Record keeps has this outcome in its options.
        self._base = None if base is None else weakref.ref(base)
        self._what = what  # is told of
        self.asked = False
        self.falls, self.passed = falls, -1.0
        self._merged = False
        self._skipped: ToMeConfig | None = None  # of calls at ratio 0
        self._reached = False  # by a call at another ratio
        self._reasons: dict[str, dict[str, None]] = {}  # each with its places, in the order in which they came up
        self._sizes: dict[Grid, bool] = {}  # of layers that were met: whether any of them was merged
        self._speedup: float | None = None
        self._exact: str | None = None  # what is said of layers that are whole in some steps by exact_every
        self.decided = DecisionLog()
        self.residuals: SamplingResiduals | None = None

    @property
    def base(self) -> Any:
        """The model that is sampled, comfy.model_base.BaseModel; None where it is not known, or gone."""
        return None if self._base is None else self._base()

    def __deepcopy__(self, memo: dict) -> Outcome:
        return self  # copies of a model's options, for another GPU, tell the same sampling

    def is_skipped(self, config: ToMeConfig, ratio: float) -> bool:
        """A call of the model begins. config: the node's options; ratio: what holds now. Whether that is 0."""
        if not is_compiling():
            self._skipped = config if ratio == 0.0 else self._skipped
            self._reached |= ratio > 0.0
        return ratio == 0.0

    def merged(self, grid: Grid | None = None) -> None:
        """A layer on a grid is merged; None: not known. Not for what torch.compile traces: that is told before the
        call."""
        if not is_compiling():
            self._merged = True
            if grid is not None:
                self._sizes[grid] = True

    def exact(self, reason: str, grid: Grid) -> None:
        """A layer on a grid is whole in this step, by exact_every."""
        self._exact = reason
        self._sizes.setdefault(grid, False)

    def left_alone(self, reason: str, where: str = "", grid: Grid | None = None) -> None:
        """A call or a layer is left alone. where: the layer, its grid, or the model. grid: of its tokens, if known."""
        if not is_compiling():
            self._reasons.setdefault(reason, {}).setdefault(where)
            if grid is not None:
                self._sizes.setdefault(grid, False)

    def knows(self, grid: Grid) -> bool:
        """Whether a layer on a grid was told of."""
        return grid in self._sizes

    def measured(self, speedup: float) -> None:
        """How many times as fast a whole step was measured to be."""
        self._speedup = speedup

    def line(self) -> str | None:
        """Why nothing was merged, or None where something was."""
        if self._merged:
            return None
        if not self.asked:
            return NEVER_ASKED
        if self._skipped is not None and not self._reached:
            why = why_no_step(self._skipped, self._what)
            return why + what_to_change([why])
        if self._exact is not None and self._why_not_exact is None:
            return ALONE if self.residuals is None else self.residuals.why_alone
        if not self._reasons:
            return NOT_MET
        return self._left() + what_to_change(self._reasons)

    def as_text(self, decided: DecisionLog | None = None, older: str | None = None) -> str:
        """What happened, for the node: "2 of 3 sizes merged (...)", or why nothing was merged. At the end, where people
        copy it from, what was decided; decided: where that is of several samplings. older: see OutcomePatch."""
        why = self.line()
        found = [f"{NOTHING}: {why}" if why is not None else self._sizes_told(), *self.decided.notes()]
        found += [self._why_not_exact, older, None if why is not None else "More: ToMe Report"]
        decided = self.decided if decided is None else decided
        found += [decided.as_text if why is None or decided.leaves_alone else None]
        return ". ".join(filter(None, found))

    @property
    def _why_not_exact(self) -> str | None:
        """Why the option exact_every had no effect, or None; a first call may have been exact before it was known."""
        return None if self.residuals is None else self.residuals.why_off

    def _sizes_told(self) -> str:
        """What was merged and what was not."""
        merged = [grid for grid, did in self._sizes.items() if did]
        total = len(self._sizes)
        text = "merged" if not merged else f"{len(merged)} of {counted(total, 'size')} merged"
        if merged:
            text += f" ({', '.join('x'.join(map(str, grid)) for grid in merged)} tokens)"
        if self._exact is not None and merged and self._why_not_exact is None:
            text += f", {self._exact}"
        if self._speedup is not None:
            text += f", a step was measured {self._speedup:.2f}x as fast"
        if self._reasons:
            text += f". Left alone: {self._left()}"
        return text

    def _left(self) -> str:
        """Each reason with its places."""
        return "; ".join(reason + _named(list(filter(None, places))) for reason, places in self._reasons.items())


def tokens_of(grid: Grid) -> str:
    """A grid as the log names it."""
    return f"{'x'.join(map(str, grid))} tokens"


def _named(places: list[str]) -> str:
    if not places:
        return ""
    more = len(places) - _MOST_PLACES
    return f" ({', '.join(places[:_MOST_PLACES])}{f' and {more} more' if more > 0 else ''})"


@contextmanager
def outcome_of(options: dict[str, Any]) -> Iterator[Outcome]:
    """The outcome of the sampling that a call of the model belongs to, from its transformer_options.

    A call outside a sampler has an outcome of its own, said when the call ends, once a process.
    """
    known = options.get(_OUTCOME)
    outcome = Outcome(what="this call of the model") if known is None else known
    outcome.asked = True
    yield outcome
    if known is None and (line := outcome.line()):
        say_once(line, "nothing was merged in this call of the model")


# ComfyUI's samplers that call the model, after a call at a step's own level, at none above that. Not so: heunpp2, which
# looks two steps ahead; ar_video, which begins anew for each block; those that choose their steps themselves.
_FALLING = frozenset(
    "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 "
    "dpm_2_ancestral lms dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp "
    "dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm "
    "ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp "
    "gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece".split()
)


def never_rises(sampler: Any, sigmas: Tensor) -> bool:
    """Whether a sampler's calls of the model never go back to more noise on these levels [n]."""
    function, more = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", None) or {}
    module, name = (str(getattr(function, part, "")) for part in ("__module__", "__name__"))
    if module != "comfy.k_diffusion.sampling" or name.removeprefix("sample_") not in _FALLING:
        return False
    return not more.get("s_churn") and bool((sigmas[1:] <= sigmas[:-1]).all())


def around_prediction(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Around CFGGuider.predict_noise(x, timestep, model_options, seed): the sampler asks the model, in however many
    calls."""
    given = args[2] if len(args) > 2 else kwargs.get("model_options", {})
    known = given.get("transformer_options", {}).get(_OUTCOME)
    if known is not None and known.residuals is not None:
        known.residuals.ask()
    return executor(*args, **kwargs)


class OutcomePatch:
    """The wrapper around CFGGuider.outer_sample. Safe to share between clones and threads.

    node: the id of the node ToMe, whose display tells what happened; None: there is none. older: what that says beside
    it, of a workflow of another version.
    """

    def __init__(self, config: ToMeConfig, node: str | None = None, older: str | None = None):
        self.config, self.node, self.older = config, node, older
        self._decided = DecisionLog()  # in all samplings so far, for the line alone: a picture may have two passes

    def __call__(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Raises ValueError before the first step where a node behind ToMe merges as well."""
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        merger = merger_in(options)
        if merger is not None:
            raise ValueError(f"this model is merged by ToMe and by {merger} too; remove one of the two nodes.")
        patcher = getattr(executor.class_obj, "model_patcher", None)
        outer = options.get(_OUTCOME)  # of the sampling that this one is inside of
        outcome = options[_OUTCOME] = Outcome(getattr(patcher, "model", None), falls=never_rises(sampler, sigmas))
        if self.config.keeps_exact:
            outcome.residuals = SamplingResiduals(self.config, sampler, executor.class_obj)
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            if outcome.residuals is not None:
                outcome.residuals.end()
            if outer is None:
                options.pop(_OUTCOME, None)
            else:
                options[_OUTCOME] = outer
        if len(sigmas) > 1:
            self._decided.add(outcome.decided)
            show_on_node(self.node, outcome.as_text(self._decided, self.older))
            for note in outcome.decided.notes():
                say_once(note)
        line = outcome.line()
        if line is not None and len(sigmas) > 1:  # else the sampler has no step
            logger.info("[ToMe] %s: %s", NOTHING, line)
            if not outcome.asked and RECORD in options:
                options[RECORD].passed_by(self.config, sigmas, line)
        return out
