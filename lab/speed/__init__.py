"""Benchmarks that count the whole cost. Run as modules: `python -m lab.speed.layer --help`."""
