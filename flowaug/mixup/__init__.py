"""Same-label mixup: plans, mixing of latents, the transform, offline copies."""
