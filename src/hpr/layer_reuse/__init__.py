"""Layers that are dropped, or that reuse the attention of a layer below. Optional."""
