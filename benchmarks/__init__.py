"""Benchmarks that count the whole cost. Run as modules: `python -m benchmarks.layer --help`."""
