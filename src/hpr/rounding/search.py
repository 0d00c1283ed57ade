"""Find the step size at which a model takes a given number of bytes, with as few roundings as possible.

A rounding of a large model takes seconds, and so does coding it. The prediction of ``Rates`` therefore gives the first step
and the slope, and the entropy of the codes stands for their coded size; real sizes correct the level of both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpr.coding.codes import Codes, Product
from hpr.coding.record import Coded
from hpr.errors import BudgetError
from hpr.evaluation.cost import coded_bytes
from hpr.plans.rounding import Rounding
from hpr.rounding.model import Rounder
from hpr.rounding.rates import Rates, estimated_bytes

_log = logging.getLogger(__name__)
_CLOSE = 0.997  # of the limit: a step that uses more is searched no further
_LOOSE = 0.05  # how far from the limit a model may be that is only compared with others
_PASSES = 8
_RANGE = 2.0**40  # the coarsest step over the finest: every number is 0 long before
_LARGE = 1 << 22  # numbers from which on sizes are estimated; the codes of smaller models are coded in no time
_FAR = 0.02  # sizes that differ by more give a slope; nearer ones differ by chance, too


@dataclass(frozen=True)
class Rounded:
    """A model's codes by site, ``others`` by name, and how they were rounded.

    ``bytes``: of the whole file, by estimate if ``coded`` is None.
    """

    codes: Mapping[str, Codes | Product]
    others: Mapping[str, Codes]
    rounding: Rounding
    bytes: float
    coded: Mapping[str, Coded] | None = None


@dataclass
class Known:
    """What earlier sizes teach.

    ``level``: bytes of the streams over those estimated from the codes; ``beside``: bytes of the file that are no streams;
    ``lift``: bits of the file over those predicted from the step.
    """

    level: float | None = None
    beside: int = 0
    lift: float = 1.0


def round_to(rounder: Rounder, step: float) -> Rounded:
    """The rounding with a given step; it is not coded yet, and its bytes are not known."""
    codes = rounder.codes(step)
    return Rounded(codes, rounder.others(codes, step), rounder.rounding(step), 0)


def coded(rounder: Rounder, found: Rounded) -> Rounded:
    """The same with its streams, and the bytes of its file."""
    streams = {name: Coded.of(codes) for name, codes in found.codes.items()}
    return replace(found, coded=streams, bytes=coded_bytes(rounder.model, streams, found.others))


class Search:
    """Rounds one model, at steps whose files come ever closer to ``limit`` bytes.

    ``known``: shared by the searches of one model with several dampings. ``start``: a step and about the bytes that its file
    takes, if something is known about that.
    """

    def __init__(self, rounder: Rounder, limit: int, known: Known, start: tuple[float, float] | None = None):
        self.rounder, self.limit, self.known = rounder, limit, known
        self._rates = Rates(rounder.sites)
        self._finest = rounder.finest
        if rounder.bits is not None:  # a finer step would only be made coarser again, row by row
            self._finest = max(
                self._finest, self._rates.step(rounder.bits * self._rates.numbers, self._finest, self._finest * _RANGE)
            )
        self._tried: list[tuple[float, float]] = []  # log step, log bytes
        self._start = start
        self._last: Rounded | None = None
        self._best: Rounded | None = None

    def near(self) -> Rounded:
        """A rounding near the limit, to be compared with others: within 5 % if the model is large, else the best one."""
        if self._rates.numbers < _LARGE:
            return self.best()
        if self._best is not None:
            return self._best
        if self._last is not None and self._is_near(self._last):
            return self._last
        for _ in range(_PASSES):
            found = self._round()
            if self._is_near(found):
                return found
        return self.best()

    def _is_near(self, found: Rounded) -> bool:
        return abs(math.log(found.bytes / self.limit)) < _LOOSE or found.rounding.step == self._finest

    def step_over(self, found: Rounded) -> float:
        """The step that meets the limit, over the one that was used. The damage grows by its square."""
        if found is self._best:
            return 1.0
        return math.exp(self._towards(found.rounding.step, found.bytes) - math.log(found.rounding.step))

    def best(self) -> Rounded:
        """The finest rounding that is found within the limit, coded. Raises ``BudgetError`` if no step meets it."""
        if self._best is None:
            self._best = self._search()
        return self._best

    def _search(self) -> Rounded:
        best: Rounded | None = None
        for _ in range(_PASSES):
            found = (
                self._last if self._last is not None and self._last.coded is None and self._fits(self._last) else self._round()
            )
            if found.coded is None and self._fits(found):
                found = self._code(found)
            if found.coded is not None and found.bytes <= self.limit and (best is None or found.bytes > best.bytes):
                best = found
            if best is not None and (best.bytes >= _CLOSE * self.limit or found.rounding.step == self._finest):
                return best
        if best is None:
            least = min(math.exp(size) for _, size in self._tried) / 1e6
            mend = "give more bytes, or fewer parameters" if self.rounder.rounding(1.0).factors else "give a larger budget"
            raise BudgetError(
                f"a budget of {self.limit / 1e6:.3f} MB cannot be met by rounding, the coarsest model that was tried takes "
                f"{least:.3f} MB: {mend}"
            )
        return best

    def _fits(self, found: Rounded) -> bool:
        return _CLOSE * self.limit <= found.bytes <= self.limit or found.rounding.step == self._finest

    def _round(self) -> Rounded:
        """A rounding at the next step."""
        known = self._start if self._last is None else (self._last.rounding.step, self._last.bytes)
        if known is None:
            bits = 8 * self.limit * (1 + _CLOSE) / 2 / self.known.lift
            step = self._rates.step(bits, self._finest, self._finest * _RANGE)
        else:
            step = min(max(math.exp(self._towards(*known)), self._finest), self._finest * _RANGE)
        found = round_to(self.rounder, step)
        if self.known.level is None or self._rates.numbers < _LARGE:
            return self._code(found)
        return self._note(replace(found, bytes=self.known.beside + self.known.level * estimated_bytes(found.codes)))

    def _code(self, found: Rounded) -> Rounded:
        found = coded(self.rounder, found)
        if self._rates.numbers >= _LARGE:
            streams = sum(len(one.stream) for one in found.coded.values()) if found.coded else 0
            self.known.level = streams / estimated_bytes(found.codes)
            self.known.beside = int(found.bytes) - streams
        return self._note(found)

    def _note(self, found: Rounded) -> Rounded:
        step, size = found.rounding.step, found.bytes
        _log.debug("step %.3g: %.3f MB of %.3f MB", step, found.bytes / 1e6, self.limit / 1e6)
        self.known.lift = 8 * size / self._rates.bits(step)
        self._tried = [one for one in self._tried if one[0] != math.log(step)] + [(math.log(step), math.log(size))]
        self._last = found
        return found

    def _towards(self, step: float, size: float) -> float:
        """The log of the step at which the file meets the limit: by the secant through two sizes, or by the predicted slope."""
        at, log_size = math.log(step), math.log(size)
        slope = self._rates.slope(step)
        before, other = next((one for one in reversed(self._tried) if abs(one[1] - log_size) > _FAR), (at, log_size))
        if abs(before - at) > 1e-9:
            slope = (log_size - other) / (at - before)
        wanted = math.log(self.limit * (1 + _CLOSE) / 2)
        return at + max(-2.0, min(2.0, (wanted - log_size) / min(-0.05, slope)))
