"""The lab's measuring: rows, resuming, cost, hooks that leave no trace. A tiny U-Net on the CPU."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from PIL import Image
from safetensors.torch import save_file

from lab.fidelity import measure
from lab.fidelity.bench import Bench
from lab.fidelity.hooks import Run, merged
from lab.fidelity.methods import CATALOGUE, Variant
from lab.models import classifier, samplers
from lab.models.model import NETWORK_PREFIX, SIGMAS_KEY, TOKENS_KEY, load_model
from lab.models.unet import UNet, UNetConfig
from lab.pages.fidelity_tables import LATER, read
from shared_tome import ModelCall, ToMeConfig
from shared_tome.attention.sequence import JointCall

SIZE = 16
UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    head_channels=16,
    context_dim=8,
)
BLOCKS = (3, 4)  # at level 0 (256 tokens) and at level 1 (64), the middle one included
COLUMNS = (
    "variant,family,sampler,psnr,psnr_se,ssim,ssim_se,gain,gain_se,cost,cost_all,fd,fd_gap,fd_gap_se,texture,texture_se,step_ms,step_p20,"
    "step_p80,speedup,step_shape,method,ratio,options,images,seeds,precision,device,torch,date,commit,model"
)


def level0(**options) -> ToMeConfig:
    return ToMeConfig(**{"levels": "0", "min_tokens": 0, "own_token": False, **options})


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A U-Net whose every weight counts: the trainable one starts with zeros."""
    generator = torch.Generator().manual_seed(0)
    state = {
        NETWORK_PREFIX + name: torch.randn(x.shape, generator=generator) * (0.7 / max(1, x[0].numel()) ** 0.5)
        for name, x in UNet(UNET).state_dict().items()
    }
    state[TOKENS_KEY] = torch.randn((3, 4, 8), generator=generator)  # two classes and "any"
    state[SIGMAS_KEY] = samplers.cosine_sigmas()
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_file(state, path, metadata={"unet": json.dumps(asdict(UNET)), "size": str(SIZE), "classes": '["a", "b"]'})
    return path


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory) -> Path:
    judge = classifier.Classifier()
    real = torch.randn((40, classifier.FEATURES), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    classifier.save(classifier.Judge(judge.eval(), real, 1.0), path)
    return path


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "ddim2", samplers.Sampler(samplers.ddim, 2, "DDIM, 2 steps"))


@pytest.fixture
def bench(model_file) -> Bench:
    return Bench(model_file, "cpu", images=2, seeds=1, batch=2)


def arguments(model_file: Path, out: Path, *more: str) -> list[str]:
    fixed = (
        "--samplers ddim2 --images 2 --seeds 1 --device cpu --time-size 16 --time-rows 2 --time-repeats 1 --commit abc"
    )
    return ["--model", str(model_file), "--out", str(out), *fixed.split(), *more]


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def frontier(model_file, judge_file, tmp_path_factory) -> dict[str, dict[str, str]]:
    """The rows of a whole run, once for all tests that read them."""
    samplers.SAMPLERS["ddim2"] = samplers.Sampler(samplers.ddim, 2, "DDIM, 2 steps")
    out = tmp_path_factory.mktemp("frontier") / "a.csv"
    strips = ("--strips", str(out.parent / "strips"))
    measure.main(arguments(model_file, out, "--plan", "frontier", "--classifier", str(judge_file), *strips))
    assert out.read_text().splitlines()[0] == COLUMNS
    return rows_of(out)


def test_strips_are_side_by_side(frontier, tmp_path_factory):
    folder = next(tmp_path_factory.getbasetemp().glob("frontier*")) / "strips"
    assert len(list(folder.iterdir())) == len(frontier)
    with Image.open(folder / "ddim2 sample 0.75.png") as strip:
        assert strip.size == (2 * SIZE, SIZE)


def test_every_row_of_the_set_comes_out(frontier):
    assert list(frontier) == CATALOGUE.sets["frontier"]
    for name, row in frontier.items():
        assert row["commit"] == "abc" and row["images"] == "2" and row["device"].startswith("CPU")
        assert float(row["step_p20"]) <= float(row["step_ms"]) <= float(row["step_p80"]), name
        assert float(row["fd"]) > 0
        if row["cost"] != "1.00000":
            assert 0 < float(row["psnr"]) < 200, name
        else:  # of two steps none is after 60%
            assert name == "unmerged" or name.endswith("from 0.6")


