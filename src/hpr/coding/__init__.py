"""Integers to bytes and back, by their entropy; it knows nothing of models."""
