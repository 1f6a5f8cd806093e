"""What ComfyUI lists in comfy/supported_models.py, and the diffusion model behind each.

`COMFYUI_DIR=... python -m tests.comfyui.listed` writes lab/results/comfyui-models.csv anew, from the root of this
repository.
"""

from __future__ import annotations

from collections import defaultdict
from unittest import mock

from . import host


class _Found(Exception):
    pass


def listed() -> dict[str, str]:
    """The diffusion model's class, below comfy.ldm, of each supported model by its name. ComfyUI must have started."""
    import comfy.model_base
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    def stop(self, model_config, model_type=None, device=None, unet_model=UNetModel):
        raise _Found(f"{unet_model.__module__}.{unet_model.__qualname__}".removeprefix("comfy.ldm."))

    found = {}
    with mock.patch.object(comfy.model_base.BaseModel, "__init__", stop):
        for kind in comfy.supported_models.models:
            try:
                # Some look into their sizes or the checkpoint first, for what leaves the class as it is.
                kind(defaultdict(int, kind.unet_config)).get_model(defaultdict(lambda: None), "")
            except _Found as error:
                found[kind.__name__] = str(error)
    return found


def version() -> str:
    import comfyui_version

    return comfyui_version.__version__


def main() -> None:
    host.start()
    from lab.pages.option_tables import LISTED

    rows = [f"{version()},{supported},{diffusion}\n" for supported, diffusion in listed().items()]
    LISTED.write_text("".join(("comfyui,supported,diffusion\n", *rows)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
