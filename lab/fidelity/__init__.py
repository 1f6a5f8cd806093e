"""Trains a small latent-free diffusion model and measures what merging tokens does to its pictures."""
