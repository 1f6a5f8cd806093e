"""The workflows of example_workflows/, one function each. `build.py` writes them."""

from __future__ import annotations

from collections.abc import Callable

from shared_tome.config import ToMeConfig

from .graph import Graph, Node, Output

HUB = "https://huggingface.co"
SD15 = f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors"
SDXL = f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"
SD2_INPAINT = f"{HUB}/Comfy-Org/stable_diffusion_2.1_repackaged/resolve/main/512-inpainting-ema.safetensors"
FLUX = f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors"
WAN = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN_MODEL = f"{WAN}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"
WAN_TEXT = f"{WAN}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
WAN_VAE = f"{WAN}/vae/wan_2.1_vae.safetensors"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/diffusion_models"
WAN22_HIGH = f"{WAN22}/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
WAN22_LOW = f"{WAN22}/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
LTX2 = f"{HUB}/Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors"
LTX2_TEXT = f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors"
QWEN = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
QWEN_TEXT = f"{QWEN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"
QWEN_VAE = f"{QWEN}/vae/qwen_image_vae.safetensors"
QWEN_EDIT = (
    f"{HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors"
)

TOME_COLOR = "#3f9e5c"


def _file(url: str) -> str:
    return url.rsplit("/", 1)[1]


def _get(*files: tuple[str, str]) -> str:
    """The lines of a note that say what to download."""
    lines = [f"- [{_file(url)}]({url}) into `models/{folder}`" for folder, url in files]
    return "\n".join(["### Download", *lines])


def _start() -> str:
    """A line of a note about the option `start`, whatever its default is."""
    if ToMeConfig().start > 0:
        return "- **start** 0 (advanced): every step is merged. Faster, and further from the unmerged picture."
    return (
        "- **start** 0.2 (advanced): the first fifth of the steps is left alone. Nearer to the unmerged picture, for a "
        "fifth of the gain."
    )


Place = tuple[float, float] | None  # column and row in the picture


def _checkpoint(graph: Graph, url: str, at: Place) -> Node:
    graph.column("Model")
    return graph.add("CheckpointLoaderSimple", ckpt_name=_file(url), models=(("checkpoints", url),), at=at)


def _tome(graph: Graph, model: Output, at: Place) -> Node:
    graph.column("ToMe", TOME_COLOR)
    return graph.add("ToMe", model=model, at=at)


def _prompts(graph: Graph, clip: Output, positive: str, negative: str, at: Place) -> tuple[Output, Output]:
    graph.column("Prompt")
    return (
        graph.add("CLIPTextEncode", "Prompt", clip=clip, text=positive, at=at)["CONDITIONING"],
        graph.add("CLIPTextEncode", "Negative prompt", clip=clip, text=negative)["CONDITIONING"],
    )


def sd15_text_to_image() -> Graph:
    graph = Graph("01_sd15_text_to_image", "SD 1.5", "Text to image through ToMe")
    graph.note(
        f"""## ToMe with SD 1.5

{_get(("checkpoints", SD15))}

### What ToMe does here
It stands between the checkpoint and the sampler. Attention then goes over fewer tokens: the picture stays nearly the
same and each step takes less time. The larger the picture, the larger the gain; at 512 x 512 on a fast GPU there may
be none. A layer with fewer than `min tokens` tokens is left alone.

### Try
- **ratio** is the one slider to move: 0 changes nothing, higher is faster and further from the unmerged picture.
- Press Ctrl+B on the ToMe node to bypass it, and queue again: the same seed without ToMe.
{_start()}
- Larger pictures: 768 x 768 and up.""",
        440,
    )
    loader = _checkpoint(graph, SD15, (0, 1))
    latent = graph.add("EmptyLatentImage", width=512, height=768, batch_size=1, at=(1, 2))
    tome = _tome(graph, loader["MODEL"], (1, 1))
    positive, negative = _prompts(
        graph,
        loader["CLIP"],
        "a lighthouse on a cliff above the sea at dusk, warm light, oil painting, detailed",
        "blurry, low quality, text, watermark",
        (1, 0),
    )
    graph.column("Sample")
    sampler = graph.add(
        "KSampler", model=tome["MODEL"], positive=positive, negative=negative, latent_image=latent["LATENT"],
        seed=7, steps=25, cfg=7.0, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0, at=(2, 1),
    )  # fmt: skip
    graph.column("Picture")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=loader["VAE"], at=(3, 1))
    graph.add("SaveImage", images=decoded["IMAGE"], filename_prefix="ToMe/sd15", size=(400, 620), at=(4, 1))
    return graph


