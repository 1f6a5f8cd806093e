"""Where nothing is merged the picture's text claims nothing, and one line a generation says why."""

from __future__ import annotations

import pytest
import torch

from . import models
from .host import FIRST, SECOND, VERSION
from .test_forge import _Loaded
from .test_generation import _use_hypertile

ON = {"ratio": 0.5, "min_tokens": 0, "own_token": False}
CLAIMED = {
    "ToMe ratio": 0.5, "ToMe method": "sample", "ToMe min tokens": 0, "ToMe own token": False, "ToMe decisions": FIRST,
    "ToMe version": VERSION,
}  # fmt: skip


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


@pytest.fixture(params=["a1111", "forge", "reforge"])
def any_host(host, request):
    if request.param != "a1111":
        host.shared.sd_model, host.forge = _Loaded(request.param == "reforge"), True
    return host


def _one_line(lines, why, p, times=1):
    found = [line for line in lines if "nothing was merged" in line]
    assert len(found) == times and all(why in line for line in found), lines
    assert [comment for comment in p.comments if why in comment], "it does not stand under the picture"
    lines.clear()


@pytest.mark.parametrize("report", ["no", "in the log"])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_tokens": 2048}, "(fewer than min tokens 2048)"),
        ({"levels": "3"}, "(its level is not one of levels 3)"),
        (
            {"start": 0.95},
            "start 0.95 and end 1 leave out all 3 steps that were run. To change that: lower start, raise end or take "
            "more steps",
        ),
        ({"ratio": 0.001}, "(the ratio takes away no whole token)"),
    ],
    ids=["few tokens", "a level without attention", "a start behind the last step", "less than a token"],
)
def test_the_text_claims_nothing_and_a_line_says_why(any_host, lines, options, why, report):
    any_host.opts.data["tome_report"] = report
    plain, _ = any_host.generate(seeds=(1, 2), batch_size=1)
    found, p = any_host.generate([{**ON, **options}], seeds=(1, 2), batch_size=1)
    assert not p.extra_generation_params and not any("ToMe" in text for text in p.processed.infotexts)
    assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))
    _one_line(lines, why, p)


def test_layers_that_others_have_replaced(host, lines):
    _use_hypertile(host.shared.sd_model.model.diffusion_model, True)
    _, p = host.generate([ON])
    assert not p.extra_generation_params
    _one_line(lines, "ToMe skips a self-attention that another node or extension replaces", p)


def test_a_forge_in_which_another_extension_takes_our_place(host, lines, monkeypatch):
    """Its U-Net has one place for a function around the model, and who comes last may not call the one before."""
    host.shared.sd_model, host.forge = _Loaded(), True
    script = type(host.tabs["txt2img"].scripts[0])
    before = script.process_before_every_sampling

    def and_then(self, p, *args, **kwargs):
        before(self, p, *args, **kwargs)
        unet = p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_unet_function_wrapper(lambda run, args: run(args["input"], args["timestep"], **args["c"]))

    monkeypatch.setattr(script, "process_before_every_sampling", and_then)
    _, p = host.generate([ON])
    assert not p.extra_generation_params
    _one_line(lines, "another extension runs the model without ToMe", p)


def test_a_model_whose_blocks_are_run_by_another_extension(host, lines):
    for block in host.shared.sd_model.model.diffusion_model.modules():
        if hasattr(block, "attn1"):
            block.forward = lambda x, context=None, block=block: x
    _, p = host.generate([ON])
    assert not p.extra_generation_params
    _one_line(lines, "another extension runs the model's self-attention", p)


def test_an_interrupt_before_merging_began(host, lines):
    host.interrupt_at = 1
    _, p = host.generate([{**ON, "start": 0.5}], steps=8)
    assert not p.extra_generation_params
    _one_line(lines, "leave out the one step that was run", p)
    host.interrupt_at = 0
    _, p = host.generate([ON])
    assert not p.extra_generation_params
    _one_line(lines, "no step was run", p)


def test_a_hires_ratio_without_a_hires_pass(host, lines):
    _, p = host.generate([{**ON, "ratio": 0.0, "hires_ratio": 0.5}])
    assert not p.extra_generation_params
    _one_line(lines, "the ratio is 0 in each pass that was run", p)


