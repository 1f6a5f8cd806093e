"""The picture of a workflow that ComfyUI's template browser shows: its title, its main nodes and their links."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .graph import KINDS, Graph, Node, Output

SIZE = (512, 512)  # the browser shows a square
FINE = 3  # drawn larger and made smaller, as Pillow's lines are not smooth
EDGE, TOP, BAR = 14, 90, 84
BOX_HEIGHT, GAP, ROW = 62, 18, 112
COLORS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9", "IMAGE": "#64b5f6",
    "MASK": "#81c784", "VIDEO": "#64b5f6", "AUDIO": "#c9b37e", "NOISE": "#b0b0b0", "GUIDER": "#66ffff",
    "SAMPLER": "#ecb4b4", "SIGMAS": "#cdffcd",
}  # fmt: skip
LABELS = {
    "CheckpointLoaderSimple": "Checkpoint", "UNETLoader": "Model", "CLIPLoader": "Text encoder",
    "LoadImage": "Picture and mask", "CLIPTextEncode": "Prompt", "FluxGuidance": "Guidance", "ToMe": "ToMe",
    "InpaintModelConditioning": "Inpaint", "EmptyLatentImage": "Size", "EmptySD3LatentImage": "Size",
    "EmptyHunyuanLatentVideo": "Size and length", "LatentUpscaleBy": "Upscale", "ModelSamplingSD3": "Shift",
    "KSampler": "Sampler", "VAEDecode": "Decode", "SaveImage": "Picture", "ImageStitch": "Side by side",
    "CreateVideo": "Video", "ToMeCompare": "ToMe Compare",
    "LTXAVTextEncoderLoader": "Text encoder", "TextEncodeQwenImageEditPlus": "Prompt",
    "EmptyLTXVLatentVideo": "Size and length", "LTXVConditioning": "Frame rate", "LTXVConcatAVLatent": "Video, sound",
    "SamplerCustomAdvanced": "Sampler", "LTXVSeparateAVLatent": "Video, sound", "ImageScale": "Picture to change",
    "VAEEncode": "Encode",
}  # fmt: skip


def draw(graph: Graph) -> Image.Image:
    """RGB picture of SIZE."""
    image = Image.new("RGB", (SIZE[0] * FINE, SIZE[1] * FINE), "#1b1d22")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, SIZE[0] * FINE, BAR * FINE), fill="#24402c")
    _text(canvas, (EDGE, 12), graph.title, 32, "#ffffff")
    _text(canvas, (EDGE, 54), graph.summary, 16, "#b9e3c4")

    shown = [node for node in graph.nodes if node.at is not None]
    columns, rows = (max(node.at[axis] for node in shown) + 1 for axis in (0, 1))
    pitch = (SIZE[0] - 2 * EDGE) / columns
    width, middle = pitch - GAP, (TOP + SIZE[1]) / 2
    centres = {
        node: (EDGE + (node.at[0] + 0.5) * pitch, middle + (node.at[1] - (rows - 1) / 2) * ROW) for node in shown
    }
    for node in shown:
        for source in node.links.values():
            kind, start = _kind(source), _shown(source)
            if start is not None and kind != "VAE":
                _link(canvas, centres[start], centres[node], width, COLORS[kind])
    for node, centre in centres.items():
        _box(canvas, node, centre, width)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def _kind(output: Output) -> str:
    return KINDS[output.node.type].outputs[output.slot].split(":")[1]


def _shown(output: Output) -> Node | None:
    """The node that an output comes from; for a model, the one before it where that is not in the picture."""
    node = output.node
    if node.at is None and _kind(output) == "MODEL" and node.links:
        return _shown(node.links[0])
    return node if node.at is not None else None


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * FINE)


def _text(canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: float, color: str) -> None:
    canvas.text((place[0] * FINE, place[1] * FINE), text, fill=color, font=_font(size))


def _link(
    canvas: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], width: float, color: str
) -> None:
    """A curve from the right edge of one box to the left edge of the other; straight down within a column."""
    (x, y), (x2, y2) = start, end
    if x == x2:
        points = [(x, y), (x2, y2)]
    else:
        x, x2 = x + width / 2, x2 - width / 2
        bend = max((x2 - x) / 2, 6)
        points = []
        for step in range(33):
            t = step / 32
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            points.append((a * x + b * (x + bend) + c * (x2 - bend) + d * x2, (a + b) * y + (c + d) * y2))
    canvas.line([(px * FINE, py * FINE) for px, py in points], fill=color, width=2 * FINE, joint="curve")


def _box(canvas: ImageDraw.ImageDraw, node: Node, centre: tuple[float, float], width: float) -> None:
    x, y = centre
    tome = node.type == "ToMe"
    corners = [x - width / 2, y - BOX_HEIGHT / 2, x + width / 2, y + BOX_HEIGHT / 2]
    canvas.rounded_rectangle(
        [value * FINE for value in corners], 7 * FINE, fill="#2f8f4e" if tome else "#3a3f4a",
        outline="#a8f0be" if tome else "#596070", width=FINE,
    )  # fmt: skip
    size = 20.0 if tome else 14.0
    lines = _lines(node.title or LABELS[node.type], size, width - 8)
    size = min(size, *(size * (width - 8) * FINE / _font(size).getlength(line) for line in lines))
    for number, line in enumerate(lines):
        middle = (y + (number - (len(lines) - 1) / 2) * (size + 2)) * FINE
        canvas.text((x * FINE, middle), line, fill="#ffffff", font=_font(size), anchor="mm")


def _lines(text: str, size: float, width: float) -> list[str]:
    """The words on as few lines as they need."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _font(size).getlength(joined) <= width * FINE:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines
