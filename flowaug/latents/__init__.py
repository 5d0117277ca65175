"""The latent space and its classes: moments, Gaussians, principal components, estimators."""
