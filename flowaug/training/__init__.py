"""The two trainings, and what they share."""
