"""Weights to integers in the metric of their damage, with one step size for the whole model."""