def compare() -> Graph:
    graph = Graph("02_compare_with_and_without", "With and without", "One seed, two samplers, side by side")
    graph.note(
        f"""## With ToMe and without

{_get(("checkpoints", SD15))}

### What happens here
Two samplers with the same seed, prompt and noise; the lower one goes through ToMe. Both pictures are saved side by
side: left without ToMe, right with it.

### Time and tokens
**ToMe Report** says which layers were merged and how long a step takes without and with ToMe, measured on this very
model. **ToMe Map** shows over the picture which tokens stood for the others. Both read what **ToMe Record** noted on
the way; the picture is the same without these three. To run again, change the seed in **both** samplers.

### Difference
**ToMe Compare** says how near the two pictures are (PSNR, SSIM) and draws their difference, eight times as bright. Over
50 dB nobody sees it; under 30 dB something has become another thing.

### Try
- **ratio** 0.5, 0.75, 0.9375: where does the difference begin to matter to you?
{_start()}
- **method** `merge` or `merge_queries`: what the paper and ComfyUI's own node do.
- 512 x 512 and 1024 x 1024: how the gain grows with the size.""",
        520,
    )
    loader = _checkpoint(graph, SD15, (0, 1))
    latent = graph.add("EmptyLatentImage", width=768, height=768, batch_size=1)
    tome = _tome(graph, loader["MODEL"], (1, 2))
    recorded = graph.add("ToMeRecord", model=tome["MODEL"])
    positive, negative = _prompts(
        graph,
        loader["CLIP"],
        "photograph of an old harbour town, boats, reflections in the water, morning light, sharp focus",
        "blurry, low quality, text, watermark",
        (1, 0),
    )
    graph.column("Sample")
    pictures = []
    for row, title, model in ((1, "Without ToMe", loader["MODEL"]), (2, "With ToMe", recorded["MODEL"])):
        sampler = graph.add(
            "KSampler", title, model=model, positive=positive, negative=negative, latent_image=latent["LATENT"],
            seed=7, steps=25, cfg=7.0, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
            size=(340, 270), at=(2, row),
        )  # fmt: skip
        pictures.append((row, title, sampler["LATENT"]))
    graph.column("Decode")
    decoded = [
        graph.add("VAEDecode", f"Decode {title[:-5].lower()}", samples=samples, vae=loader["VAE"], at=(3, row))["IMAGE"]
        for row, title, samples in pictures
    ]
    both = graph.add(
        "ImageStitch", "Side by side", image1=decoded[0], image2=decoded[1], at=(4, 1.1),
        direction="right", match_image_size=True, spacing_width=8, spacing_color="white",
    )  # fmt: skip
    graph.column("Compare")
    graph.add(
        "SaveImage", "Left without, right with ToMe", images=both["IMAGE"],
        filename_prefix="ToMe/without_and_with", size=(860, 540),
    )  # fmt: skip
    graph.add("ToMeReport", record=recorded["record"], after=decoded[1], measure_time=True, sampling=0, size=(860, 340))
    graph.column("Difference", TOME_COLOR)
    compared = graph.add("ToMeCompare", image=decoded[0], other=decoded[1], factor=8, at=(4, 1.9))
    graph.add("PreviewImage", "Difference", images=compared["difference"], size=(420, 590))
    graph.column("What was kept", TOME_COLOR)
    shown = graph.add(
        "ToMeMap", record=recorded["record"], image=decoded[1],
        show="groups", level=-1, layer=0, step=-1, opacity=0.6, picture=0, legend=True, sampling=0,
    )  # fmt: skip
    graph.add("PreviewImage", "Map", images=shown["map"], size=(420, 590))
    return graph


