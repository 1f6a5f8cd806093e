"""ComfyUI's own EasyCache and LazyCache beside the lab's, JSON on stdout. Needs COMFYUI_DIR.

In ComfyUI's sampler, with the demo's model and the nodes; and in the lab's sampler, ComfyUI's wrappers around a flow's
network, a picture at a time.
"""

from __future__ import annotations

import json
import uuid

import torch
from in_comfyui import load_demo, start_comfyui

SEED, STEPS, GUIDANCE, SIZE = 7, 10, 3.0, 32
DEMO = [("EasyCache", 0.3), ("LazyCache", 1.0)]
FLOW = [("EasyCache", 0.2), ("EasyCache", 0.5), ("LazyCache", 0.02), ("LazyCache", 0.1)]


def ours(network, context, order, sigmas, prediction, reuse, x, last):
    """(pictures, of each picture the steps at which the model ran)."""
    from lab.fidelity.reuse import reusing
    from lab.models.samplers import Sampler, ddim, run

    ran = [[] for _ in x]
    now = 0

    def call(x, times, context, which):
        for picture in range(len(ran)) if which is None else which.tolist():
            ran[picture].append(now)
        return network(x, times, context)

    guided = reusing(reuse, call, context, order, sigmas, prediction, GUIDANCE, last)

    def denoised(x, step):
        nonlocal now
        now = step
        return guided(x, step)

    return run(Sampler(ddim, STEPS, ""), denoised, x, sigmas, lambda: None), ran


def in_comfyuis_sampler(nodes, kind: str, threshold: float) -> dict:
    """The demo's model, one picture."""
    import comfy.sample
    import nodes as comfy_nodes
    from comfy_extras import nodes_easycache

    from lab.fidelity.reuse import Reuse
    from lab.models.model import load_model
    from lab.models.samplers import step_sigmas

    demo = nodes.demo
    own, table, _ = load_model(demo.MODEL_FILE)
    name = demo.class_names()[1]
    model, positive, negative, _, latent = nodes.ToMeDemoModel.execute(name, SIZE, 1).args
    order, sigmas = step_sigmas(table, STEPS)
    unet, ran = model.model.diffusion_model, []
    plain = unet._forward  # inside of all wrappers

    def forward(x, times, *more, **named):
        ran.append(order.index(round(times[0].item())))
        return plain(x, times, *more, **named)

    patched = getattr(nodes_easycache, f"{kind}Node").execute(model, threshold, 0.15, 0.95, False).args[0]
    unet._forward = forward
    arguments = (SEED, STEPS, GUIDANCE, "euler", "simple", positive, negative, latent, 1.0)
    try:
        out = comfy_nodes.KSampler().sample(patched, *arguments)[0]["samples"]
    finally:
        del unet._forward
    context = own.context(torch.tensor([demo.class_names().index(name), len(own.class_tokens) - 1]))
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    expected, mine = ours(own.network, context, order, sigmas, own.prediction, Reuse(kind, threshold), noise, 999)
    return {"difference": (out - expected).abs().max().item(), "theirs": [ran], "ours": mine}


def in_the_labs_sampler(kind: str, threshold: float) -> dict:
    """A flow of random weights, three pictures: ComfyUI's wrappers around the network, or around the guided model."""
    from small_dit import SMALL, TEXT, normal, with_weights

    from lab.fidelity.reuse import Reuse
    from lab.models.dit import DiT
    from lab.models.samplers import flow_sigmas, step_sigmas

    network = with_weights(DiT(SMALL))
    order, sigmas = step_sigmas(flow_sigmas(), STEPS)
    start, context = normal(3, 3, SIZE, SIZE, seed=1), normal(6, TEXT, SMALL.context_dim, seed=2)
    alone = [
        theirs(network, context[[i, i + 3]], order, sigmas, kind, threshold, start[i : i + 1])
        for i in range(len(start))
    ]
    expected, mine = ours(network, context, order, sigmas, "flow", Reuse(kind, threshold), start, 999)
    made = torch.cat([picture for picture, _ in alone])
    return {"difference": (made - expected).abs().max().item(), "theirs": [ran for _, ran in alone], "ours": mine}


def theirs(network, context, order, sigmas, kind, threshold, x):
    """(one picture, the steps at which the model ran): ComfyUI's own code around a flow's network."""
    from comfy.model_sampling import ModelSamplingDiscreteFlow
    from comfy_extras import nodes_easycache

    from lab.models.samplers import Sampler, ddim, denoiser, run

    levels = ModelSamplingDiscreteFlow()
    levels.set_parameters(shift=1.0)
    holder = getattr(nodes_easycache, f"{kind}Holder")(threshold, 0.15, 0.95, 8, False, False, output_channels=3)
    holder.prepare_timesteps(levels)
    ids, turned, ran, now = [uuid.uuid4(), uuid.uuid4()], [1, 0], [], 0  # ComfyUI puts the unprompted row first

    def level(rows):
        return torch.full((rows,), sigmas[now] / (1 + sigmas[now]))

    def called(x, times, context, options):
        ran.append(now)
        return network(x[turned], times, context[turned])[turned]

    def around_network(x, times, context):
        holder.skip_current_step = False  # ComfyUI's wrapper around a step does that
        options = {"easycache": holder, "sigmas": level(2), "uuids": ids}
        given = (x[turned].clone(), times, context[turned], options)
        return nodes_easycache.easycache_forward_wrapper(called, *given)[turned]

    def guided(x, timestep, options):
        ran.append(now)
        return denoiser(network, context, order, sigmas, "flow", GUIDANCE)(x * (1 + sigmas[now]), now)

    def denoised(x, step):
        nonlocal now
        now = step
        if kind == "EasyCache":
            return denoiser(around_network, context, order, sigmas, "flow", GUIDANCE)(x, step)
        options = {"transformer_options": {"easycache": holder}}
        return nodes_easycache.lazycache_predict_noise_wrapper(guided, x / (1 + sigmas[step]), level(1), options)

    return run(Sampler(ddim, STEPS, ""), denoised, x, sigmas, lambda: None), ran


def main() -> None:
    start_comfyui()
    with torch.inference_mode():
        nodes = load_demo()
        found = {f"demo {kind} {t}": in_comfyuis_sampler(nodes, kind, t) for kind, t in DEMO}
        found |= {f"flow {kind} {t}": in_the_labs_sampler(kind, t) for kind, t in FLOW}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
