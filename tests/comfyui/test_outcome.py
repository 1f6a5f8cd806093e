"""A sampling in which ToMe merges nothing says why in one line at its end; one that merges says nothing."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from . import dit_host, host
from .host import sample

NOTHING = "[ToMe] nothing was merged in this sampling: "
LARGER = ". To change that: make a larger picture, or lower min tokens"
STEPS = ". To change that: lower start, raise end or take more steps"


@pytest.fixture
def said(comfy_nodes, caplog):
    """said() -> ToMe's lines since the last call of it."""
    host.forget_log()

    def take():
        lines = [record.message for record in caplog.records if record.name == "ToMe"]
        caplog.clear()
        return lines

    with caplog.at_level(logging.INFO, logger="ToMe"):
        yield take


def test_a_small_picture_says_so_in_each_sampling(sd15, tome, said):
    small = tome(sd15, min_tokens=2048)
    line = NOTHING + "fewer than min tokens 2048 (32x32 tokens, 16x16 tokens, 8x8 tokens)" + LARGER
    assert torch.equal(sample(small), sample(sd15))
    assert said() == [line]
    sample(small)
    assert said() == [line]


def test_a_merged_picture_says_nothing(sd15, tome, said):
    """Some of its layers have too few tokens: that is as it should be."""
    sample(tome(sd15, min_tokens=1024))
    assert said() == []


def test_levels_without_attention_say_so(sd15, tome, said):
    sample(tome(sd15, levels="3"), steps=1)
    assert said() == [
        NOTHING + "its level is not one of levels 3 (32x32 tokens, 16x16 tokens, 8x8 tokens)"
        ". To change that: set levels to auto"
    ]


def test_a_level_that_a_unet_lacks_is_told_as_on_transformers(sdxl, tome, said):
    sample(tome(sdxl, levels="0,1"), steps=1)
    assert said() == ["[ToMe] this model has attention at levels 1, 2: of levels 0,1 it has only 1"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"start": 0.8}, "no step of this sampling lies between start 0.8 and end 1" + STEPS),
        (
            {"ratio": 0.0, "ratio_end": 0.5},
            "the ratio is 0 at each step of this sampling: it moves from 0 to 0.5 between start 0 and end 1"
            ". To change that: raise the ratios or take more steps",
        ),
    ],
)
def test_a_schedule_that_no_step_meets_says_so(sd15, tome, said, options, why):
    sample(tome(sd15, **options), steps=1)
    assert said() == [NOTHING + why]


def test_the_first_part_of_a_run_speaks_of_its_own_steps(sd15, tome, said):
    """KSampler (Advanced): its steps lie before the start; the second part merges and says nothing."""
    import nodes

    model, latent, lines = tome(sd15, start=0.5), {"samples": torch.zeros(1, 4, 32, 32)}, []
    for first, last in ((0, 2), (2, 4)):
        noise, leftover = ("enable", "enable") if first == 0 else ("disable", "disable")
        (latent,) = nodes.KSamplerAdvanced().sample(
            model, noise, 1, 4, 3.0, "euler", "normal", host.conditioning(1), host.conditioning(2), latent, first, last,
            leftover,
        )  # fmt: skip
        lines.append(said())
    assert lines == [[NOTHING + "no step of this sampling lies between start 0.5 and end 1" + STEPS], []]


def test_steps_within_the_limits_are_not_denied(sd15, tome, said):
    """The first step lies before the start, the second one merges no layer: that one's reason is said."""
    sample(tome(sd15, start=0.4, min_tokens=2048), steps=2)
    assert said() == [NOTHING + "fewer than min tokens 2048 (32x32 tokens, 16x16 tokens, 8x8 tokens)" + LARGER]


def test_a_call_outside_a_sampler_speaks_of_itself(sd15, tome, said):
    late = tome(sd15, start=0.5)
    with torch.no_grad():
        late.model.apply_model(
            torch.zeros(1, 4, 32, 32), torch.full((1,), 14.0), c_crossattn=torch.zeros(1, 7, 64),
            transformer_options=dit_host.options_of(late, 14.0),
        )  # fmt: skip
    what = "this call of the model"
    assert said() == [
        f"[ToMe] no step of {what} lies between start 0.5 and end 1{STEPS} (nothing was merged in {what})"
    ]