def sdxl_hires() -> Graph:
    graph = Graph("03_sdxl_hires", "SDXL hires", "ToMe where the time goes: in the second pass, at 2048 x 2048")
    graph.note(
        f"""## SDXL, with ToMe in the hires pass

{_get(("checkpoints", SDXL))}

### What ToMe does here
The first pass makes the picture at 1024 x 1024 **without** ToMe: SDXL has so few tokens there that merging gained
nothing on an H200. The second pass paints it over at 2048 x 2048, where a step takes about three times as long, and
goes **through** ToMe. The composition comes from the unmerged pass; only the refinement is sped up.

### Try
- **ratio** 0.5 for a picture nearer to the unmerged one, 0.9375 for speed.
- **denoise** of the second sampler: 0.4 keeps more of the first pass, 0.65 paints more anew.
- A smaller card: set the factor of *Upscale Latent By* to 1.5.
- Connect the first sampler to ToMe as well and compare: the composition changes too.""",
        440,
    )
    loader = _checkpoint(graph, SDXL, (0, 0))
    latent = graph.add("EmptyLatentImage", width=1024, height=1024, batch_size=1)
    positive, negative = _prompts(
        graph,
        loader["CLIP"],
        "a wide valley in the mountains with a river and a small village, early autumn, mist, photograph, detailed",
        "blurry, low quality, text, watermark",
        None,
    )
    graph.column("First pass, without ToMe")
    shared = {"positive": positive, "negative": negative, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    first = graph.add(
        "KSampler", "First pass", model=loader["MODEL"], latent_image=latent["LATENT"],
        seed=7, steps=25, cfg=7.0, denoise=1.0, at=(1, 0), **shared,
    )  # fmt: skip
    upscaled = graph.add("LatentUpscaleBy", samples=first["LATENT"], upscale_method="bislerp", scale_by=2.0, at=(2, 0))
    tome = _tome(graph, loader["MODEL"], (1, 1))
    graph.column("Hires pass, through ToMe", TOME_COLOR)
    second = graph.add(
        "KSampler", "Hires pass", model=tome["MODEL"], latent_image=upscaled["LATENT"],
        seed=7, steps=20, cfg=7.0, denoise=0.55, at=(3, 1), **shared,
    )  # fmt: skip
    graph.column("Picture")
    small = graph.add("VAEDecode", "Decode first pass", samples=first["LATENT"], vae=loader["VAE"])
    graph.add("PreviewImage", "First pass", images=small["IMAGE"], size=(400, 300))
    large = graph.add("VAEDecode", "Decode hires pass", samples=second["LATENT"], vae=loader["VAE"], at=(4, 1))
    graph.add("SaveImage", "Hires pass", images=large["IMAGE"], filename_prefix="ToMe/sdxl_hires")
    return graph


def inpaint() -> Graph:
    graph = Graph("04_inpaint", "Inpaint", "Painting over a part of a picture through ToMe")
    graph.note(
        f"""## Inpainting with ToMe

{_get(("checkpoints", SD2_INPAINT))}

### First
Load a picture of yours and paint over what is to change: right-click the picture, **Open in Mask Editor**, paint,
save. Without a mask nothing changes.

### What ToMe does here
The model sees the whole picture, mask and all, and ToMe lets it attend to fewer of its tokens. What lies outside the
mask is kept by the mask, not by the model, so merging cannot harm it.

### Try
- **ratio** 0.5 for a picture nearer to the unmerged one, 0.9375 for speed.
- A large picture: its size is the size of the work, and the gain grows with it.
- An SD 1.5 checkpoint with *Set Latent Noise Mask* instead: ToMe stands in the same place.""",
        430,
    )
    loader = _checkpoint(graph, SD2_INPAINT, (0, 0))
    image = graph.add("LoadImage", image="example.png", upload="image", at=(0, 1))
    tome = _tome(graph, loader["MODEL"], (1, 0))
    positive, negative = _prompts(
        graph,
        loader["CLIP"],
        "a small red sailing boat on a calm lake, photograph",
        "blurry, low quality, text",
        (1, 2),
    )
    graph.column("Mask")
    masked = graph.add(
        "InpaintModelConditioning", positive=positive, negative=negative, vae=loader["VAE"], pixels=image["IMAGE"],
        mask=image["MASK"], noise_mask=True, at=(2, 1),
    )  # fmt: skip
    graph.column("Sample")
    sampler = graph.add(
        "KSampler", model=tome["MODEL"], positive=masked["positive"], negative=masked["negative"],
        latent_image=masked["latent"], seed=7, steps=25, cfg=7.0, sampler_name="dpmpp_2m", scheduler="karras",
        denoise=1.0, at=(3, 0),
    )  # fmt: skip
    graph.column("Picture")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=loader["VAE"], at=(4, 0))
    graph.add("SaveImage", images=decoded["IMAGE"], filename_prefix="ToMe/inpaint", at=(4, 1))
    return graph


