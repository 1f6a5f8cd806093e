"""ToMe in ComfyUI."""

from .nodes import NODES

__all__ = ["NODES"]