def test_limits_without_a_step_between_are_told_by_the_node(sd15, tome, said):
    assert torch.equal(sample(tome(sd15, start=0.5, end=0.5)), sample(sd15))
    assert said() == ["[ToMe] nothing will be merged: no step of a sampling lies between start 0.5 and end 0.5"]
    tome(sd15, ratio=0.0, start=0.5, end=0.5)
    assert said() == []  # off, as the ratio says


def test_a_model_whose_attentions_another_node_runs(sd15, tome, said, monkeypatch):
    from comfy.ldm.modules.attention import SpatialTransformer

    monkeypatch.setattr(SpatialTransformer, "forward", lambda self, x, *args, **kwargs: x)
    sample(tome(sd15))
    why = (
        "no attention of the model reached ToMe: another node has replaced them, or this ComfyUI is too old to pass "
        "them on"
    )
    assert said() == [NOTHING + why]


def test_a_schedule_that_one_step_meets_says_nothing(sd15, tome, said):
    sample(tome(sd15, start=0.5), steps=2)
    assert said() == []


def test_a_ratio_that_takes_no_whole_token_says_so(sd15, tome, said):
    sample(tome(sd15, ratio=0.01, levels="2"), steps=1)
    level = "its level is not one of levels 2 (32x32 tokens, 16x16 tokens)"
    assert said() == [
        f"{NOTHING}{level}; the ratio takes away no whole token (8x8 tokens). To change that: set levels to auto; "
        "raise the ratio"
    ]


def test_a_sampler_without_a_step_says_nothing(sd15, tome, said):
    sample(tome(sd15, min_tokens=2048), steps=2, denoise=0.0)
    assert said() == []


def test_a_call_outside_a_sampler_says_it_once(sd15, tome, said):
    small = tome(sd15, min_tokens=2048)
    x, t = torch.zeros(1, 4, 32, 32), torch.full((1,), 0.7)
    for _ in range(2):
        with torch.no_grad():
            small.model.apply_model(
                x, t, c_crossattn=torch.zeros(1, 7, 64), transformer_options=dit_host.options_of(small, 0.7)
            )
    (line,) = said()
    assert line.startswith("[ToMe] fewer than min tokens 2048 (32x32 tokens, ")


def test_an_interrupted_sampling_leaves_nothing_behind(sd15, tome, said):
    def fail(*_):
        raise RuntimeError("stop")

    merged = tome(sd15, min_tokens=2048)
    broken = merged.clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="stop"):
        sample(broken)
    assert said() == []
    assert not any("outcome" in key for key in broken.model_options["transformer_options"])
    sample(merged)
    assert len(said()) == 1


def test_a_sampling_inside_a_sampling_leaves_the_outer_one_its_outcome(sd15, tome, said):
    """Another node's wrapper around the sampler samples the first step by itself, then all of them."""
    import comfy.patcher_extension as extension

    def first_alone(executor, noise, latent, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        if len(sigmas) > 2:  # else it is the inner one
            kept = guider.conds
            wrappers = extension.get_all_wrappers("outer_sample", guider.model_options, is_model_options=True)
            inner = extension.WrapperExecutor.new_class_executor(guider.outer_sample, guider, wrappers)
            inner.execute(noise, latent, sampler, sigmas[:2], *args, **kwargs)
            guider.conds = kept
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)

    def run(**options):
        model = tome(sd15, **options)
        model.add_wrapper("outer_sample", first_alone)
        sample(model)
        return said()

    assert run() == []
    assert run(start=0.4) == [
        NOTHING + "no step of this sampling lies between start 0.4 and end 1" + STEPS
    ]  # the inner one's
    assert run(min_tokens=2048) == 2 * [
        NOTHING + "fewer than min tokens 2048 (32x32 tokens, 16x16 tokens, 8x8 tokens)" + LARGER
    ]


