"""Latents, epsilon, other pictures: the second kind of model, from its training to a row. Tiny, on the CPU."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.fidelity import measure
from lab.fidelity.bench import Bench
from lab.fidelity.hooks import Run
from lab.fidelity.methods import CATALOGUE
from lab.fidelity.metrics import psnr, to_range
from lab.models import autoencoder, classifier, data, optimize, samplers
from lab.models.data_fine import FINE
from lab.models.data_moving import SETS
from lab.models.model import ClassModel, load_model, save_model
from lab.models.optimize import as_pictures
from lab.models.train import CONFIGS, main
from lab.models.unet import UNetConfig

pytest.importorskip("skimage", reason="the photographs come with scikit-image")

TINY = data.PictureSet("tiny", 32, {name: FINE.painters[name] for name in ("cloth", "gratings")})
UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=(1, 1),
    transformer_depth=(1, 1),
    head_channels=16,
    context_dim=8,
)
# Of what the code gave before it knew more than one set and one kind of model.
SUMS = [1659252, 280673]
MOMENTS = [0.5681162, 0.4832540, 0.9912978]


def crops(pictures: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pictures[..., :32, :32, :])


def paint_small(name: str):
    return lambda rng: crops(FINE.painters[name](rng))


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """A set of 32x32 pixels, and samplers of few steps."""
    painters = {name: paint_small(name) for name in TINY.painters}
    monkeypatch.setitem(SETS, "tiny", data.PictureSet("tiny", 32, painters))
    for name, update in (("ddim5", samplers.ddim), ("euler_a5", samplers.euler_a), ("dpmpp2m5", samplers.dpmpp2m)):
        monkeypatch.setitem(samplers.SAMPLERS, name, samplers.Sampler(update, 5, name))
    monkeypatch.setitem(samplers.SAMPLERS, "inpaint5", samplers.Sampler(samplers.ddim, 5, "inpaint5", inpaint=True))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """Every weight of the U-Net counts: the trainable one starts with zeros."""
    generator = torch.Generator().manual_seed(0)
    model = ClassModel(UNET, 2, 4, "epsilon", autoencoder.AutoencoderConfig(width=16, depth=1))
    for parameter in model.parameters():
        scale = 0.7 / max(1, parameter[0].numel()) ** 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    path = tmp_path_factory.mktemp("latent") / "model.safetensors"
    save_model(path, model, samplers.scaled_linear_sigmas(), {}, TINY)
    return path


@pytest.fixture
def bench(model_file) -> Bench:
    return Bench(model_file, "cpu", images=4, seeds=1, batch=4)


# -- pictures -----------------------------------------------------------------------------------------------------


def test_fine_pictures_depend_on_the_seed_alone() -> None:
    bank = data.make_bank(2, seed=5, workers=0, pictures=FINE)
    assert bank.shape == (len(FINE.classes), 2, 192, 192, 3) and bank.dtype == np.uint8
    assert np.array_equal(bank[:, :1], data.make_bank(1, seed=5, workers=2, pictures=FINE))
    assert not np.array_equal(bank, data.make_bank(2, seed=6, workers=0, pictures=FINE))
    for one, other in bank.astype(np.float32):
        assert min(one.std(), other.std()) > 8 and np.abs(one - other).mean() > 3


def test_fine_pictures_have_detail_that_the_demo_lacks() -> None:
    """A pixel differs from its neighbour by more."""

    def steps(bank: np.ndarray) -> float:
        return np.abs(np.diff(bank.astype(np.float32), axis=3)).mean().item()

    fine = data.make_bank(1, workers=0, pictures=FINE)
    demo = Image.fromarray(data.make_bank(1, workers=0).reshape(-1, 64, 3)).resize((192, 12 * 192))
    assert steps(fine) > 2 * steps(np.asarray(demo)[None, None])


def test_the_demos_pictures_are_what_they_were() -> None:
    """Formulas alone, so that no version of Pillow or of the photographs counts."""
    drawn = [data.DEMO.painters[name](np.random.default_rng([1, 2])) for name in ("spheres", "planet")]
    assert [picture.astype(np.int64).sum().item() for picture in drawn] == SUMS


# -- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
def test_a_prediction_gives_back_the_picture(prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(8, 4, 6, 6, generator=generator) for _ in range(2))
    sigmas = samplers.scaled_linear_sigmas()[torch.randint(1000, (8,), generator=generator)]
    x, target = optimize.noisy(x0, noise, sigmas, prediction)
    signal, share = (f[:, None, None, None] for f in samplers.signal_and_noise(sigmas, prediction))
    torch.testing.assert_close(samplers.clean(prediction, x, target, signal, share), x0, atol=1e-4, rtol=0)


def test_scaled_linear_sigmas_are_stable_diffusions() -> None:
    sigmas = samplers.scaled_linear_sigmas()
    assert sigmas.shape == (1000,) and (sigmas.diff() > 0).all()
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4) and sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)


def test_weights_of_epsilon_are_those_of_v_times_the_signal() -> None:
    sigmas = torch.tensor([0.03, 0.5, 1.0, 14.0])
    by_v, by_epsilon = (optimize.loss_weights(sigmas, prediction) for prediction in ("v", "epsilon"))
    signal, _ = samplers.signal_and_noise(sigmas)
    torch.testing.assert_close((by_epsilon * signal**2)[:3], by_v[:3])
    assert by_epsilon[3] == 10


@pytest.mark.parametrize("sampler", ["ddim5", "euler_a5", "dpmpp2m5", "lcm6"])
def test_epsilon_and_v_of_one_denoiser_are_sampled_alike(bench, sampler: str) -> None:
    """The same network told as v: of its epsilon e, v = (e - share * x) / signal."""
    by_epsilon, _ = bench.pictures(CATALOGUE.variants["sample 0.75"], sampler)
    table, network = bench.table, bench.network.forward

    def as_v(x, times, context):
        signal, share = (f[:, None, None, None] for f in samplers.signal_and_noise(table[times.long()]))
        return (network(x, times, context) - share * x) / signal

    bench.network.forward, bench.model.prediction = as_v, "v"
    by_v, _ = bench.pictures(CATALOGUE.variants["sample 0.75"], sampler)
    assert psnr(to_range(by_epsilon), to_range(by_v)).min() > 60
    bench.model.prediction = "epsilon"  # the wrong one is another picture
    wrong, _ = bench.pictures(CATALOGUE.variants["sample 0.75"], sampler)
    assert psnr(to_range(by_epsilon), to_range(wrong)).max() < 50


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="v, epsilon, flow, got 'x0'"):
        ClassModel(UNET, 2, 4, "x0")


# -- autoencoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank() -> torch.Tensor:
    """Pixels [30, 32, 32, 3]."""
    return torch.from_numpy(crops(data.make_bank(3, workers=0, pictures=FINE))).flatten(0, 1)


def fresh_autoencoder() -> autoencoder.Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return autoencoder.Autoencoder(autoencoder.AutoencoderConfig(width=16, depth=1))


def test_latents_are_normal_and_come_back(bank) -> None:
    """A few steps give the gist."""
    one = fresh_autoencoder()
    before = autoencoder.round_trip(one.eval(), as_pictures(bank))
    autoencoder.train(one, bank, seed=0, seconds=0, steps=120, batch=8, rate=3e-3)
    latents = one.encode(as_pictures(bank))
    assert latents.shape == (len(bank), 4, 8, 8)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    after = autoencoder.round_trip(one, as_pictures(bank))
    assert after > 15 and after > before + 4


def test_one_seed_gives_one_autoencoder(bank) -> None:
    found = []
    for seed in (0, 0, 1):
        one = fresh_autoencoder()
        autoencoder.train(one, bank, seed=seed, seconds=0, steps=2, batch=4)
        found.append(one.decode(one.encode(as_pictures(bank[:2]))))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# -- training and the file ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lab")
    fixed = "--config tiny-lab --device cpu --steps 1 --per-class 1 --log-every 1 --workers 0 --columns 1"
    main(["--out", str(out), *fixed.split(), "--sample-steps", "1"])
    return out


def test_training_writes_all_that_is_needed(trained: Path) -> None:
    model, sigmas, metadata = load_model(trained / "model.safetensors")
    assert torch.equal(sigmas, samplers.scaled_linear_sigmas())
    assert (model.prediction, metadata["data"], metadata["size"]) == ("epsilon", "fine", "192")
    assert json.loads(metadata["latent"]) == [4, 48, 48] == list(model.painted_shape(192))
    assert json.loads(metadata["classes"]) == list(FINE.classes)
    assert model.decode(torch.randn(3, 4, 12, 12), chunk=2).shape == (3, 3, 48, 48)
    assert json.loads(metadata["training"])["steps"] == 1
    with Image.open(trained / "samples.png") as picture:
        assert picture.size == (194, 194 * len(FINE.classes))


def test_a_file_keeps_the_autoencoder(model_file: Path) -> None:
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    one, two = (load_model(model_file)[0] for _ in range(2))
    latents = one.encode(pictures)
    assert latents.shape == (2, 4, 8, 8) and torch.equal(latents, two.encode(pictures))
    assert torch.equal(one.decode(latents), two.decode(latents))
    assert not any(p.requires_grad for p in one.autoencoder.parameters())


def test_the_labs_model_is_of_the_promised_kind() -> None:
    config = CONFIGS["lab"]
    model = ClassModel(config.network, 10, config.tokens, config.prediction, config.autoencoder)
    count = sum(p.numel() for p in model.network.parameters())
    assert 25e6 < count < 35e6
    assert 1e6 < sum(p.numel() for p in model.autoencoder.parameters()) < 3e6
    assert config.network.transformer_depth[:2] == (1, 1) and 40 <= config.network.head_channels <= 64


# -- measuring ----------------------------------------------------------------------------------------------------


def test_bench_decodes_what_was_painted(bench, model_file: Path) -> None:
    model, sigmas, _ = load_model(model_file)
    noise = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(1000))
    context = model.context(torch.tensor([0, 1, 0, 1]))
    free = model.class_tokens[-1:]
    painted = samplers.sample(model.network, noise, context, free, sigmas, steps=5, guidance=7.5, prediction="epsilon")
    pictures, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim5@g7.5")
    assert pictures.shape == (4, 3, 32, 32)
    assert psnr(to_range(pictures), to_range(model.decode(painted))).min() > 60
    plain, _ = bench.pictures(CATALOGUE.variants["unmerged"], "ddim5")
    assert not torch.equal(plain, pictures)


def test_inpainting_keeps_the_known_half(bench) -> None:
    known = bench._known(0, 4)
    bench.model.decode = lambda painted: painted  # the decoder looks across the edge
    painted, _ = bench.pictures(CATALOGUE.variants["unmerged"], "inpaint5")
    assert torch.equal(painted[..., :4], known[..., :4])
    assert not torch.equal(painted[..., 4:], known[..., 4:])
    del bench.model.decode
    pictures, _ = bench.pictures(CATALOGUE.variants["unmerged"], "inpaint5")
    assert bench.unknown(pictures, "inpaint5").shape[-1] == 16 and bench.unknown(pictures, "ddim5") is pictures
    merged, _ = bench.pictures(CATALOGUE.variants["tomesd 0.5"], "inpaint5")
    assert not torch.equal(merged, pictures)


def test_real_pictures_to_inpaint_are_of_the_classes_in_turn(bench) -> None:
    real = data.make_bank(2, 303, workers=0, pictures=SETS["tiny"])
    expected = bench.model.encode(as_pictures(torch.from_numpy(real[[0, 1, 0, 1], [0, 0, 1, 1]])))
    torch.testing.assert_close(bench._known(0, 4), expected)
    assert torch.equal(bench._known(2, 2), bench._known(0, 4)[2:])


def test_measure_end_to_end(model_file, tmp_path, monkeypatch) -> None:
    judge = classifier.train(per_class=4, real_per_class=20, epochs=1, workers=0, data=SETS["tiny"])
    classifier.save(judge, tmp_path / "judge.safetensors")
    assert classifier.load(tmp_path / "judge.safetensors").data == "tiny"
    made = []
    real = Bench.pictures
    monkeypatch.setattr(Bench, "pictures", lambda self, v, s: made.append((v.name, s)) or real(self, v, s))
    out = tmp_path / "lab.csv"
    fixed = "--plan few:ddim5@g5+inpaint5@g5 --images 4 --seeds 2 --batch 2 --device cpu --commit abc"
    times = "--time-size 16 --time-rows 2 --time-repeats 1"
    files = ["--model", str(model_file), "--out", str(out), "--classifier", str(tmp_path / "judge.safetensors")]
    measure.main([*files, *fixed.split(), *times.split()])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == CATALOGUE.sets["few"] * 2
    assert [row["sampler"] for row in rows] == ["ddim5@g5"] * 10 + ["inpaint5@g5"] * 10
    assert tuple(rows[0]) == tuple(measure.COLUMNS)
    assert all(row["step_shape"] == "2x4x16x16" and row["fd_gap"] and row["commit"] == "abc" for row in rows)
    assert len(made) == len(set(made)) == 20  # the reference is the unmerged row itself, and is kept


def test_a_judge_of_other_pictures_is_refused(model_file, tmp_path) -> None:
    judge = classifier.Judge(classifier.Classifier().eval(), torch.randn(40, classifier.FEATURES), 1.0)
    classifier.save(judge, tmp_path / "demo.safetensors")
    arguments = ["--model", str(model_file), "--out", str(tmp_path / "a.csv"), "--device", "cpu", "--images", "4"]
    with pytest.raises(ValueError, match="'demo'.*'tiny'"):
        measure.main([*arguments, "--classifier", str(tmp_path / "demo.safetensors")])


@pytest.mark.parametrize(("name", "said"), [("ddim30@gmuch", "'much'"), ("ddim30@g-1", "'-1'"), ("dim30@g3", "dim30")])
def test_a_wrong_sampler_is_told(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        samplers.parse_sampler(name)


def test_a_late_start_is_timed_once(bench) -> None:
    shape = (16, 2, 1)
    for name in ("sample 0.75", "sample 0.75 from 0.2", "sample 0.75 from 0.1"):
        bench.timing(CATALOGUE.variants[name], "ddim5", *shape)
    assert len(bench._timed) == 2  # merged and unmerged
    bench.timing(CATALOGUE.variants["sample 0.9375"], "ddim5", *shape)
    assert len(bench._timed) == 3


def test_the_demo_models_pictures_are_what_they_were() -> None:
    """To rounding, which differs from processor to processor."""
    file = Path(__file__).resolve().parents[3] / "demo" / "model.safetensors"
    bench = Bench(file, "cpu", images=1, seeds=1, batch=1)
    run = Run(CATALOGUE.variants["unmerged"])
    assert run.cost == 1.0 and bench.painted == (3, 64, 64) and bench.model.prediction == "v"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 3, 32, 32), generator=generator)
    context, free = bench.model.context(torch.tensor([1])), bench.model.class_tokens[-1:]
    with torch.no_grad():
        found = samplers.sample(bench.model.network, noise, context, free, bench.table, steps=2)
    moments = [found.mean().item(), found.std().item(), found[0, 0, 16, 16].item()]
    assert moments == pytest.approx(MOMENTS, abs=2e-4)
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] == bench.hash == "406af75e11ba"