def flux() -> Graph:
    graph = Graph("05_flux", "Flux", "Text to image: image tokens are sampled, text stays")
    graph.note(
        f"""## ToMe with Flux

{_get(("checkpoints", FLUX))}

### What ToMe does here
Flux attends to text and image in one. ToMe samples the image's keys and values and leaves every text token where it
is, so the prompt keeps its full weight. 1024 x 1024 are 4,096 image tokens.

### Try
- Larger pictures, 1536 x 1536 and up: the gain comes with the size.
{_start()}
- Bypass the node (Ctrl+B) and queue again: the same seed without ToMe.
- Transformers have one level, so `levels` stays at auto; cross-attention and MLP are for models with a U-Net.""",
        420,
    )
    loader = _checkpoint(graph, FLUX, (0, 1))
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1, at=(1, 2))
    tome = _tome(graph, loader["MODEL"], (1, 1))
    graph.column("Prompt")
    text = graph.add(
        "CLIPTextEncode", "Prompt", clip=loader["CLIP"], at=(1, 0),
        text="a glass greenhouse full of plants at night, lit from inside, rain on the panes, a cat on a bench, "
        "photograph",
    )["CONDITIONING"]  # fmt: skip
    positive = graph.add("FluxGuidance", conditioning=text, guidance=3.5, at=(2, 0))["CONDITIONING"]
    negative = graph.add("ConditioningZeroOut", conditioning=text)["CONDITIONING"]
    graph.column("Sample")
    sampler = graph.add(
        "KSampler", model=tome["MODEL"], positive=positive, negative=negative, latent_image=latent["LATENT"],
        seed=7, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0, at=(3, 1),
    )  # fmt: skip
    graph.column("Picture")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=loader["VAE"], at=(4, 1))
    graph.add("SaveImage", images=decoded["IMAGE"], filename_prefix="ToMe/flux", at=(4, 2))
    return graph


def wan_video() -> Graph:
    graph = Graph("06_wan_video", "Wan 2.1 video", "Text to video through ToMe")
    files = (("diffusion_models", WAN_MODEL), ("text_encoders", WAN_TEXT), ("vae", WAN_VAE))
    graph.note(
        f"""## A video with Wan 2.1 and ToMe

{_get(*files)}

### What ToMe does here
A video model attends from every token of every frame to every other one. 832 x 480 pixels and 33 frames are 14,040
tokens, several times as many as a picture has; ToMe keeps some of the keys and values of each layer, other ones in
each step.

### Try
- **length** 81 (five seconds): the time of attention grows with the square of the length.
{_start()}
- Bypass the node (Ctrl+B) and queue again: the same seed without ToMe.
- It stands in the same place with HunyuanVideo. Wan 2.2 has two models: see the next example.""",
        440,
    )
    graph.column("Model")
    model, text, picture = (
        graph.add("UNETLoader", unet_name=_file(WAN_MODEL), weight_dtype="default", models=files[:1], at=(0, 1)),
        graph.add("CLIPLoader", clip_name=_file(WAN_TEXT), type="wan", device="default", models=files[1:2], at=(1, 0)),
        graph.add("VAELoader", vae_name=_file(WAN_VAE), models=files[2:]),
    )
    latent = graph.add("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1, at=(2, 2))
    tome = _tome(graph, model["MODEL"], (1, 1))
    shifted = graph.add("ModelSamplingSD3", model=tome["MODEL"], shift=8.0, at=(2, 1))
    positive, negative = _prompts(
        graph,
        text["CLIP"],
        "a fox running through fresh snow in a birch forest, the camera follows, soft morning light",
        "blurry, low quality, static, subtitles, watermark, distorted",
        (2, 0),
    )
    graph.column("Sample")
    sampler = graph.add(
        "KSampler", model=shifted["MODEL"], positive=positive, negative=negative, latent_image=latent["LATENT"],
        seed=7, steps=30, cfg=6.0, sampler_name="uni_pc", scheduler="simple", denoise=1.0, at=(3, 1),
    )  # fmt: skip
    graph.column("Video")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=picture["VAE"], at=(4, 1))
    video = graph.add("CreateVideo", images=decoded["IMAGE"], fps=16.0, at=(4, 2))
    graph.add("SaveVideo", video=video["VIDEO"], filename_prefix="ToMe/wan", format="auto", codec="auto")
    return graph


