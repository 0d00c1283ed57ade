"""Layers that are dropped, or that reuse the attention of a layer below: an optional feature, loaded only if a plan uses it.

``ablation`` measures what each layer is worth. ``dead_weights`` finds weights without effect. ``reuse`` writes both to a plan.
``install`` changes a model as its plan says. ``attention`` computes attention that reuses that of a layer below.
"""
