"""Timing says what each weight of a model costs in one call, whole and as a product of factors: milliseconds, or operations."""
