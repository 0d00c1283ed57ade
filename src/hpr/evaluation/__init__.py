"""What a compressed model is worth and what it costs, beside the original."""

from hpr.evaluation.summary import evaluate

__all__ = ["evaluate"]
