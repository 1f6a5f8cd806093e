"""A workflow from a compact description: nodes in columns, links by name, laid out from left to right.

`Graph.json()` is the format that ComfyUI's page saves and opens (schema 0.4). A node's sockets, widgets and size come
from KINDS; tests compare that table with what a real ComfyUI tells of its nodes.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from shared_tome.changes import version
from shared_tome.config import ToMeConfig

TITLE = 30  # height of a node's title bar, above its position
GAP = 40  # between a node and the next one's title bar
COLUMN_GAP = 90
MARGIN = 20  # of a group around its nodes
GROUP_TITLE = 40
PACK = "comfyui-tome"  # its name in the registry: the page offers it where a node is missing
COMFYUI_VERSION = "0.30.0"
GREEN = {"color": "#232", "bgcolor": "#353"}  # ToMe's nodes
NOTE = {"color": "#432", "bgcolor": "#653"}
ANY = "*"  # the type of a socket that takes every link
CONTROL = "control_after_generate"  # the widget that the page itself adds behind a seed


@dataclass(frozen=True)
class Kind:
    """One node class: sockets and outputs as "name:TYPE", widgets by name, all in the node's order."""

    sockets: tuple[str, ...]
    widgets: tuple[str, ...]
    outputs: tuple[str, ...]
    size: tuple[int, int]


def _kind(sockets: str, widgets: str, outputs: str, size: tuple[int, int]) -> Kind:
    def named(text: str) -> tuple[str, ...]:
        return tuple(x if ":" in x else f"{x}:{x}" for x in text.split())

    return Kind(named(sockets), tuple(widgets.split()), named(outputs), size)


def _with_controls(names: list[str]) -> str:
    return " ".join(f"{name} {CONTROL}" if name in ("seed", "noise_seed") else name for name in names)


_TOME_WIDGETS = ToMeConfig.widgets()

