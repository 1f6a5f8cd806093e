"""The lab's DiT: its parts against slow references, its flow, its file. On the CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_dit import PICTURES, SIZE, SMALL, TEXT, normal, with_weights

from lab.fidelity.methods import CATALOGUE, UNMERGED
from lab.models import optimize, samplers
from lab.models.data_moving import SETS
from lab.models.dit import DiT, DiTConfig, JointAttention, rope_rotations, rotate
from lab.models.model import SIGMAS_KEY, TOKENS_KEY, ClassModel, load_model, save_model
from lab.models.train import CONFIGS
from lab.models.unet import timestep_embedding

# -- its parts ----------------------------------------------------------------------------------------------------


def to_patches(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, N, C * 2 * 2], patch by patch."""
    corners = [(i, j) for i in range(0, x.shape[2], 2) for j in range(0, x.shape[3], 2)]
    return torch.stack([x[:, :, i : i + 2, j : j + 2].flatten(1) for i, j in corners], dim=1)


def test_patches_are_tokens_row_by_row_and_come_back():
    network, x, seen = with_weights(DiT(SMALL)), normal(2, 3, 8, 12), []
    network.image_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.out.register_forward_hook(lambda *_: to_patches(x))
    assert torch.equal(network(x, torch.zeros(2), normal(2, TEXT, 8)), x)
    (tokens,) = seen
    assert tokens.shape == (2, 24, 12) and torch.equal(tokens, to_patches(x))
    assert torch.equal(tokens[1, 7], x[1, :, 2:4, 2:4].reshape(-1))  # second row, second column


def test_predicts_a_picture_of_the_inputs_shape():
    network = with_weights(DiT(SMALL))
    out = network(normal(2, 3, 8, 12), torch.tensor([3.0, 700.0]), normal(2, TEXT, 8))
    assert out.shape == (2, 3, 8, 12) and network.grid(8, 12) == (4, 6)
    with pytest.raises(ValueError, match="multiples of the patch, 2, got 8x9"):
        network(normal(2, 3, 8, 9), torch.zeros(2), normal(2, TEXT, 8))


def test_time_and_text_reach_the_picture():
    network, x, text = with_weights(DiT(SMALL)), normal(1, 3, 8, 8), normal(1, TEXT, 8)
    times = torch.tensor([500.0])
    out = network(x, times, text)
    assert (network(x, times - 400, text) - out).abs().max() > 1e-3
    assert (network(x, times, text + normal(1, TEXT, 8, seed=1)) - out).abs().max() > 1e-3


