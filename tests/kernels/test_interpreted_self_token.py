"""Starts interpreted_self_token.py."""

from .interpreter import suite

test_interpreted_self_token = suite("interpreted_self_token.py")
