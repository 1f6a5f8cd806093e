"""The U-Net benchmark in its short form, and that its variants are what they say."""

from __future__ import annotations

import sys

import pytest
import torch

from lab.speed import step
from lab.speed import step as unets

pytest.importorskip("diffusers", reason="the U-Nets are diffusers'")
COLUMNS = {
    "model", "pixels", "levels", "batch", "dtype", "mode", "backend", "variant", "step_ms", "step_p20", "step_p80",
    "speedup", "speedup_p20", "speedup_p80", "rounds", "remark", "device", "machine", "driver", "torch", "date",
    "commit", "versions",
}  # fmt: skip


def test_the_short_form_and_a_second_run_into_the_same_file(run, tmp_path, monkeypatch):
    out = tmp_path / "step.csv"
    fast = ("--seconds", 0, "--least", 1, "--out", out)
    rows = run(step, *fast, "--variants", "unmerged", "sample 0.75")
    assert [row["variant"] for row in rows] == ["unmerged", "sample 0.75"] and set(rows[0]) == COLUMNS
    kept = out.read_text().splitlines()
    monkeypatch.setitem(sys.modules, "tomesd", None)  # as on a machine without it
    rows = run(step, *fast)
    assert out.read_text().splitlines()[:3] == kept
    assert [row["variant"] for row in rows] == ["unmerged", "sample 0.75"] + [
        name for name in unets.VARIANTS if name not in ("unmerged", "sample 0.75")
    ]
    for row in rows:
        absent = row["variant"] == unets.TOMESD
        assert (row["step_ms"] == "") is absent and row["remark"] == ("not installed: tomesd" if absent else "")
    assert run(step, *fast) == [{key: str(value) for key, value in row.items()} for row in rows]  # nothing anew


def test_levels_are_those_with_enough_tokens():
    found = {(name, pixels): unets.levels_of(name, pixels) for name in ("sd15", "sdxl") for pixels in (512, 1024, 2048)}
    assert found == {
        ("sd15", 512): (0,), ("sd15", 1024): (0, 1), ("sd15", 2048): (0, 1, 2),
        ("sdxl", 512): (), ("sdxl", 1024): (1,), ("sdxl", 2048): (1, 2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return unets.build("tiny", "cpu", torch.float32)


@pytest.fixture
def made(model):
    inputs = unets.Inputs("tiny", 128, "cpu", torch.float32)
    return lambda variant: unets.Step(model, "tiny", variant, inputs, (0,))


TRIED = 5  # keys with which an attention is tried out, anew where torch's function is another


def keys_seen(step, monkeypatch):
    """(queries, keys) of each attention but those to the prompt."""
    seen, kept = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append((q.shape[2], k.shape[2]))
        return kept(q, k, v, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        step()
    return {pair for pair in seen if pair[1] not in (77, TRIED)}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("unmerged", {(256, 256)}),
        ("sample 0.75", {(256, 64)}),
        ("sample 0.9375", {(256, 16)}),
        ("merge 0.5", {(128, 128)}),
        ("merge_queries 0.5", {(128, 256)}),
        ("downsample 0.75", {(256, 64)}),
        ("half at no cost", {(128, 128)}),
        ("limit", set()),
        ("tomesd 0.5", {(128, 128)}),
    ],
)
def test_a_variant_attends_to_what_it_says(variant, expected, made, monkeypatch):
    if variant == "tomesd 0.5":
        pytest.importorskip("tomesd")
    step = made(variant)
    step()  # the first call tries out how the layer scales
    assert keys_seen(step, monkeypatch) == {*expected, (64, 64)}  # below min_tokens: left alone


def test_variants_share_parameters_and_leave_the_model_alone(model, made):
    before = made("unmerged")()
    steps = [made(variant) for variant in ("sample 0.75", "merge 0.5", "limit")]
    for each in steps:
        assert all(a is b for a, b in zip(model.parameters(), each.unet.parameters(), strict=True))
        assert not torch.equal(each(), before)
    assert torch.equal(made("unmerged")(), before)


def test_the_step_is_told_by_the_timestep_tensor(made):
    """As a replayed graph needs it: no number that Python read once."""
    step = made("sample 0.75")
    told = step.unet._shared_tome.steps.step
    assert int(told(step.inputs.timestep, torch.device("cpu"))) == unets.STEPS // 2
    step.inputs.timestep.copy_(step.inputs.timesteps[1])
    number = told(step.inputs.timestep, torch.device("cpu"))
    assert isinstance(number, torch.Tensor) and number.shape == () and int(number) == 1


def test_a_graph_that_keeps_the_captured_step_is_told_of(made):
    """Stands in for a CUDA graph: something that writes into the captured call's output."""
    eager, twin = made("sample 0.75"), made("sample 0.75")
    captured = eager()
    stale = captured.clone()
    before = eager.inputs.timestep.clone()
    assert step.differs(eager, lambda: captured.copy_(stale), eager.inputs).startswith("replayed at another step: off")
    eager.out = captured
    assert step.differs(eager, lambda: captured.copy_(twin()), eager.inputs) == ""
    assert torch.equal(eager.inputs.timestep, before)
