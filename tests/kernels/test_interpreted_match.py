"""Starts interpreted_match.py."""

from .interpreter import suite

test_interpreted_match = suite("interpreted_match.py")
