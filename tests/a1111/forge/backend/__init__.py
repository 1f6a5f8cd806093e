"""Forge's `backend` with small transformers of our own: where modules lie, how they call their attention, in which
order tokens come. Compared by hand with the real one (docs/hosts.md).
"""
