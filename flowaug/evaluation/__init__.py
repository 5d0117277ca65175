"""Evaluation of flows and augmented images: metrics, reference classifiers, pictures, reports and exports."""
