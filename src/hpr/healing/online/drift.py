"""Whether what comes in is still of the kind that came before: a cumulative sum of how far its loss lies above the usual."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM = 8  # batches that say what is usual
MEMORY = 0.05  # the weight of the newest batch in that, later on
SLACK = 0.5  # standard deviations above the usual that do not count
ALARM = 6.0  # the sum from which on it is drift


@dataclass
class Drift:
    """One-sided CUSUM (Page 1954) on logarithms of losses, in standard deviations of what is usual.

    After an alarm the next batches say anew what is usual. All numbers are in the fields, so that they can be saved.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    total: float = 0.0

    def __call__(self, loss: float) -> bool:
        """Take in the loss of a new batch, above 0, before it was learnt from; whether drift is found just now."""
        value = math.log(max(loss, 1e-12))
        self.count += 1
        weight = max(1 / self.count, MEMORY)
        distance = value - self.mean
        if self.count > WARM:
            spread = max(math.sqrt(self.variance), 0.02)  # a hundredth is never drift
            self.total = max(0.0, self.total + distance / spread - SLACK)
            if self.total > ALARM:
                self.count, self.mean, self.variance, self.total = 1, value, 0.0, 0.0
                return True
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)
        return False
