"""Anatomy describes a model: its stacks, layers and sites, its symmetries, which modules can be replaced, and what is left over."""