def test_unmerged_is_the_reference_itself(frontier):
    row = frontier["unmerged"]
    assert (row["psnr"], row["ssim"], row["cost"], row["gain"]) == ("inf", "1.00000", "1.00000", "")
    assert row["texture"] == row["texture_se"] == "0.000"
    assert float(row["fd_gap"]) == 0.0 and float(row["speedup"]) == 1.0


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("tomesd 0.5", 0.25),
        ("tomesd 0.25", 0.5625),
        ("merge_queries 0.5", 0.5),
        ("merge_keys pick 0.75", 0.25),
        ("sample 0.75", 0.25),
        ("sample 0.984375", 1 / 64),
        ("downsample 4x4", 1 / 16),
        ("sample 0.75 from 0.4", (1 + 0.25) / 2),  # the first of two steps is before the start
        ("prune 0.5", 0.25),
    ],
)
def test_cost_is_the_work_that_is_left(frontier, name, cost):
    row = frontier[name]
    assert float(row["cost"]) == pytest.approx(cost, abs=1e-5)
    full = BLOCKS[0] * 256**2
    rest = BLOCKS[1] * 64**2
    assert float(row["cost_all"]) == pytest.approx((full * cost + rest) / (full + rest), abs=1e-5)


def test_gain_is_paired_with_the_baseline(frontier):
    base, row = frontier["tomesd 0.5"], frontier["sample 0.5"]
    assert float(row["gain"]) == pytest.approx(float(row["psnr"]) - float(base["psnr"]), abs=2e-3)
    assert float(base["gain"]) == 0.0 and float(base["gain_se"]) == 0.0


@pytest.mark.parametrize("name", ["starts", "paper", "own"])
def test_no_variant_of_the_other_sets_fails(bench, name):
    reference, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    for variant in CATALOGUE.sets[name]:
        if variant == "unmerged":
            continue
        pictures, run = bench.pictures(CATALOGUE.variants[variant], "ddim2")
        assert torch.isfinite(pictures).all(), variant
        assert not torch.equal(pictures, reference) and run.cost < 1, variant


