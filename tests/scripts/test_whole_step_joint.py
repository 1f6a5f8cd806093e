"""levels "auto" on a GPU: a transformer's whole step is run both ways at its first call, by a copy of the model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.holders import modules_holding
from support.made_up_gpu import MadeUpGPU, StepTimes

import shared_tome
from shared_tome import ModelCall, ToMeConfig, decisions_of
from shared_tome.autotune import layer, store
from shared_tome.autotune import step as step_auto
from shared_tome.autotune.paying import Decision, Judge
from shared_tome.scripts import joint, joint_autotune

from . import dits, models
from .dits import DITS
from .test_idle import MODEL_HOOKS

OPTIONS = {"min_tokens": 0, "ratio": 0.5, "method": "sample", "own_token": False}
LEFT, ALONE, MERGED = "-6x10", "+6x10 -6x10/32/2/256", "+6x10 +6x10/32/2/256"
WHY = "merging does not pay here: a step takes 100.0 ms without and 100.0 ms with it"


@torch.no_grad()
def run(model, rows=models.ALL, mask=None):
    """Flux: six text tokens and an image of 6x10, in three attentions."""
    told = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask}}
    return model(
        hidden_states=models.noise(2, 60, 8, seed=1)[rows], encoder_hidden_states=dits.text(rows, 6),
        pooled_projections=models.noise(2, 8, seed=3)[rows], timestep=dits.times(rows, 0.5),
        img_ids=dits.flux_ids(6, 10), txt_ids=torch.zeros(6, 3), return_dict=False, **told,
    )[0]  # fmt: skip


def patched(model, **options):
    return shared_tome.apply_patch(model, config=ToMeConfig(**{**OPTIONS, **options}))


class MadeUpJoint(StepTimes, MadeUpGPU):
    """merged: the attentions; a way is how many were merged."""

    def __init__(self, monkeypatch, folder):
        super().__init__(monkeypatch, folder, store)
        plan = ModelCall.plan

        def counted(call, *given):
            made = plan(call, *given)
            self.merged += [] if made is None else [1]
            return made

        def measures(config, grid, device):
            return config.levels == "auto" and torch.Size(grid).numel() < joint.ALWAYS

        def compared(whole, merged, device):
            return Decision(2e4, 2e4 - 1e3 * self.saves_ms, 1e3 * self.costs_ms)

        monkeypatch.setattr(ModelCall, "plan", counted)
        monkeypatch.setattr(joint_autotune, "measures", measures)
        monkeypatch.setattr(joint_autotune, "compared", compared)
        self.time_steps(monkeypatch, step_auto)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return MadeUpJoint(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("times", "text", "ways"),
    [
        ((100, 95, 5, 8), LEFT, [0, *[3, 0, 0] * 4]),  # 100 ms, with its three attentions 119 by the processor
        ((200, 80, 5, 8), MERGED, [0, *[3, 0, 0] * 4]),  # 200, 185: its processor's time does not show
        ((200, 80, 5, 1), MERGED, [0, *[3, 0] * 4]),  # each attention pays beside a processor that is waited for
        ((100, 99, 5, 1), LEFT, [0, *[3, 0] * 4]),  # 100, 102: and yet the step does not
        ((100, 20, 0, 1), LEFT, [0, *[0, 0] * 4]),
        ((500, 80, 5, 8), MERGED, [0]),  # long enough without a look
        ((500, 80, 0, 1), ALONE, [0]),
    ],
)
def test_the_step_decides(gpu, caplog, times, text, ways):
    gpu.gpu_ms, gpu.cpu_ms, gpu.saves_ms, gpu.costs_ms = times
    model = models.flux()
    plain, expected = run(model), run(patched(models.flux(), levels="0"))
    assert not torch.equal(plain, expected)
    patched(model)
    for _ in range(3):
        assert torch.equal(run(model), expected if text == MERGED else plain)
    assert gpu.ways == ways and decisions_of(model) == text
    assert models.count_hooks(model) == MODEL_HOOKS if text == LEFT else models.count_hooks(model) > MODEL_HOOKS
    said = [record.message for record in caplog.records if "a step takes" in record.message]
    assert len(said) == (text == LEFT) and all("nothing is merged" in line and "6x10 tokens" in line for line in said)
    # Another process, and another model of that kind.
    gpu.forget()
    gpu.ways.clear()
    again = patched(models.flux())
    assert torch.equal(run(again), expected if text == MERGED else plain) and not gpu.ways
    shared_tome.remove_patch(model)
    assert models.count_hooks(model) == 0


@pytest.mark.parametrize(("text", "merged"), [(LEFT, False), (ALONE, False), (MERGED, True), ("+all", True)])
def test_a_text_is_obeyed_and_nothing_is_timed(gpu, caplog, text, merged):
    model, expected = models.flux(), run(patched(models.flux(), levels="0") if merged else models.flux())
    patched(model, decisions=text)
    assert all(torch.equal(run(model), expected) for _ in range(2))
    assert not gpu.keys and not gpu.ways and decisions_of(model).startswith(text[0])
    assert ("the decisions that are set leave it alone" in caplog.text) != merged


def test_a_text_of_the_step_alone_leaves_the_layers_to_be_timed(gpu):
    gpu.saves_ms, gpu.costs_ms = 5, 1
    model = patched(models.flux(), decisions="+6x10")
    assert torch.equal(run(model), run(patched(models.flux(), levels="0")))
    assert not gpu.steps and len(gpu.keys) == 1 and decisions_of(model) == MERGED


@pytest.mark.parametrize("name", DITS)
def test_what_is_run_is_the_first_row_of_the_call(gpu, monkeypatch, name):
    """Of each model; that it is what the call gives for that row shows that nothing of another row is in it."""
    outs, dit = [], DITS[name]

    def compared(whole, merged, device):
        outs.extend(_tensors(made()) for made in (whole, merged(Judge(waits=False))))
        return Decision(1e5, 9e4, 0.0, busy=True)

    monkeypatch.setattr(step_auto, "_compared", compared)
    model, options = dit.model(), {"ratio": 0.75}
    plain = dit.run(dit.model())
    dit.run(patched(model, **options))
    whole, merged = outs
    assert len(whole) == 1 == len(merged) and whole.shape == merged.shape and not torch.equal(whole, merged)
    torch.testing.assert_close(whole[0].reshape(plain[0].shape), plain[0], rtol=1e-4, atol=1e-5)


def _tensors(out):
    """A model's own output -> [B, ...]."""
    out = out[0] if isinstance(out, tuple) else out.sample
    return out if isinstance(out, torch.Tensor) else torch.stack(out)