def test_the_network_is_what_its_papers_write():
    """One picture, every block written out on the bare weights."""
    network = with_weights(DiT(SMALL)).double()
    weights = network.state_dict()
    x, text, times = normal(1, 3, 8, 8).double(), normal(1, TEXT, 8, seed=1).double(), torch.tensor([300.0])
    rotations = rope_rotations(TEXT, (4, 4), 16, x.device)

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def parts(name: str, count: int) -> torch.Tensor:
        return linear(f"{name}.linear", time * time.sigmoid()).reshape(count, 32)

    def norm(y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = y - y.mean(-1, keepdim=True)
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def heads(name: str, y: torch.Tensor) -> list[torch.Tensor]:  # [l, 96] -> q, k, v [l, 2, 16]
        q, k, v = (part.reshape(-1, 2, 16) for part in y.chunk(3, dim=-1))
        q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        return [q * weights[f"{name}.q_norm.scale"], k * weights[f"{name}.k_norm.scale"], v]

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = (rotate(part[None], rotations)[0].double() for part in (q, k))
        shares = (torch.einsum("qhd,khd->hqk", q, k) / 4).softmax(-1)
        return torch.einsum("hqk,khd->qhd", shares, v).flatten(1)

    def gelu(y: torch.Tensor) -> torch.Tensor:
        return F.gelu(y, approximate="tanh")

    time = linear("time_embed.0", timestep_embedding(times, 256).double())[0]
    time = linear("time_embed.2", time * time.sigmoid())
    both = [linear("text_in", text[0]), linear("image_in", to_patches(x)[0])]
    names = ["double_blocks.0.text", "double_blocks.0.image"]
    by = [parts(f"{name}.modulation", 6) for name in names]
    asked = [
        heads(f"{name}.heads", linear(f"{name}.qkv", norm(y, m[0], m[1])))
        for name, y, m in zip(names, both, by, strict=True)
    ]
    out = attended(*(torch.cat(pair) for pair in zip(*asked, strict=True))).split((TEXT, 16))
    for i, (name, m) in enumerate(zip(names, by, strict=True)):
        both[i] = both[i] + m[2] * linear(f"{name}.out", out[i])
        inner = gelu(linear(f"{name}.mlp.0", norm(both[i], m[3], m[4])))
        both[i] = both[i] + m[5] * linear(f"{name}.mlp.2", inner)
    y = torch.cat(both)
    for name in ("single_blocks.0", "single_blocks.1"):
        shift, scale, gate = parts(f"{name}.modulation", 3)
        qkv, inner = linear(f"{name}.into", norm(y, shift, scale)).split((96, 128), dim=-1)
        y = y + gate * linear(f"{name}.out", torch.cat((attended(*heads(f"{name}.heads", qkv)), gelu(inner)), dim=-1))
    y = linear("out", norm(y[TEXT:], *parts("last_modulation", 2)))
    torch.testing.assert_close(to_patches(network(x, times, text))[0], y, atol=1e-5, rtol=1e-5)


def test_a_fresh_network_predicts_zero():
    assert not DiT(SMALL)(normal(1, 3, 8, 8), torch.zeros(1), normal(1, TEXT, 8)).any()


def test_rotation_is_that_of_a_slow_reference():
    x, d = normal(2, 3 + 2 * 4, 2, 8, dtype=torch.float64), 8
    found = rotate(x, rope_rotations(3, (2, 4), d, x.device))
    expected = x.clone()
    for token in range(8):
        place = (token // 4, token % 4)
        for pair in range(d // 2):
            angle = place[pair // 2] * 10_000 ** -((pair % 2) / 2)  # two pairs for the row, two for the column
            turn = complex(math.cos(angle), math.sin(angle))
            turned = torch.view_as_complex(x[:, 3 + token, :, 2 * pair : 2 * pair + 2].contiguous()) * turn
            expected[:, 3 + token, :, 2 * pair : 2 * pair + 2] = torch.view_as_real(turned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(found[:, :3], x[:, :3].float().double())  # text stays


def test_rotated_tokens_see_their_distance_alone():
    q, k = (
        rotate(normal(1, 1, 1, 16, seed=s).expand(1, 36, 1, 16), rope_rotations(0, (6, 6), 16, "cpu")) for s in (0, 1)
    )
    logits = (q[0, :, 0] @ k[0, :, 0].T).reshape(6, 6, 6, 6)
    torch.testing.assert_close(logits[1, 1, 3, 2], logits[2, 3, 4, 4], atol=1e-4, rtol=0)
    assert (logits[1, 1, 3, 2] - logits[1, 1, 2, 3]).abs() > 1e-3


def test_joint_attention_is_one_softmax():
    q, k, v = (normal(2, 11, 3, 4, seed=s, dtype=torch.float64) for s in range(3))
    found = JointAttention()(q, k, v, 5).unflatten(2, (3, 4))
    for row in range(2):
        for head in range(3):
            weights = (q[row, :, head] @ k[row, :, head].T / 2).softmax(-1)
            torch.testing.assert_close(found[row, :, head], weights @ v[row, :, head])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"heads": 5}, "width 384 in 5"), ({"width": 36}, "multiple of 4"), ({"patch": 0}, "patch must")],
)
def test_sizes_that_make_no_sense_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        DiTConfig(**sizes)


@pytest.mark.parametrize("name", ["dit", "dit-fine"])
def test_the_configurations_are_what_the_page_says(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = ClassModel(config.network, len(SETS[config.data].classes), config.tokens, config.prediction)
    assert 23e6 < sum(p.numel() for p in model.parameters()) < 27e6
    assert config.network.head_channels == 64 and 8 <= config.tokens <= 16 and config.prediction == "flow"
    size = SETS[config.data].size
    assert math.prod(model.network.grid(size, size)) == {"dit": 1024, "dit-fine": 2304}[name]


# -- flow ---------------------------------------------------------------------------------------------------------


def test_flow_sigmas_rise_and_shift():
    plain, shifted = samplers.flow_sigmas(), samplers.SCHEDULES["flow3"]()
    assert plain.shape == (1000,) and (plain.diff() > 0).all() and torch.isfinite(plain).all()
    t = shifted / (1 + shifted)
    own = plain / (1 + plain)
    torch.testing.assert_close(own[[0, 999]], torch.tensor([0.001, 0.999]))
    torch.testing.assert_close(t, 3 * own / (1 + 2 * own))  # as the paper writes it


def test_flows_loss_counts_all_noise_alike():
    assert optimize.loss_weights(samplers.flow_sigmas(), "flow").eq(1).all()


def test_a_straight_path_is_followed_to_its_end():
    """Of one picture and one noise the flow is a constant: any number of steps ends at the picture."""
    only, noise = normal(1, 3, 4, 4, seed=1).double(), normal(1, 3, 4, 4).double()
    sampler = samplers.SAMPLERS["flow28"]
    _, sigmas = samplers.step_sigmas(samplers.flow_sigmas(), sampler.steps)
    seen = []

    def denoised(x, step):
        signal, _ = samplers.signal_and_noise(sigmas[step], "flow")
        seen.append((x * signal, 1 - signal))
        return samplers.clean("flow", x * signal, noise - only, signal, 1 - signal)

    start = (only + sigmas[0] * noise) / (1 + sigmas[0] ** 2) ** 0.5
    found = samplers.run(sampler, denoised, start, sigmas, lambda: noise)
    torch.testing.assert_close(found, only, atol=1e-9, rtol=0)
    assert len(seen) == 28
    for x, t in seen:
        torch.testing.assert_close(x, (1 - t) * only + t * noise, atol=1e-9, rtol=0)


def test_the_sampler_is_eulers_method_on_the_flow(dit_bench):
    """x + (t' - t) * flow, written out, on the network itself."""
    order, sigmas = samplers.step_sigmas(dit_bench.table, 2)
    times = [s / (1 + s) for s in sigmas]
    x = normal(2, 3, SIZE, SIZE, seed=1000) * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5
    for i, step in enumerate(order):
        both = dit_bench.network(
            torch.cat((x, x)), torch.full((4,), float(step)), dit_bench.context(torch.tensor([0, 1]))
        )
        out, free = both.chunk(2)
        x = x + (times[i + 1] - times[i]) * (free + 3.0 * (out - free))
    pictures, _ = dit_bench.pictures(CATALOGUE.variants[UNMERGED], "flow2")
    torch.testing.assert_close(pictures, x, atol=1e-3, rtol=1e-3)


def test_the_trainers_own_sampler_agrees(dit_bench):
    model = dit_bench.model
    noise, context = normal(2, 3, SIZE, SIZE, seed=1000), model.context(torch.tensor([0, 1]))
    expected = samplers.sample(
        model.network, noise, context, model.class_tokens[-1:], dit_bench.table, steps=2, prediction="flow"
    )
    pictures, _ = dit_bench.pictures(CATALOGUE.variants[UNMERGED], "flow2")
    torch.testing.assert_close(pictures, expected, atol=5e-3, rtol=1e-3)


# -- file ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_the_one_that_is_loaded(tmp_path, dit_file):
    model, sigmas, metadata = load_model(dit_file)
    assert model.network.config == SMALL and metadata["prediction"] == "flow" and metadata["size"] == str(SIZE)
    assert "unet" not in metadata and torch.equal(sigmas, samplers.flow_sigmas())
    original = with_weights(ClassModel(SMALL, 2, TEXT, "flow"))
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float()), name
    again = tmp_path / "again.safetensors"
    save_model(again, model, sigmas, {}, PICTURES)
    reread, _, same = load_model(again)
    assert same == metadata
    assert all(torch.equal(value, reread.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({TOKENS_KEY: torch.zeros(2, 1, 8), SIGMAS_KEY: torch.ones(1000)}, path, metadata={"vae": "{}"})
    with pytest.raises(ValueError, match="none of unet, dit"):
        load_model(path)
