"""Metrics, pictures and reports about flows and augmented images."""
