"""What a compressed model is worth and what it costs, beside the original."""

from __future__ import annotations

__all__ = ["evaluate"]