def wan22_video() -> Graph:
    graph = Graph("07_wan22_video", "Wan 2.2 video", "Two models, two samplers: a ToMe node for each")
    files = (
        ("diffusion_models", WAN22_HIGH), ("diffusion_models", WAN22_LOW), ("text_encoders", WAN_TEXT),
        ("vae", WAN_VAE),
    )  # fmt: skip
    graph.note(
        f"""## A video with Wan 2.2's two models and ToMe

{_get(*files)}

### What happens here
One model removes the high noise in the first ten steps, the other one the low noise in the last ten. **Each has a ToMe
node**, between its loader and its sampler. Give both nodes the same values.

### What ToMe does here
832 x 480 pixels and 81 frames are 32,760 tokens, and every one attends to every other one. ToMe keeps some of the keys
and values of each layer. **start** and **end** go by noise, not by a sampler's own steps, so both nodes follow one
schedule over all twenty steps.

### Reports
**ToMe Report** says for each model which layers were merged. **measure_time** is off: it runs a model some more times
after the video.

### Try
- **length** 49 (three seconds) on a smaller card.
{_start()}
- Bypass both ToMe nodes (Ctrl+B) and queue again: the same seed without ToMe.
- A LoRA for four steps: put it before ToMe, set **steps** to 4 and let the samplers change at step 2. Each step counts
  more then: try a lower ratio.""",
        620,
    )
    graph.column("Model")
    high = graph.add(
        "UNETLoader", "High noise", unet_name=_file(WAN22_HIGH), weight_dtype="default", models=files[:1], at=(0, 0)
    )
    low = graph.add(
        "UNETLoader", "Low noise", unet_name=_file(WAN22_LOW), weight_dtype="default", models=files[1:2], at=(0, 2)
    )
    text = graph.add(
        "CLIPLoader", clip_name=_file(WAN_TEXT), type="wan", device="default", models=files[2:3], at=(0, 1)
    )
    picture = graph.add("VAELoader", vae_name=_file(WAN_VAE), models=files[3:])
    graph.column("ToMe for high noise", TOME_COLOR)
    first = graph.add("ToMe", model=high["MODEL"], at=(1, 0))
    first_recorded = graph.add("ToMeRecord", model=first["MODEL"])
    first_shifted = graph.add("ModelSamplingSD3", model=first_recorded["MODEL"], shift=8.0)
    graph.column("ToMe for low noise", TOME_COLOR)
    second = graph.add("ToMe", model=low["MODEL"], at=(1, 2))
    second_recorded = graph.add("ToMeRecord", model=second["MODEL"])
    second_shifted = graph.add("ModelSamplingSD3", model=second_recorded["MODEL"], shift=8.0)
    positive, negative = _prompts(
        graph,
        text["CLIP"],
        "a fox running through fresh snow in a birch forest, the camera follows, soft morning light",
        "blurry, low quality, static, subtitles, watermark, distorted",
        (1, 1),
    )
    latent = graph.add("EmptyHunyuanLatentVideo", width=832, height=480, length=81, batch_size=1)
    graph.column("Sample")
    shared = {
        "positive": positive, "negative": negative, "noise_seed": 7, "steps": 20, "cfg": 3.5, "sampler_name": "euler",
        "scheduler": "simple",
    }  # fmt: skip
    noisy = graph.add(
        "KSamplerAdvanced", "High noise", model=first_shifted["MODEL"], latent_image=latent["LATENT"],
        add_noise="enable", start_at_step=0, end_at_step=10, return_with_leftover_noise="enable", at=(2, 0), **shared,
    )  # fmt: skip
    sampler = graph.add(
        "KSamplerAdvanced", "Low noise", model=second_shifted["MODEL"], latent_image=noisy["LATENT"],
        add_noise="disable", start_at_step=10, end_at_step=10000, return_with_leftover_noise="disable", at=(2, 2),
        **shared,
    )  # fmt: skip
    graph.column("Video")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=picture["VAE"], at=(3, 2))
    video = graph.add("CreateVideo", images=decoded["IMAGE"], fps=16.0, at=(4, 2))
    graph.add("SaveVideo", video=video["VIDEO"], filename_prefix="ToMe/wan22", format="auto", codec="auto")
    graph.column("What was merged", TOME_COLOR)
    for title, recorded in (("High noise", first_recorded), ("Low noise", second_recorded)):
        graph.add(
            "ToMeReport", f"ToMe Report: {title.lower()}", record=recorded["record"], after=decoded["IMAGE"],
            measure_time=False, sampling=0, size=(560, 420),
        )  # fmt: skip
    return graph


