"""Starts interpreted_attend.py."""

from .interpreter import suite

test_interpreted_attend = suite("interpreted_attend.py")
