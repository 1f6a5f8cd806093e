"""The demo model's node. Registered only when the environment variable TOME_DEMO is 1."""

from __future__ import annotations

from comfy_api.latest import io

from . import model as demo


class ToMeDemoModel(io.ComfyNode):
    """All that a KSampler needs, from the small model in this folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = demo.class_names()
        return io.Schema(
            node_id="ToMeDemoModel",
            display_name="ToMe Demo Model",
            category="ToMe/demo",
            description="A small model that paints 64x64 pictures, to try ToMe on without a checkpoint. "
            "Sample with euler, the simple scheduler, 20 to 30 steps and cfg 3.",
            inputs=[
                io.Combo.Input("subject", options=names, default=names[0], tooltip="What to paint."),
                io.Int.Input(
                    "size",
                    default=demo.SIZE,
                    min=demo.SIZE_RANGE[0],
                    max=demo.SIZE_RANGE[1],
                    step=demo.SIZE_STEP,
                    tooltip="Pixels a side. Trained at 64 (4,096 tokens); other sizes run but look odd.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures at once."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive", tooltip="The subject."),
                io.Conditioning.Output(display_name="negative", tooltip="Any subject: the other end of cfg."),
                io.Vae.Output(display_name="vae"),
                io.Latent.Output(display_name="latent", tooltip="Empty: zeros, 3 channels."),
            ],
        )

    @classmethod
    def execute(cls, subject: str, size: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(
            demo.load_model(),
            demo.conditioning(subject),
            demo.conditioning(None),
            demo.load_vae(),
            demo.empty_latent(size, batch_size),
        )


NODES: list[type[io.ComfyNode]] = [ToMeDemoModel]
