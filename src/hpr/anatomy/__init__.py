"""Anatomy describes a model: stacks, layers, sites and symmetries, which modules can be replaced, and what is left over."""