def test_methods_that_match_are_judged_by_the_step_alone(gpu):
    """Their layers cannot be timed."""
    for gpu.gpu_ms, merged in ((100, False), (400, True)):
        gpu.clear()
        plain, expected = run(models.flux()), run(patched(models.flux(), method="merge", levels="0"))
        model = patched(models.flux(), method="merge")
        assert torch.equal(run(model), expected if merged else plain)
        assert decisions_of(model) == ("+6x10" if merged else "-6x10")


def test_large_layers_always_pay_and_no_step_of_them_is_run(gpu, monkeypatch):
    monkeypatch.setattr(joint, "ALWAYS", 60)
    model = patched(models.flux())
    assert torch.equal(run(model), run(patched(models.flux(), levels="0"))) and not gpu.keys and not gpu.ways
    assert decisions_of(model) == MERGED


@pytest.mark.parametrize("what", ["levels", "training", "forward", "attention", "min_tokens", "switch"])
def test_not_timed(gpu, monkeypatch, what):
    model, options = models.flux(), {}
    block = model.transformer_blocks[0]
    if what in ("levels", "min_tokens"):
        options = {"levels": "0"} if what == "levels" else {"min_tokens": 61}
    elif what == "training":
        model.train()
    elif what == "forward":
        models.put_forward(block.ff)
    elif what == "attention":
        models.put_processor(block.attn)
    else:
        monkeypatch.setattr(step_auto, "may_measure", layer.may_measure)
    gpu.saves_ms, gpu.costs_ms = 5, 1
    plain = run(models.flux())
    assert torch.equal(run(patched(model, **options)), plain) == (what == "min_tokens")
    assert not gpu.steps and not gpu.ways


def test_nobody_else_sees_it(gpu):
    model, ran = models.flux(), []
    for module in (model, model.x_embedder, model.transformer_blocks[0].attn):
        module.register_forward_hook(lambda *_: ran.append(1))
    weights, random = [weight.clone() for weight in model.parameters()], torch.get_rng_state()
    run(patched(model))
    assert len(ran) == 3 and gpu.ways and torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, model.parameters(), weights))
    twin, steps = copy.deepcopy(model), len(gpu.ways)
    assert torch.equal(run(twin), run(model)) and len(gpu.ways) == steps


def test_sizes_ways_and_references_are_judged_by_themselves_and_batches_alike(gpu):
    model = models.flux()
    for options in ({}, {"ratio": 0.25}, {"method": "downsample"}, {"min_tokens": 2}):
        run(patched(model, **options))
    for rows in (slice(0, 1), models.ALL):
        run(patched(model), rows)
    assert len(gpu.steps) == 6 and len(set(gpu.steps)) == 4
    assert "6x10, float32" in gpu.steps[0] and "up to 1024 tokens beside" in gpu.steps[0]


def test_what_keeps_an_attention_whole_is_told_beside_the_step(gpu, caplog):
    """A step in which nothing could be merged is no faster; the reason is another one."""
    mask = torch.zeros(1, 1, 66, 66)
    model = patched(models.flux())
    for _ in range(2):
        assert torch.equal(run(model, mask=mask), run(models.flux(), mask=mask))
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["[ToMe] ToMe skips an attention with a mask"]


def test_a_step_short_of_memory_is_asked_about_again(gpu, monkeypatch, caplog):
    compared, now = step_auto._compared, [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_auto, "_compared", full)
    gpu.saves_ms, gpu.costs_ms, gpu.cpu_ms = 5, 1, 99
    model, plain = patched(models.flux()), run(models.flux())
    merged = run(model)
    assert torch.equal(run(model), merged) and not torch.equal(merged, plain) and len(gpu.steps) == 1
    assert "it is tried again later" in caplog.text
    monkeypatch.setattr(step_auto, "_compared", compared)
    now[0] += store.RETRY
    assert torch.equal(run(model), plain) and len(gpu.steps) == 2 and gpu.ways


def test_nothing_of_a_tried_step_stays(gpu):
    """Copies share the model's weights, which may be as much as the GPU has."""
    model = patched(models.flux())
    assert modules_holding(model.proj_out.weight, lambda: run(model)) == 1 and gpu.ways, "the model's own"
