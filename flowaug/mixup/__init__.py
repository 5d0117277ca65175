"""Same-label mixup in the latent space of a flow: random plans, mixing, the batch transform and offline copies."""