@pytest.fixture
def shown(comfy_nodes, monkeypatch):
    """What the server was asked to show, as (text, node, page). The page "me" has queued the prompt."""
    found = []

    class Server:
        client_id = "me"

        def send_progress_text(self, text, node_id, sid=None):
            found.append((text, node_id, sid))

    prompt_server = SimpleNamespace(instance=Server())
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=prompt_server))
    return SimpleNamespace(lines=found, server=Server, prompt_server=prompt_server)


@pytest.fixture
def on_node(comfy_nodes):
    """on_node(model, **options) -> the merged clone of the node that the prompt calls 12."""

    def apply(model, **options):
        node = type("ToMe", (comfy_nodes["ToMe"],), {"hidden": SimpleNamespace(unique_id="12")})
        values = {"ratio": 0.5, "stride_x": 2, "stride_y": 2, "method": "sample", "seed": 0, "min_tokens": 0}
        version = host.pack_module("nodes").version()
        return node.execute(model, **{"version": version, **values, **options}).result[0]

    return apply


def test_the_node_tells_which_sizes_were_merged(sd15, on_node, shown):
    merged = on_node(sd15, min_tokens=256)
    assert shown.lines == []
    for _ in range(2):
        sample(merged)
    (line, node, page), again = shown.lines
    assert line == (
        "2 of 3 sizes merged (32x32, 16x16 tokens). Left alone: fewer than min tokens 256 (8x8 tokens). "
        "More: ToMe Report. Decisions: +32x32 +32x32/32/1 +16x16/64/2"
    )
    assert (node, page) == ("12", "me") and again == (line, node, page)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_tokens": 2048}, "nothing was merged in this sampling: fewer than min tokens 2048"),
        ({"start": 0.95}, "nothing was merged in this sampling: no step of this sampling lies"),
        ({"ratio": 0.0}, "nothing will be merged: ratio is 0"),
        (
            {"start": 0.5, "end": 0.5},
            "nothing will be merged: no step of a sampling lies between start 0.5 and end 0.5",
        ),
    ],
)
def test_the_node_tells_why_nothing_was_merged(sd15, on_node, shown, said, options, why):
    sample(on_node(sd15, **options), steps=1)
    ((line, _, _),) = shown.lines
    assert line.startswith(why)
    assert options.get("ratio") == 0.0 or said() == [f"[ToMe] {line}"]  # ratio 0 is how ToMe is switched off


@pytest.mark.parametrize("kind", ["unet", "transformer", "no page"])
def test_the_page_is_told_what_the_model_does_not_look_at(sd15, on_node, shown, kind):
    sent = []
    shown.server.send_sync = lambda self, event, data, page: sent.append((event, data, page))
    if kind == "no page":
        shown.server.client_id = None
    on_node(dit_host.small("flux") if kind == "transformer" else sd15)
    told = {
        "unet": {"node": "12", "idle": [], "means": {"auto": "sample"}},
        "transformer": {"node": "12", "idle": ["levels", "cross_attention", "mlp", "exact_every"], "means": {}},
    }
    assert sent == ([("tome.model", told[kind], "me")] if kind in told else [])


def test_a_measured_step_tells_its_factor(comfy_nodes):
    outcome = sys.modules[comfy_nodes["ToMe"].__module__.rpartition(".")[0] + ".outcome"].Outcome()
    outcome.asked = True
    outcome.merged((64, 64))
    outcome.measured(1.4249)
    assert (
        outcome.as_text() == "1 of 1 size merged (64x64 tokens), a step was measured 1.42x as fast. More: ToMe Report"
    )


@pytest.mark.parametrize("lacks", ["a page", "the function", "a server"])
def test_where_no_page_can_show_it_the_picture_is_made_all_the_same(sd15, on_node, shown, lacks):
    expected = sample(on_node(sd15))
    shown.lines.clear()
    if lacks == "a page":  # a request of a script's that names none: no other's page is written to
        shown.server.client_id = None
    elif lacks == "the function":
        del shown.server.send_progress_text
    else:
        shown.prompt_server.instance = None
    assert torch.equal(sample(on_node(sd15)), expected)
    assert shown.lines == []
