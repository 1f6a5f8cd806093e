"""The script that AUTOMATIC1111, Forge and reForge run with each generation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from modules import script_callbacks, scripts

from ..shared_tome.autotune.decision_log import together
from ..shared_tome.inspect.reasons import capped
from ..shared_tome.inspect.record import Run
from . import forge, gallery, hooks, infotext, panel, settings, xyz
from .notes import Notes, logger, set_up_log
from .options import Settings, named, settings_from
from .report import tell
from .sampling import Sampling

_STATE = "tome_state"
# SD.Next has no such callback, nor has AUTOMATIC1111 before 1.9: nothing tells there that sampling begins.
_TOO_OLD = (
    "this web UI does not tell extensions that sampling begins, so nothing is merged (AUTOMATIC1111 1.9 or newer, "
    "Forge and reForge do, SD.Next does not)"
)


class _State:
    """What one processing object owns: its settings and, while it samples, its hooks."""

    def __init__(self, owner: Any, chosen: Settings):
        self.owner, self.asked, self.notes = owner, chosen, Notes(owner)
        self.settings = chosen.resolved(multires=False)  # until a pass's model is known
        self.attachment: hooks.PassAttachment | None = None
        self.sampling: Sampling | None = None
        self.patched: Any = None  # Forge: the sd_model whose U-Net was patched for this pass
        self.nearly_over = False  # whether this pass is in its last two steps
        self.report = settings.NO_REPORT
        self.runs: dict[bool, Run] = {}  # this batch's first and hires pass
        self.refused: set[bool] = set()  # passes that were left alone as a whole
        self.maps: list[gallery.Map] = []
        self._own: set[bool] = set()  # whether queries could keep their own tokens, as far as layers were met
        self._exact: set[bool | None] = set()  # whether exact_every had an effect in the passes that are over

    def begin_pass(self, hires: bool) -> None:
        self.detach()
        self.settings = self.asked.resolved(forge.takes_multires(self.owner.sd_model))
        asked, config = self.asked.for_pass(hires), self.settings.for_pass(hires)
        if (less := asked.why_less(config)) is not None:
            self.notes.say(less)
        if hires:
            self.write()
        else:  # of the batch before
            self.runs.clear()
            self.refused.clear()
            self._exact.clear()
        self.runs.pop(hires, None)  # Forge begins its hires pass twice
        self.nearly_over = False

    def called(self) -> None:
        """After a call of the model: the host may save the picture before the hires pass, right after the last one."""
        if self.nearly_over:
            self.write()

    def self_token_found(self, can: bool) -> None:
        """One layer that keeps them makes another picture. At once: the host may save one before the hires pass."""
        if can not in self._own:
            self._own.add(can)
            infotext.write(self.owner.extra_generation_params, self.settings, None, *self.found)

    @property
    def kept_self_token(self) -> bool | None:
        return True in self._own if self._own else None

    @property
    def found(self) -> tuple[bool | None, str | None, bool | None]:
        """What infotext.write wants to know, as far as layers were met: kept_self_token, decisions, kept_exact."""
        decisions = together(run.tally.decided for run in self.runs.values()).text or None
        exact = self._exact | {None if self.sampling is None else self.sampling.kept_exact}
        return self.kept_self_token, decisions, True in exact if exact != {None} else None

    def merged(self) -> dict[bool, bool]:
        """By whether it is the hires pass, whether the batch's passes merged anything."""
        merged = {hires: any(not layer.reason for layer in run.tally.layers()) for hires, run in self.runs.items()}
        return {**merged, **dict.fromkeys(self.refused, False)}

    def write(self) -> None:
        """Make the picture's text claim what the passes did, and no more."""
        infotext.write(self.owner.extra_generation_params, self.settings, self.merged(), *self.found)

    def detach(self) -> None:
        attachment, self.attachment = self.attachment, None
        if self.sampling is not None:
            self._exact.add(self.sampling.kept_exact)
            self.sampling.end()
        self.sampling = self.patched = None
        if attachment is not None:
            attachment.detach()


def _state(p: Any) -> _State | None:
    """The state that p owns itself: a copy of p carries its original's, which is not to be used."""
    state = getattr(p, _STATE, None)
    return state if state is not None and state.owner is p else None


