"""PLAN: from a model and its profile to a draft, and from a draft to a plan; presets and rules."""