def ltx2_video() -> Graph:
    graph = Graph("08_ltx2_video", "LTX-2 video", "Video through ToMe; its sound stays whole")
    files = (("checkpoints", LTX2), ("text_encoders", LTX2_TEXT))
    graph.note(
        f"""## A video with sound, with LTX-2 and ToMe

{_get(*files)}

### What ToMe does here
LTX-2 makes a video and its sound in one run. 1280 x 704 pixels and 121 frames are 14,080 tokens of video and about 120
of sound. ToMe keeps some of the video's keys and values where the video attends to itself. The sound, the text, and
what the video and the sound see of one another stay whole.

### Length
**length** of the video and **frames_number** of the sound are the same number: a multiple of 8, plus 1. The frame rate
stands in three nodes: *LTXVConditioning*, the sound and *Create Video*.

### Try
- **length** and **frames_number** 241 (ten seconds): the time of attention grows with the square of the length.
{_start()}
- Bypass the node (Ctrl+B) and queue again: the same seed without ToMe.
- A second pass after *LTXV Latent Upsampler* has four times the tokens: put its LoRA before a ToMe node of its own.""",
        470,
    )
    graph.column("Model")
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=_file(LTX2), models=files[:1], at=(0, 1))
    text = graph.add(
        "LTXAVTextEncoderLoader", text_encoder=_file(LTX2_TEXT), ckpt_name=_file(LTX2), device="default",
        models=files[1:], at=(0, 0),
    )  # fmt: skip
    voice = graph.add("LTXVAudioVAELoader", ckpt_name=_file(LTX2), models=files[:1])
    tome = _tome(graph, loader["MODEL"], (1, 1))
    positive, negative = _prompts(
        graph,
        text["CLIP"],
        "a steam train crosses a stone viaduct in the rain at dusk, the whistle echoes in the valley, the camera "
        "follows it slowly",
        "blurry, low quality, still frame, subtitles, watermark",
        (1, 0),
    )
    both = graph.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=25.0, at=(2, 0))
    graph.column("Size and length")
    moving = graph.add("EmptyLTXVLatentVideo", width=1280, height=704, length=121, batch_size=1, at=(1, 2))
    sound = graph.add(
        "LTXVEmptyLatentAudio", audio_vae=voice["Audio VAE"], frames_number=121, frame_rate=25.0, batch_size=1,
    )  # fmt: skip
    latent = graph.add("LTXVConcatAVLatent", video_latent=moving["LATENT"], audio_latent=sound["Latent"], at=(2, 2))
    graph.column("Sample")
    noise = graph.add("RandomNoise", noise_seed=7)
    kind = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add(
        "LTXVScheduler", latent=latent["latent"], steps=20, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1,
    )  # fmt: skip
    guider = graph.add(
        "CFGGuider", "Guidance", model=tome["MODEL"], positive=both["positive"], negative=both["negative"], cfg=4.0,
        at=(2, 1),
    )  # fmt: skip
    sampler = graph.add(
        "SamplerCustomAdvanced", noise=noise["NOISE"], guider=guider["GUIDER"], sampler=kind["SAMPLER"],
        sigmas=sigmas["SIGMAS"], latent_image=latent["latent"], at=(3, 1),
    )  # fmt: skip
    graph.column("Video")
    parts = graph.add("LTXVSeparateAVLatent", av_latent=sampler["output"], at=(4, 1))
    decoded = graph.add("VAEDecode", samples=parts["video_latent"], vae=loader["VAE"])
    heard = graph.add("LTXVAudioVAEDecode", samples=parts["audio_latent"], audio_vae=voice["Audio VAE"])
    video = graph.add("CreateVideo", images=decoded["IMAGE"], audio=heard["Audio"], fps=25.0)
    graph.add("SaveVideo", video=video["VIDEO"], filename_prefix="ToMe/ltx2", format="auto", codec="auto")
    return graph