KINDS: dict[str, Kind] = {
    "CheckpointLoaderSimple": _kind("", "ckpt_name", "MODEL CLIP VAE", (340, 100)),
    "UNETLoader": _kind("", "unet_name weight_dtype", "MODEL", (340, 84)),
    "CLIPLoader": _kind("", "clip_name type device", "CLIP", (340, 108)),
    "VAELoader": _kind("", "vae_name", "VAE", (340, 60)),
    "LTXAVTextEncoderLoader": _kind("", "text_encoder ckpt_name device", "CLIP", (340, 108)),
    "LTXVAudioVAELoader": Kind((), ("ckpt_name",), ("Audio VAE:VAE",), (340, 60)),
    "LoadImage": _kind("", "image upload", "IMAGE MASK", (340, 400)),
    "CLIPTextEncode": _kind("clip:CLIP", "text", "CONDITIONING", (400, 170)),
    "TextEncodeQwenImageEditPlus": _kind("clip:CLIP image1:IMAGE", "prompt", "CONDITIONING", (400, 240)),
    "ReferenceLatent": _kind("conditioning:CONDITIONING latent:LATENT", "", "CONDITIONING", (400, 50)),
    "LTXVConditioning": _kind(
        "positive:CONDITIONING negative:CONDITIONING", "frame_rate", "positive:CONDITIONING negative:CONDITIONING",
        (400, 84),
    ),
    "FluxGuidance": _kind("conditioning:CONDITIONING", "guidance", "CONDITIONING", (400, 60)),
    "ConditioningZeroOut": _kind("conditioning:CONDITIONING", "", "CONDITIONING", (400, 30)),
    "InpaintModelConditioning": _kind(
        "positive:CONDITIONING negative:CONDITIONING vae:VAE pixels:IMAGE mask:MASK", "noise_mask",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT", (340, 140),
    ),
    "EmptyLatentImage": _kind("", "width height batch_size", "LATENT", (340, 108)),
    "EmptySD3LatentImage": _kind("", "width height batch_size", "LATENT", (340, 108)),
    "EmptyHunyuanLatentVideo": _kind("", "width height length batch_size", "LATENT", (340, 132)),
    "EmptyLTXVLatentVideo": _kind("", "width height length batch_size", "LATENT", (340, 132)),
    "LTXVEmptyLatentAudio": _kind("audio_vae:VAE", "frames_number frame_rate batch_size", "Latent:LATENT", (340, 108)),
    "LTXVConcatAVLatent": _kind("video_latent:LATENT audio_latent:LATENT", "", "latent:LATENT", (340, 50)),
    "LTXVSeparateAVLatent": _kind("av_latent:LATENT", "", "video_latent:LATENT audio_latent:LATENT", (340, 50)),
    "LatentUpscaleBy": _kind("samples:LATENT", "upscale_method scale_by", "LATENT", (340, 84)),
    "ModelSamplingSD3": _kind("model:MODEL", "shift", "MODEL", (340, 60)),
    "ModelSamplingAuraFlow": _kind("model:MODEL", "shift", "MODEL", (340, 60)),
    "CFGNorm": _kind("model:MODEL", "strength", "patched_model:MODEL", (340, 84)),
    "ToMe": _kind(
        "model:MODEL", " ".join(widget.name for widget in _TOME_WIDGETS), "MODEL",
        (340, 24 * (len(_TOME_WIDGETS) + 2) + 40),
    ),
    "ToMeRecord": _kind("model:MODEL", "", "MODEL record:TOME_RECORD", (340, 50)),
    "ToMeReport": _kind("record:TOME_RECORD after:*", "measure_time sampling", "text:STRING json:STRING", (420, 520)),
    "ToMeMap": _kind(
        "record:TOME_RECORD image:IMAGE", "show level layer step opacity picture legend sampling", "map:IMAGE",
        (420, 320),
    ),
    "ToMeCompare": _kind(
        "image:IMAGE other:IMAGE", "factor", "difference:IMAGE text:STRING PSNR:FLOAT SSIM:FLOAT", (420, 250)
    ),
    "KSampler": _kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        _with_controls(["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"]), "LATENT", (340, 480),
    ),
    "KSamplerAdvanced": _kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "add_noise " + _with_controls(["noise_seed", "steps", "cfg", "sampler_name", "scheduler"])
        + " start_at_step end_at_step return_with_leftover_noise", "LATENT", (340, 340),
    ),
    "RandomNoise": _kind("", _with_controls(["noise_seed"]), "NOISE", (340, 84)),
    "KSamplerSelect": _kind("", "sampler_name", "SAMPLER", (340, 60)),
    "LTXVScheduler": _kind("latent:LATENT", "steps max_shift base_shift stretch terminal", "SIGMAS", (340, 156)),
    "CFGGuider": _kind("model:MODEL positive:CONDITIONING negative:CONDITIONING", "cfg", "GUIDER", (340, 100)),
    "SamplerCustomAdvanced": _kind(
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT", "",
        "output:LATENT denoised_output:LATENT", (340, 130),
    ),
    "VAEEncode": _kind("pixels:IMAGE vae:VAE", "", "LATENT", (340, 50)),
    "VAEDecode": _kind("samples:LATENT vae:VAE", "", "IMAGE", (340, 50)),
    "LTXVAudioVAEDecode": _kind("samples:LATENT audio_vae:VAE", "", "Audio:AUDIO", (340, 50)),
    "ImageScale": _kind("image:IMAGE", "upscale_method width height crop", "IMAGE", (340, 132)),
    "PreviewImage": _kind("images:IMAGE", "", "images:IMAGE", (400, 420)),
    "SaveImage": _kind("images:IMAGE", "filename_prefix", "images:IMAGE", (400, 460)),
    "ImageStitch": _kind(
        "image1:IMAGE image2:IMAGE", "direction match_image_size spacing_width spacing_color", "IMAGE", (340, 154)
    ),
    "CreateVideo": _kind("images:IMAGE audio:AUDIO", "fps", "VIDEO", (340, 106)),
    "SaveVideo": _kind("video:VIDEO", "filename_prefix format codec", "video:VIDEO", (400, 110)),
    "MarkdownNote": _kind("", "", "", (420, 300)),
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """An output that another node's socket is linked to."""

    node: Node
    slot: int


@dataclass(eq=False)
class Node:
    """One node; `node["MODEL"]` is its output of that name."""

    id: int
    type: str
    title: str | None
    values: list[Any]
    size: tuple[int, int]
    properties: dict[str, Any]
    colors: dict[str, str]
    links: dict[int, Output] = field(default_factory=dict)  # by socket
    pos: tuple[int, int] = (0, 0)
    at: tuple[float, float] | None = None

    def __getitem__(self, name: str) -> Output:
        names = [output.split(":")[0] for output in KINDS[self.type].outputs]
        return Output(self, names.index(name))


