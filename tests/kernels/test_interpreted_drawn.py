"""Starts interpreted_drawn.py."""

from .interpreter import suite

test_interpreted_drawn = suite("interpreted_drawn.py")
