"""Class statistics of the latent space: moments, Gaussians, principal components and their estimators."""
