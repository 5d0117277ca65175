"""Normalizing flows: images to latents and back, on disk and over data sets."""
