"""Starts interpreted_multires.py."""

from .interpreter import suite

test_interpreted_multires = suite("interpreted_multires.py")
