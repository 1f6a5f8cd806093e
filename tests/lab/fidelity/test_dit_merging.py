"""Merging in the lab's DiT: its joint attention, what is left alone, and the way from training to a row. On the CPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_dit import GRID, SIZE, SMALL, TEXT, normal

from lab.fidelity import hooks, measure
from lab.fidelity.hooks import Run, merged
from lab.fidelity.methods import CATALOGUE, OWN, UNMERGED, Variant
from lab.models import samplers
from lab.models.model import load_model
from lab.models.train import main
from lab.pages import fidelity_tables as plot
from lab.pages import fill
from lab.pages.fidelity_tables import main_sampler, results
from shared_tome import ModelCall, ToMeConfig

MEASURED = CATALOGUE.sets["key"]


def level0(**options) -> ToMeConfig:
    return ToMeConfig(**{"levels": "0", "min_tokens": 0, "own_token": False, **options})


# -- merging ------------------------------------------------------------------------------------------------------


def asked(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v [2, TEXT + 64, 2, 8]."""
    return [normal(2, TEXT + 64, 2, 8, seed=s, dtype=dtype) for s in range(3)]


def hooked(config: ToMeConfig, q, k, v, step: int = 1) -> tuple[torch.Tensor, Run]:
    run = Run(Variant("x", "", config))
    run.begin(GRID, q.device, torch.tensor([3]), step, 2)
    return hooks.MergedJointAttention(run)(q, k, v, TEXT), run


def plan_of(config: ToMeConfig, k: torch.Tensor):
    """That of the core for the image's keys, averaged over the heads."""
    return ModelCall(config, GRID, k.device, torch.tensor([3]), 1).plan(k[:, TEXT:].mean(2), GRID)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "sample", "ratio": 0.75},
        {"method": "sample", "ratio": 0.7},
        {"method": "sample", "ratio": 0.9375},
        {"method": "downsample", "ratio": 0.75},
        {"method": "merge_keys", "ratio": 0.5},
        {"method": "merge", "ratio": 0.5},
        {"method": "merge_queries", "ratio": 0.5},
    ],
    ids=lambda o: f"{o['method']} {o['ratio']}",
)
def test_merged_attention_is_a_softmax_weighted_by_how_many_each_key_stands_for(options, proportional):
    """Written out in float64 from the plan's groups and sizes alone: text counts once and stays."""
    config, (q, k, v) = level0(**options, proportional=proportional), asked()
    found, run = hooked(config, q, k, v)
    plan = plan_of(config, k)
    queries, keys = config.kind.queries, config.kind.keys

    def join(x: torch.Tensor, row: int) -> torch.Tensor:  # [L, H, d] -> [TEXT + M, H, d]
        groups, image = plan.groups[row], x[TEXT:]
        if options["method"] in ("sample", "downsample"):
            image = image[plan.index[row]]
        else:
            image = torch.stack([image[groups == m].mean(0) for m in range(plan.kept)])
        return torch.cat((x[:TEXT], image))

    for row in range(2):
        asking = join(q[row], row) if queries else q[row]
        there, values = (join(x[row], row) if keys else x[row] for x in (k, v))
        count = F.pad(plan.sizes[row].double(), (TEXT, 0), value=1.0)
        bias = count.log() if keys and proportional else torch.zeros(len(there), dtype=torch.float64)
        logits = torch.einsum("qhd,khd->hqk", asking, there) / 8**0.5 + bias
        out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).flatten(1)
        if queries:
            out = torch.cat((out[:TEXT], out[TEXT:][plan.groups[row]]))
        torch.testing.assert_close(found[row], out, atol=1e-5, rtol=1e-5)
    work = (TEXT + (plan.kept if queries else 64)) * (TEXT + (plan.kept if keys else 64))
    assert run.cost == run.cost_all == work / (TEXT + 64) ** 2


