"""Evaluation compares a compressed model with its original: divergence, sizes, operations and latency."""

from __future__ import annotations

__all__ = ["evaluate"]
