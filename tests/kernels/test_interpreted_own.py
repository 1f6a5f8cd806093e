"""Starts interpreted_own.py."""

from .interpreter import suite

test_interpreted_own = suite("interpreted_own.py")