@pytest.mark.parametrize("name", [name for name in MEASURED if name != UNMERGED and OWN not in name])
def test_text_is_always_there_and_is_never_merged(monkeypatch, name):
    seen = []
    real = hooks.attend
    monkeypatch.setattr(hooks, "attend", lambda *a: seen.append(a) or real(*a))
    config, (q, k, v) = CATALOGUE.variants[name].config.replace(start=0.0), asked()
    hooked(config, q, k, v)
    for before, after in zip((q, k, v), seen[0], strict=False):
        assert torch.equal(after[:, :, :TEXT], before[:, :TEXT].transpose(1, 2))
    assert seen[0][1].shape[2] < TEXT + 64
    bias = seen[0][3]
    assert (bias is not None) == config.proportional
    if bias is not None:
        assert not bias[:, :TEXT].any() and bias[:, TEXT:].exp().sum(1).tolist() == pytest.approx([64, 64])


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("ratio", [0.75, 0.7, 0.9375])
def test_own_tokens_beside_text(ratio, dtype):
    """Written out in float64: text counts once and has no own token; each image query has its own."""
    config, (q, k, v) = level0(method="sample", ratio=ratio, own_token=True), asked()
    run = Run(Variant("x", "", config), dtype)
    run.begin(GRID, q.device, torch.tensor([3]), 1, 2)
    found, plan = hooks.MergedJointAttention(run)(q, k, v, TEXT), plan_of(config, k)
    every = torch.arange(64) + TEXT
    for row in range(2):
        outs = []
        for head in range(2):  # each draws for itself
            (index,) = plan.head_draws[head]
            stands = index[plan.groups[row]] + TEXT
            weight = torch.zeros(TEXT + 64, TEXT + 64, dtype=torch.float64)
            weight[:, :TEXT] = 1.0
            weight.index_add_(1, stands, torch.ones(TEXT + 64, 64, dtype=torch.float64))
            weight[every, every] += 1.0
            weight[every, stands] -= 1.0
            logits = q[row, :, head] @ k[row, :, head].T / 8**0.5 + weight.log()
            outs.append(logits.softmax(-1) @ v[row, :, head])
        torch.testing.assert_close(found[row], torch.cat(outs, 1), atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float64
    assert run.cost == run.cost_all == (TEXT + plan.kept + 1) / (TEXT + 64)


@pytest.mark.parametrize("method", ["sample", "merge", "downsample", "merge_keys"])
def test_ratio_0_gives_the_same_picture(dit_bench, method):
    reference, _ = dit_bench.pictures(CATALOGUE.variants[UNMERGED], "flow2")
    plain = dit_bench.model.network
    pictures, run = dit_bench.pictures(Variant("off", "", level0(ratio=0.0, method=method)), "flow2")
    assert torch.equal(pictures, reference) and run.cost == 1.0
    x, times, context = normal(4, 3, SIZE, SIZE), torch.full((4,), 300.0), dit_bench.context(torch.tensor([0, 1]))
    expected = plain(x, times, context)
    with merged(plain, Variant("off", "", level0(ratio=0.0, method=method))) as run:
        run.begin(GRID, x.device, torch.zeros(1, dtype=torch.int64), 0, 2)
        assert torch.equal(plain(x, times, context), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_leave_the_model_as_it_was(dit_bench, fails):
    network = dit_bench.network
    x, times, context = normal(2, 3, SIZE, SIZE), torch.full((2,), 500.0), dit_bench.context(torch.tensor([0]))
    modules, before = list(network.named_modules()), network(x, times, context)
    try:
        with merged(network, Variant("x", "", level0(ratio=0.75, method="sample"))) as run:
            run.begin(GRID, x.device, torch.zeros(1, dtype=torch.int64), 0, 2)
            assert not torch.equal(network(x, times, context), before)
            every = SMALL.double + SMALL.single  # every block's attention
            assert run.work["all"] == every * (TEXT + 64) ** 2
            if fails:
                raise RuntimeError("on purpose")
    except RuntimeError:
        assert fails
    assert list(network.named_modules()) == modules and torch.equal(network(x, times, context), before)


@pytest.mark.parametrize("name", ["self and cross", "self and MLP", "levels 0,1"])
def test_what_means_nothing_on_a_dit_is_refused_before_anything_is_measured(dit_file, flow2, tmp_path, name):
    plan, out = tmp_path / "plan.txt", tmp_path / "a.csv"
    plan.write_text(f"unmerged\n{name}\n")
    with pytest.raises(ValueError, match=f"'{name}' cannot be measured on a DiT"):
        measure.main(arguments(dit_file, out, "--plan", str(plan)))
    assert not out.exists()


# -- from training to a row ---------------------------------------------------------------------------------------


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    fixed = "--samplers flow2 --images 2 --seeds 1 --device cpu --time-size 16 --time-rows 2 --time-repeats 1"
    return ["--model", str(model), "--out", str(out), *fixed.split(), "--commit", "abc", *more]


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def two_steps():
    """As flow2, for fixtures of the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(samplers.SAMPLERS, "flow2", samplers.Sampler(samplers.ddim, 2, "Euler, 2 steps"))
        yield


@pytest.fixture(scope="module")
def rows(dit_file, two_steps, tmp_path_factory) -> dict[str, dict[str, str]]:
    out = tmp_path_factory.mktemp("rows") / "dit.csv"
    measure.main(arguments(dit_file, out, "--plan", "key,few"))
    return rows_of(out)


def test_every_row_of_the_sets_comes_out(rows):
    assert list(rows) == MEASURED
    for name, row in rows.items():
        assert row["step_shape"] == "2x3x16x16" and float(row["step_ms"]) > 0
        assert name == UNMERGED or 0 < float(row["psnr"]) < 200, name


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [
        ("sample 0.75", 64, 16),
        ("sample 0.9375", 64, 4),
        ("downsample 4x4", 64, 4),
        ("tomesd 0.5", 32, 32),
        ("merge_keys pick 0.75", 64, 16),
        ("sample 0.75, own token kept", 64, 17),
    ],
)
def test_cost_counts_the_text(rows, name, queries, keys):
    expected = (TEXT + queries) * (TEXT + keys) / (TEXT + 64) ** 2
    assert float(rows[name]["cost"]) == float(rows[name]["cost_all"]) == pytest.approx(expected, abs=1e-5)
    late = rows["sample 0.75 from 0.2"]  # the first of the two steps is whole
    assert float(late["cost"]) == pytest.approx((1 + (TEXT + 16) / (TEXT + 64)) / 2, abs=1e-5)


def test_tables_and_plots_take_the_sampler_that_was_measured(rows):
    own = [dict(row, file="fresh", singles="40 41", model="m", yardstick="") for row in rows.values()]
    ddim = [dict(row, sampler="ddim30") for row in own]
    assert main_sampler(own) == "flow2" and main_sampler(own + ddim) == "ddim30"
    page = "".join(f"<!-- {name} fresh -->\n<!-- end -->\n" for name in ("frontier", "pairs", "about"))
    written = fill.filled(page, fill.of_fidelity([*results(), *own]))
    for name in MEASURED:
        assert f"| {name} |" in written, name
    assert "| sample 0.9375 from 0.2 | sample 0.75 |" in written and "model m" in written
    families = {row["family"] for row in own} - {"unmerged"}
    assert families <= set(plot.STYLES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(out)
    return out


def train(out: Path, *more: str) -> None:
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    fixed = "--config tiny-dit --device cpu --steps 2 --log-every 1 --workers 0 --columns 1 --sample-steps 2"
    main(["--out", str(out), *fixed.split(), *more])


def test_training_gives_one_model_for_one_seed(trained, tmp_path):
    train(tmp_path)
    one, two = (load_model(folder / "model.safetensors")[0].state_dict() for folder in (trained, tmp_path))
    assert all(one[key].equal(two[key]) for key in one)
    assert one["network.out.weight"].any() and one["network.double_blocks.0.image.modulation.linear.weight"].any()


def test_training_goes_on_from_a_checkpoint(trained, tmp_path):
    train(tmp_path, "--resume", str(trained / "model.safetensors"))
    model, _, metadata = load_model(tmp_path / "model.safetensors")
    before = load_model(trained / "model.safetensors")[0]
    assert json.loads(metadata["training"])["resumed"] is True
    assert not torch.equal(model.network.out.weight, before.network.out.weight)


def test_a_trained_model_is_measured_and_one_seed_gives_one_row(trained, two_steps, tmp_path):
    found = []
    for folder in ("one", "two"):
        out = tmp_path / folder / "dit.csv"
        measure.main(arguments(trained / "model.safetensors", out, "--plan", "few", "--precision", "mixed"))
        rows = rows_of(out)
        assert list(rows) == CATALOGUE.sets["few"]
        found.append([(row["psnr"], row["ssim"], row["cost"]) for row in rows.values()])
    assert found[0] == found[1]