class ToMeScript(scripts.Script):
    """Callbacks in the order in which the host calls them."""

    def title(self) -> str:
        return "ToMe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        # The API calls this too, on no page, to learn the defaults.
        controls, self.infotext_fields = panel.build(self.elem_id, settings.start_values(is_img2img), is_img2img)
        self.paste_field_names = panel.paste_names()
        return controls

    def before_process(self, p: Any, *args: Any) -> None:
        # The checkpoint may yet change: nothing is hooked here. But a crash may have left hooks on.
        hooks.detach_all()
        try:
            chosen = settings_from({**named(args), **xyz.overrides_of(p)})
        except ValueError as error:
            chosen = settings_from({"enabled": False})
            self._refuse(p, str(error))
        if chosen.enabled and not _tells_sampling():
            chosen = settings_from({"enabled": False})
            Notes(p).say(_TOO_OLD)
        setattr(p, _STATE, _State(p, chosen))
        if chosen.enabled:
            _wrap_close(p)

    def process(self, p: Any, *args: Any) -> None:
        state = _state(p)
        if state is not None:
            infotext.erase(p.extra_generation_params)  # of the request that p is a copy of
            infotext.write(p.extra_generation_params, state.settings)
            if state.settings.enabled:  # not earlier: the request's own settings hold from here on
                state.report = settings.report_kind()

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        state = _state(p)
        if state is None or not state.settings.enabled:
            return
        hires = bool(getattr(p, "is_hr_pass", False))
        state.begin_pass(hires)
        config = state.settings.for_pass(hires)
        try:
            if not config.is_off:
                _check_alone(p, hires)
                sampling = Sampling(
                    config,
                    _seeds(p, state.settings),
                    state.notes,
                    report=True,  # costs next to nothing, and tells why where nothing is merged
                    keep_choices=state.settings.map,
                    self_token_found=state.self_token_found,
                )
                self._start(p, state, sampling)
                state.runs[hires] = sampling.run
        except hooks.NotServed as reason:
            state.detach()
            state.notes.say(str(reason))
            state.refused.add(hires)
            state.write()
        if config.is_off and forge.is_forge(p.sd_model):
            forge.unpatch(p.sd_model)

    def _start(self, p: Any, state: _State, sampling: Sampling) -> None:
        config = sampling.config
        cap = capped(config)
        if cap is not None:
            state.notes.say(cap)
        state.sampling = sampling
        if forge.is_forge(p.sd_model):
            forge.patch(p.sd_model, sampling, state.called)
            state.patched = p.sd_model
        else:
            state.attachment = hooks.PassAttachment(_diffusion_model(p.sd_model), sampling, state.called)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        _detach(p)
        state = _state(p)
        if state is None or not state.settings.enabled:
            return
        merged = state.merged()
        infotext.write(p.extra_generation_params, state.settings, merged or {False: False}, *state.found)
        if not merged and not state.settings.is_off:
            state.notes.say("nothing was merged: the ratio is 0 in each pass that was run")
        for run in state.runs.values():
            for note in run.tally.decided.notes():
                state.notes.say(note)
        if not state.runs:
            return
        line = tell(state.runs)
        unmerged = [layer for hires, run in state.runs.items() if not merged[hires] for layer in run.tally.layers()]
        nothing = not all(merged[hires] for hires in state.runs)
        if state.report != settings.NO_REPORT:
            # The picture's text, where it has the line, stands under the picture too.
            state.notes.say(line, shown=nothing or state.report == settings.LOG_REPORT)
        elif nothing and unmerged and all(state.notes.has_said(layer.reason) for layer in unmerged):
            state.notes.show(line)  # the log has the reasons already
        elif nothing:
            state.notes.say(line)
        if state.report == settings.TEXT_REPORT:
            p.extra_generation_params[infotext.REPORT] = line

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        state = _state(p)
        if state is not None and state.runs and state.settings.map:
            merged = [hires for hires, did in state.merged().items() if did]
            last = state.runs[max(merged or state.runs)]
            state.maps.append(gallery.Map.of(p, last, pp.image))

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        _detach(p)
        state = _state(p)
        if state is not None:
            gallery.add(processed, state.maps)
            state.maps = []

    def _refuse(self, p: Any, reason: str) -> None:
        """A value that is not possible: an API request gets HTTP 422, a person a picture without ToMe and a line. A
        cell of a plot stays empty, where such a picture would be taken for one of these options."""
        in_plot = bool(getattr(p, xyz.OVERRIDES, None))
        if not in_plot and not getattr(p, "is_api", False):
            Notes(p).say(f"off for this picture: {reason}")
            return
        logger.info("[ToMe] %s: %s", "a cell of the plot stays empty" if in_plot else "request refused", reason)

        def init(*args: Any, **kwargs: Any) -> None:
            if in_plot:  # which catches it
                raise ValueError(f"ToMe: {reason}")
            from fastapi import HTTPException

            raise HTTPException(status_code=422, detail=f"ToMe: {reason}")

        # The host swallows what a callback raises. What p's own methods raise reaches the client.
        p.init = init


