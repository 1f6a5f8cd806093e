"""Models to measure on: small ones that are trained here, and full-size ones with random weights."""
