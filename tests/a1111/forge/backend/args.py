"""What Forge Neo keeps beside a call."""

from __future__ import annotations


class dynamic_args:
    ref_latents: list = []
