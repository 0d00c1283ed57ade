"""Checkpoints opens models, saves and loads compressed ones, and registers the hook by which transformers loads them."""
