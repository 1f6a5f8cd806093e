"""Starts interpreted.py."""

from .interpreter import suite

test_interpreted = suite("interpreted.py")
