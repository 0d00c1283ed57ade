"""Drift detection: has the stream become harder? A cumulative sum of how far losses lie above the usual loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM = 8  # batches that define the usual loss
MEMORY = 0.05  # the weight of the newest batch in the usual loss, after those
SLACK = 0.5  # standard deviations above the usual loss that do not count
ALARM = 6.0  # a larger sum is drift


@dataclass
class Drift:
    """One-sided CUSUM (Page 1954) on logarithms of losses, in standard deviations of the usual loss.

    After an alarm the next batches define the usual loss again. All numbers are fields, so that they can be saved.

    >>> drift = Drift()
    >>> any([drift(1.0) for _ in range(20)])
    False
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    total: float = 0.0

    def __call__(self, loss: float) -> bool:
        """Add the loss (above 0) that a new batch had before the student learnt from it. Return whether there is drift now."""
        value = math.log(max(loss, 1e-12))
        self.count += 1
        weight = max(1 / self.count, MEMORY)
        distance = value - self.mean
        if self.count > WARM:
            spread = max(math.sqrt(self.variance), 0.02)  # a change of a hundredth is never drift
            self.total = max(0.0, self.total + distance / spread - SLACK)
            if self.total > ALARM:
                self.count, self.mean, self.variance, self.total = 1, value, 0.0, 0.0
                return True
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)
        return False