def test_a_stopped_run_is_taken_up_again(model_file, tmp_path, monkeypatch):
    out, plan = tmp_path / "a.csv", tmp_path / "plan.txt"
    plan.write_text("unmerged\ntomesd 0.5\n# a remark\nsample 0.75: ddim2\n")
    args = arguments(model_file, out, "--plan", str(plan), "--time-repeats", "0")
    measure.main([*args, "--minutes", "0"])
    assert not out.exists()

    real, done = measure.Measurement.measure, []

    def stopping(self, variant, sampler):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(variant.name)
        return real(self, variant, sampler)

    monkeypatch.setattr(measure.Measurement, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure.main(args)
    before = out.read_text()
    assert list(rows_of(out)) == ["unmerged", "tomesd 0.5"]

    done.clear()
    measure.main(args)
    assert done == ["sample 0.75"]
    assert out.read_text().startswith(before) and rows_of(out)["sample 0.75"]["gain"] != ""
    done.clear()
    measure.main(args)
    assert done == []
    singles = list(csv.reader(out.with_suffix(".pictures.csv").open()))
    assert [row[0] for row in singles[1:]] == ["unmerged", "tomesd 0.5", "sample 0.75"] and len(singles[1]) == 2 + 2


def test_rows_that_cannot_be_compared_are_not_mixed(model_file, tmp_path):
    out = tmp_path / "a.csv"
    plan = tmp_path / "plan.txt"
    plan.write_text("unmerged\n")
    args = arguments(model_file, out, "--plan", str(plan), "--time-repeats", "0")
    measure.main(args)
    with pytest.raises(ValueError, match="images 2, this is 4"):
        measure.main([*args, "--images", "4"])


def test_a_file_of_older_columns_is_read_but_not_added_to(model_file, tmp_path):
    out, plan = tmp_path / "a.csv", tmp_path / "plan.txt"
    plan.write_text("unmerged\n")
    args = arguments(model_file, out, "--plan", str(plan), "--time-repeats", "0")
    measure.main(args)
    with out.open(newline="") as file:
        old = [[cell for name, cell in row.items() if name not in LATER] for row in csv.DictReader(file)]
    header = [name for name in measure.COLUMNS if name not in LATER]
    out.write_text("".join(",".join(line) + "\n" for line in [header, *old]))
    before = out.read_text()
    with pytest.raises(ValueError, match="lacking: texture, texture_se; unknown: none.*another --out.*tables"):
        measure.main(args)
    assert out.read_text() == before
    assert [(row["texture"], row["texture_se"], row["psnr"]) for row in read(out)] == [("", "", "inf")]


def test_a_plan_names_its_mistake():
    with pytest.raises(ValueError, match="'frontiers'.*frontier"):
        measure.parse_plan("frontiers", ["ddim30"])
    with pytest.raises(ValueError, match="'ddim31'"):
        measure.parse_plan("frontier:ddim31", ["ddim30"])
    keys = measure.parse_plan("main:ddim30+lcm6,frontier", ["ddim30"])
    assert len(keys) == len(set(keys)) and keys[0] == ("unmerged", "ddim30")


@pytest.mark.parametrize("method", ["sample", "merge", "downsample"])
def test_ratio_0_gives_the_same_picture(bench, method):
    reference, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    pictures, run = bench.pictures(Variant("off", "", level0(ratio=0.0, method=method)), "ddim2")
    assert torch.equal(pictures, reference) and run.cost == 1.0


def test_unmerged_is_the_trainers_own_sampler(bench, model_file):
    model, sigmas, _ = load_model(model_file)
    noise = torch.randn((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1000))
    context = model.context(torch.tensor([0, 1]))
    expected = samplers.sample(model.network, noise, context, model.class_tokens[-1:], sigmas, steps=2, guidance=3.0)
    pictures, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    torch.testing.assert_close(pictures, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_leave_the_model_as_it_was(bench, fails):
    unet = bench.network
    x = torch.randn((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(3))
    times, context = torch.full((2,), 500.0), bench.context(torch.tensor([0]))
    modules, state = list(unet.named_modules()), {k: v.clone() for k, v in unet.state_dict().items()}
    before = unet(x, times, context)
    try:
        with merged(unet, Variant("x", "", level0(ratio=0.5, method="merge", mlp=True, cross_attention=True))) as run:
            run.begin((SIZE, SIZE), x.device, torch.zeros(1, dtype=torch.int64), 0, 2)
            assert not torch.equal(unet(x, times, context), before)
            if fails:
                raise RuntimeError("on purpose")
    except RuntimeError:
        assert fails
    assert list(unet.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    assert torch.equal(unet(x, times, context), before)


def test_one_picture_does_not_depend_on_its_batch(model_file):
    variant = CATALOGUE.variants["sample 0.75"]
    whole, _ = Bench(model_file, "cpu", images=2, seeds=2, batch=2).pictures(variant, "ddim2")
    single, _ = Bench(model_file, "cpu", images=2, seeds=2, batch=1).pictures(variant, "ddim2")
    torch.testing.assert_close(whole, single, atol=1e-3, rtol=1e-3)


def test_every_picture_has_noise_and_draws_of_its_own(model_file, monkeypatch):
    bench = Bench(model_file, "cpu", images=3, seeds=2, batch=2)
    unmerged, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    assert len({picture.sum().item() for picture in unmerged}) == 6
    seen: dict[str, list[tuple]] = {}
    begin = Run.begin

    def listening(self, full, device, seed, step, steps):
        seen.setdefault(self.variant.name, []).append(tuple(seed.tolist()))
        begin(self, full, device, seed, step, steps)

    monkeypatch.setattr(Run, "begin", listening)
    bench.pictures(CATALOGUE.variants["tomesd 0.5"], "ddim2")
    calls = seen["tomesd 0.5"]
    assert len(calls) == 2 * 4  # two steps of four batches
    assert calls[::2] == calls[1::2]  # the same in each step
    assert len({seed for call in calls for seed in call}) == 6


def test_rounding_alone_is_told(model_file):
    mixed = Bench(model_file, "cpu", images=2, seeds=1, batch=2, precision="mixed")
    exact = Bench(model_file, "cpu", images=2, seeds=1, batch=2)
    rounded, _ = mixed.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    strict, _ = mixed.pictures(CATALOGUE.variants["unmerged, float32"], "ddim2")
    reference, _ = exact.pictures(CATALOGUE.variants["unmerged"], "ddim2")
    assert torch.equal(strict, reference) and not torch.equal(rounded, reference)
    torch.testing.assert_close(rounded, reference, atol=1e-2, rtol=1e-2)


WRITTEN_OUT = [
    {"method": "sample", "ratio": 0.7},
    {"method": "merge", "ratio": 0.5},
    {"method": "sample", "ratio": 0.7, "own_token": True},
    {"method": "sample", "ratio": 0.75, "own_token": True},
]


def keeping_self(x, index, groups, sizes, q, attn, at):
    """One head's output [N, d] where each query has its own token, which its run's then no longer stands for."""
    weight = torch.zeros(256, 256).index_add(1, index, sizes[None].expand(256, -1))
    every = torch.arange(256)
    weight[every, every] += 1.0
    weight[every, index[groups]] -= 1.0
    k, v = (x @ layer.weight[at].T for layer in (attn.to_k, attn.to_v))
    return (q @ k.T / 4 + weight.log()).softmax(-1) @ v


@pytest.mark.parametrize("options", WRITTEN_OUT)
def test_a_hooked_layer_is_attention_among_the_merged_tokens(bench, options):
    """Written out from the plan's groups and sizes alone."""
    config, seed = level0(**options), torch.tensor([3])
    attn = bench.network.input_blocks[1][1].transformer_blocks[0].attn1
    x = torch.randn((2, 256, 32), generator=torch.Generator().manual_seed(0))
    plan = ModelCall(config, (SIZE, SIZE), x.device, seed, 1).plan(x, (SIZE, SIZE))
    with merged(bench.network, Variant("x", "", config)) as run:
        run.begin((SIZE, SIZE), x.device, seed, 1, 2)
        found = bench.network.input_blocks[1][1].transformer_blocks[0].attn1(x)
    for row in range(2):
        groups, index, sizes = plan.groups[row], plan.index[row], plan.sizes[row]
        tokens = x[row][index]  # (M, C)
        if options["method"] == "merge":
            tokens = torch.stack([x[row][groups == m].mean(0) for m in range(len(index))])
        queries = x[row] if options["method"] == "sample" else tokens
        heads = []
        for head in range(attn.heads):
            at = slice(16 * head, 16 * head + 16)
            q, k, v = (
                part @ layer.weight[at].T
                for part, layer in ((queries, attn.to_q), (tokens, attn.to_k), (tokens, attn.to_v))
            )
            if config.own_token:
                drawn = plan.head_draws[head % len(plan.head_draws), 0]  # each head draws for itself
                heads.append(keeping_self(x[row], drawn, groups, sizes, q, attn, at))
                continue
            heads.append((q @ k.T / 4 + sizes.log()).softmax(-1) @ v)
        expected = torch.cat(heads, dim=-1) @ attn.to_out[0].weight.T + attn.to_out[0].bias
        if options["method"] == "merge":
            expected = expected[groups]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_own_tokens_go_through_the_core_or_not_at_all(bench, monkeypatch):
    """What no kernel joins is not measured under that name."""
    variant = CATALOGUE.variants["sample 0.75, own token kept"]
    asked = []
    attend = JointCall.attend
    monkeypatch.setattr(JointCall, "attend", lambda self, *a: asked.append(self.keeps_self) or attend(self, *a))
    _, run = bench.pictures(variant, "ddim2")
    assert asked == [True] * 2 * BLOCKS[0]
    _, drawn = bench.pictures(CATALOGUE.variants["sample 0.75"], "ddim2")
    assert len(asked) == 2 * BLOCKS[0]
    assert run.cost == pytest.approx(drawn.cost + 1 / 256)  # its own key is one more
    monkeypatch.setattr("shared_tome.attention.sequence.choose_kernel", lambda *_: None)
    with pytest.raises(RuntimeError, match="no own tokens"):
        bench.pictures(variant, "ddim2")
