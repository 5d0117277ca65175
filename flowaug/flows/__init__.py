"""Normalizing flows: bijections, architectures, checkpoints and passes over a data set."""