class Graph:
    """A workflow in the making. Nodes go into the column opened last; each column is a group with a title.

    name: of the file. title, summary: what its picture says.
    """

    def __init__(self, name: str, title: str, summary: str) -> None:
        self.name, self.title, self.summary = name, title, summary
        self.nodes: list[Node] = []
        self.columns: list[tuple[str, list[Node], str]] = []

    def column(self, title: str, color: str = "#3f789e") -> None:
        self.columns.append((title, [], color))

    def note(self, text: str, height: int) -> None:
        """A column of its own with a note in Markdown."""
        self.column("Read me", "#b06634")
        node = self._place("MarkdownNote", "How it works", [text], NOTE)
        node.size = (node.size[0], height)

    def add(
        self,
        type: str,
        title: str | None = None,
        /,
        *,
        models: tuple[tuple[str, str], ...] = (),
        size: tuple[int, int] | None = None,
        at: tuple[float, float] | None = None,
        **inputs: Any,
    ) -> Node:
        """A node with a value for each of its widgets and an Output for its sockets.

        models: (folder below models, URL) of each file that it loads; the page offers those that are missing.
        size: where that of its class is not right. at: column and row in the picture, None: not shown there.
        """
        kind = KINDS[type]
        if type == "ToMe":
            inputs = {**{widget.name: widget.default for widget in _TOME_WIDGETS}, **inputs}
        if CONTROL in kind.widgets:
            inputs.setdefault(CONTROL, "fixed")
        node = self._place(
            type, title, [inputs.pop(name) for name in kind.widgets], GREEN if type.startswith("ToMe") else {}
        )
        node.at = at
        if size is not None:
            node.size = size
        for slot, socket in enumerate(kind.sockets):
            name, _, wanted = socket.partition(":")
            link = inputs.pop(name, None)
            if link is None:
                continue
            given = KINDS[link.node.type].outputs[link.slot].split(":")[1]
            assert wanted in (given, ANY), f"{type}.{name} wants {wanted}, got {given} of {link.node.type}"
            node.links[slot] = link
        assert not inputs, f"{type} has no {', '.join(inputs)}"
        if models:
            node.properties["models"] = [
                {"name": url.rsplit("/", 1)[1], "url": url, "directory": folder} for folder, url in models
            ]
        return node

    def _place(self, type: str, title: str | None, values: list[Any], colors: dict[str, str]) -> Node:
        properties = {"Node name for S&R": type}
        if type.startswith("ToMe"):
            properties["cnr_id"] = PACK
            if type == "ToMe":
                properties["tome_version"] = version()
        elif type != "MarkdownNote":
            properties |= {"cnr_id": "comfy-core", "ver": COMFYUI_VERSION}
        node = Node(len(self.nodes) + 1, type, title, values, KINDS[type].size, properties, colors)
        self.nodes.append(node)
        self.columns[-1][1].append(node)
        return node

    def _lay_out(self) -> list[dict[str, Any]]:
        """Give each node its place; the columns' groups."""
        x, groups = 0, []
        for title, nodes, color in self.columns:
            y = 0
            for node in nodes:
                node.pos = (x, y)
                y += node.size[1] + TITLE + GAP
            width = max(node.size[0] for node in nodes)
            top = -TITLE - GROUP_TITLE
            bounding = [x - MARGIN, top, width + 2 * MARGIN, y - TITLE - GAP + MARGIN - top]
            groups.append(
                {"id": len(groups) + 1, "title": title, "bounding": bounding, "color": color, "font_size": 24,
                 "flags": {}}
            )  # fmt: skip
            x += width + COLUMN_GAP
        return groups

    def json(self) -> dict[str, Any]:
        """What the page saves as a file."""
        groups = self._lay_out()
        links = [
            [0, source.node.id, source.slot, node.id, slot, KINDS[source.node.type].outputs[source.slot].split(":")[1]]
            for node in self.nodes
            for slot, source in node.links.items()
        ]
        for number, link in enumerate(links, start=1):
            link[0] = number
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [_node_json(node, order, links) for order, node in enumerate(self.nodes)],
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [80, 160]}},
            "version": 0.4,
        }


def _node_json(node: Node, order: int, links: list[list[Any]]) -> dict[str, Any]:
    kind = KINDS[node.type]
    into = {(link[3], link[4]): link[0] for link in links}
    inputs = [socket.split(":") for socket in kind.sockets]
    outputs = [output.split(":") for output in kind.outputs]
    return {
        "id": node.id,
        "type": node.type,
        "pos": list(node.pos),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {"name": name, "type": type, "link": into.get((node.id, slot))} for slot, (name, type) in enumerate(inputs)
        ],
        "outputs": [
            {"name": name, "type": type, "slot_index": slot,
             "links": [link[0] for link in links if link[1:3] == [node.id, slot]] or None}
            for slot, (name, type) in enumerate(outputs)
        ],
        **({} if node.title is None else {"title": node.title}),
        "properties": node.properties,
        "widgets_values": node.values,
        **node.colors,
    }  # fmt: skip
