"""The one error a caller is meant to catch: it names the value, the limit and the mend."""

from __future__ import annotations


class HprError(ValueError):
    """Bad input: a plan that does not fit, an impossible budget, empty or non-finite data, a damaged artifact."""