def _on_cfg_denoiser(params: Any) -> None:
    """Each call of the denoiser, before its rows go to the model."""
    denoiser = getattr(params, "denoiser", None)
    p = getattr(denoiser, "p", None)
    state = _state(p) if p is not None else None
    if state is None or state.sampling is None:
        return
    total = getattr(denoiser, "total_steps", None)
    step = denoiser.step if total else params.sampling_step
    total = total or params.total_sampling_steps
    state.nearly_over = step >= total - 2
    try:
        if state.attachment is None:  # Forge: its calls tell their rows
            state.sampling.begin_step(step, total)
            if p.sd_model is not state.patched:  # the refiner brought another one
                forge.patch(p.sd_model, state.sampling, state.called)
                state.patched = p.sd_model
            return
        conditioning = (getattr(denoiser.sampler, "sampler_extra_args", None) or {}).get("cond")
        state.sampling.begin_step(step, total, params.x.shape[0], conditioning)
        state.attachment.attach(_diffusion_model(p.sd_model))  # the same for the others
    except hooks.NotServed as reason:
        state.detach()
        state.notes.say(str(reason))


def _detach(p: Any) -> None:
    state = _state(p)
    if state is not None:
        state.detach()


def _wrap_close(p: Any) -> None:
    """Take the hooks off in p.close too: the host calls it whatever happened."""
    owner = getattr(vars(p).get("close"), "tome_owner", None)
    if owner is p:
        return
    if owner is not None:
        del p.close  # p is a copy, and this is its original's
    original = p.close

    def close() -> None:
        try:
            _detach(p)
        finally:
            vars(p).pop("close", None)
            original()

    close.tome_owner = p
    p.close = close


def _check_alone(p: Any, hires: bool) -> None:
    """Raises NotServed where somebody else merges tokens or brings a U-Net that we cannot see into."""
    builtin = getattr(p.sd_model, "applied_token_merged_ratio", 0) or 0
    ratio = getattr(p, "get_token_merging_ratio", None)
    if builtin > 0 or (ratio is not None and ratio(for_hr=hires) > 0):
        raise hooks.NotServed(
            "is off, because the built-in token merging is on (Settings, Optimizations, Token merging ratio)"
        )
    with suppress(ImportError):  # Forge has no such module
        from modules import sd_unet

        if getattr(sd_unet, "current_unet", None) is not None:
            raise hooks.NotServed("is off, because another U-Net is active (Settings, Stable Diffusion, SD Unet)")


def _seeds(p: Any, chosen: Settings) -> list[int]:
    seeds = list(getattr(p, "seeds", None) or [0])
    return [chosen.config.seed] * len(seeds) if chosen.seed_rule == "fixed" else seeds


def _tells_sampling() -> bool:
    """Whether the host calls process_before_every_sampling."""
    return hasattr(scripts.Script, "process_before_every_sampling")


def _diffusion_model(sd_model: Any) -> Any:
    return getattr(getattr(sd_model, "model", None), "diffusion_model", None)


def register() -> None:
    """Hand our callbacks to the host. Called each time that it loads its scripts."""
    set_up_log()
    if not _tells_sampling():
        logger.info("[ToMe] %s", _TOO_OLD)
    script_callbacks.on_cfg_denoiser(_on_cfg_denoiser)
    script_callbacks.on_ui_settings(settings.add_settings)
    script_callbacks.on_before_ui(xyz.add_axes)