def test_a_ratio_that_has_not_begun_to_move(host, lines):
    host.interrupt_at = 1
    _, p = host.generate([{**ON, "ratio": 0.0, "ratio_end": 0.5}], steps=12)
    assert not p.extra_generation_params
    _one_line(lines, "the ratio is 0 in each step that was run", p)


def test_an_interrupt_after_merging_began_keeps_the_text(host):
    host.interrupt_at = 2
    _, p = host.generate([ON], steps=8)
    assert p.extra_generation_params == CLAIMED and not p.troubles


def test_merging_that_begins_in_the_last_step_is_told(host):
    _, p = host.generate([{**ON, "start": 0.7}], steps=4)
    assert p.extra_generation_params == {**CLAIMED, "ToMe start": 0.7} and not p.troubles


def test_a_first_pass_that_merges_nothing(any_host, tome, lines, monkeypatch):
    """256 tokens, and 576 in the hires pass. The host may save the first pass's picture before the hires pass."""
    script, seen = type(any_host.tabs["txt2img"].scripts[0]), []
    monkeypatch.setattr(script, "before_hr", lambda self, p, *args: seen.append(dict(p.extra_generation_params)), False)
    args = [{**ON, "min_tokens": 300}]
    found, p = any_host.generate(args, enable_hr=True)
    assert seen == [{}]
    assert p.extra_generation_params == {
        "ToMe ratio": 0.0, "ToMe hires ratio": 0.5, "ToMe method": "sample", "ToMe min tokens": 300,
        "ToMe own token": False, "ToMe decisions": f"+24x24 +24x24/32/{4 if any_host.forge else 2}",
        "ToMe version": VERSION,
    }  # fmt: skip
    _one_line(lines, "hires pass: sample 0.5, level 0", p)
    again, _ = any_host.generate([tome.infotext.read(p.extra_generation_params)], enable_hr=True)
    assert torch.equal(found[0], again[0])


def test_a_hires_pass_that_merges_nothing(host, tome, lines, monkeypatch):
    def _taken(module):
        return host.state_steps == 2 and hasattr(module, "to_q")  # the hires pass has two steps

    monkeypatch.setattr(tome.block, "is_taken", _taken)
    _, p = host.generate([ON], enable_hr=True)
    decided = f"{SECOND.split()[0]} {FIRST}"
    assert p.extra_generation_params == {**CLAIMED, "ToMe hires ratio": 0.0, "ToMe decisions": decided}
    _one_line(lines, "hires pass: sample 0.5, nothing was merged; left alone", p)


def test_a_refused_first_pass_and_a_hires_pass_that_merges(host, monkeypatch):
    from . import host as program

    monkeypatch.setattr(program.Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.4 * (not for_hr))
    _, p = host.generate([ON], enable_hr=True)
    assert p.extra_generation_params == {
        **CLAIMED, "ToMe ratio": 0.0, "ToMe hires ratio": 0.5, "ToMe decisions": SECOND,
    }  # fmt: skip


def test_each_batch_tells_of_itself(host, monkeypatch):
    """The second batch's model is another one."""
    other = models.Loaded(_Flat())
    script = type(host.tabs["txt2img"].scripts[0])

    def swap(self, p, *args, **kwargs):
        if p.iteration == 1:
            host.shared.sd_model = other

    monkeypatch.setattr(script, "process_batch", swap, False)
    _, p = host.generate([ON], seeds=(1, 2), batch_size=1)
    assert ["ToMe" in text for text in p.processed.infotexts[1:]] == [True, False]


class _Flat(torch.nn.Module):
    def forward(self, x, t, context=None):
        return x * 0.1


def test_a_web_ui_that_does_not_tell_when_sampling_begins(host, lines, monkeypatch):
    """SD.Next: nothing is hooked there, so nothing may be claimed."""
    from . import host as program

    call, missing = program.Runner.call, ("process_before_every_sampling", "before_hr", "post_sample")
    monkeypatch.delattr(host.scripts.Script, "process_before_every_sampling")
    monkeypatch.setattr(
        program.Runner,
        "call",
        lambda self, name, *args, **kwargs: None if name in missing else call(self, name, *args, **kwargs),
    )
    plain, p = host.generate()
    assert not lines and not p.troubles
    found, p = host.generate([{**ON, "map": True}], seeds=(1, 2), batch_size=1)
    assert torch.equal(plain[0], found[0]) and not p.extra_generation_params
    assert len(lines) == 1 and "SD.Next" in lines[0] and len(p.comments) == 1