def qwen_image_edit() -> Graph:
    graph = Graph("09_qwen_image_edit", "Qwen-Image-Edit", "Changing a picture by words; its reference stays whole")
    files = (("diffusion_models", QWEN_EDIT), ("text_encoders", QWEN_TEXT), ("vae", QWEN_VAE))
    graph.note(
        f"""## Editing a picture with Qwen-Image-Edit and ToMe

{_get(*files)}

### First
Load a picture of yours and say in the prompt what is to change. *Upscale Image* cuts it to 1024 x 1024; set **width**
and **height** to its shape, or one of them to 0.

### What ToMe does here
The new picture, the picture to change and the prompt attend to one another: 4,096 tokens of each picture.
ToMe keeps some of the keys and values of the new picture. **The reference and the prompt stay whole**, so nothing of
what is to be kept is lost. For that reason the gain is smaller than without a reference.

### Try
- **width** and **height** 1408: the gain grows with the size.
{_start()}
- Bypass the node (Ctrl+B) and queue again: the same seed without ToMe.
- A second reference: **image2** of both prompts.""",
        440,
    )
    graph.column("Model")
    model = graph.add("UNETLoader", unet_name=_file(QWEN_EDIT), weight_dtype="default", models=files[:1], at=(0, 1))
    text = graph.add(
        "CLIPLoader", clip_name=_file(QWEN_TEXT), type="qwen_image", device="default", models=files[1:2], at=(0, 0)
    )
    picture = graph.add("VAELoader", vae_name=_file(QWEN_VAE), models=files[2:])
    graph.column("Picture to change")
    loaded = graph.add("LoadImage", "Picture to change", image="example.png", upload="image")
    scaled = graph.add(
        "ImageScale", image=loaded["IMAGE"], upscale_method="lanczos", width=1024, height=1024, crop="center",
        at=(0, 2),
    )  # fmt: skip
    latent = graph.add("VAEEncode", pixels=scaled["IMAGE"], vae=picture["VAE"], at=(1, 2))
    tome = _tome(graph, model["MODEL"], (1, 1))
    shifted = graph.add("ModelSamplingAuraFlow", model=tome["MODEL"], shift=3.0)
    normed = graph.add("CFGNorm", model=shifted["MODEL"], strength=1.0)
    graph.column("Prompt")
    prompts = [
        graph.add(
            "TextEncodeQwenImageEditPlus", title, clip=text["CLIP"], image1=scaled["IMAGE"], prompt=words, at=at,
        )["CONDITIONING"]
        for title, words, at in (
            ("Prompt", "make it a winter evening with snow and lights in the windows, keep everything else", (1, 0)),
            ("Negative prompt", "", None),
        )
    ]  # fmt: skip
    graph.column("Reference")
    positive, negative = (
        graph.add("ReferenceLatent", title, conditioning=prompt, latent=latent["LATENT"], at=at)["CONDITIONING"]
        for title, prompt, at in (("Reference", prompts[0], (2, 0)), ("Reference, negative", prompts[1], None))
    )
    graph.column("Sample")
    sampler = graph.add(
        "KSampler", model=normed["patched_model"], positive=positive, negative=negative, latent_image=latent["LATENT"],
        seed=7, steps=20, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0, at=(3, 1),
    )  # fmt: skip
    graph.column("Picture")
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=picture["VAE"], at=(4, 1))
    graph.add("SaveImage", images=decoded["IMAGE"], filename_prefix="ToMe/qwen_edit", at=(4, 2))
    return graph


EXAMPLES: tuple[Callable[[], Graph], ...] = (
    sd15_text_to_image, compare, sdxl_hires, inpaint, flux, wan_video, wan22_video, ltx2_video, qwen_image_edit,
)  # fmt: skip
