"""The options of a plan, besides its budget."""

from __future__ import annotations

from dataclasses import dataclass

from hpr.errors import BudgetError, PlanError, check_kind, check_settings
from hpr.plans.budget import byte_limit
from hpr.plans.rounding import check_bits
from hpr.runtime.seeds import check_seed
from hpr.timing.target import FLOPS, LATENCY, Target

LONGEST_GROUP = 3  # the most neighbouring layers in one group; whole stacks are candidates too


@dataclass(frozen=True)
class PlanOptions:
    """Options of ``hpr.plan`` and ``hpr.compress``. Frozen; make a changed copy with ``dataclasses.replace``.

    ``only``: shell patterns of site names, separated by commas; other sites stay as they are, and a percentage then counts
    the selected weights alone. ``operators``: names of the operators to consider, ``low rank`` or ``low-rank``; *keep* is
    always among them, None means all.
    ``align``: also plan with aligned layers; None means only if measurements at a few layers promise a gain.
    ``longest_group``: the largest number of neighbouring layers in one group.
    ``bytes``: for budgets in parameters: the size of the file, such as ``6MB``. The factors are then rounded and coded.
    ``bits``: if codes are stored: 8 or 4 keep every code in the range of such integers (−127 to 127, −7 to 7), for runtimes
    that compute with them; None lets codes be as large as they come.

    The rest is for ``hpr.compress``: ``plans``: how many plans to run end to end before one is chosen; ``refit``: fit private
    factors again to what the smaller layers emit, None means if it measures better on the user's own data; ``reuse``: also try
    plans that drop layers or reuse attention; ``routers``: experts per router, 0 for static weights; ``curve``: also plan and
    measure other budgets, for the report's figure of quality against size; ``examples``: texts to profile; ``seed``.

    >>> hpr.PlanOptions(only="encoder.*", operators=("low rank", "shared input basis")).plans
    4
    """

    only: str | None = None
    operators: tuple[str, ...] | None = None
    align: bool | None = None
    longest_group: int = LONGEST_GROUP
    plans: int = 4
    refit: bool | None = None
    reuse: bool = False
    routers: int = 0
    curve: bool = False
    examples: int = 4096
    seed: int = 0
    bits: int | None = None
    bytes: str | None = None
    latency: str | None = None
    flops: str | None = None
    shape: str = "1x128"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_settings(self)
        if self.operators is not None:
            object.__setattr__(self, "operators", tuple(self.operators))
            for name in self.operators:
                check_kind("one of the operators", name, str, "names of operators, such as 'low rank'")
        for name, least in (("longest_group", 1), ("plans", 1), ("examples", 1), ("routers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise PlanError(f"{name} is {value!r}: give a whole number from {least} up")
        if self.routers == 1:
            raise PlanError("routers is 1, but a router chooses between experts: give 2 or more, or 0 for none")
        if self.routers and self.bytes is not None:
            raise PlanError(
                f"routers is {self.routers} and bytes is {self.bytes}: weights that follow the input are not rounded. Set "
                f"one of them"
            )
        if self.routers and self.reuse:
            raise PlanError(
                f"routers is {self.routers} and reuse is on: plans that reuse layers cannot be routed. Set one of them"
            )

        if self.latency is not None and self.flops is not None:
            raise PlanError(f"latency is {self.latency} and flops is {self.flops}: set one of them")
        Target(LATENCY, "1x", self.shape)  # raises for a wrong shape
        if (target := self.target) is not None and self.routers:
            raise PlanError(
                f"routers is {self.routers} and {target.kind} is {target.text}: routers are not counted. Set one of them"
            )

    @property
    def target(self) -> Target | None:
        """What ``latency`` or ``flops`` asks for, None without them. Raises ``BudgetError`` for texts that are no share."""
        if self.latency is not None:
            return Target(LATENCY, self.latency, self.shape)
        return None if self.flops is None else Target(FLOPS, self.flops, self.shape)

    def file_limit(self, budget: str, model_bytes: int) -> int | None:
        """The bytes that ``bytes`` allows beside a budget in parameters, None if nothing is rounded.

        ``model_bytes``: the size of the original checkpoint. Raises ``BudgetError`` for ``bytes`` that are no size, and for
        ``bits`` without them.
        """
        if self.bytes is not None:
            limit = byte_limit(self.bytes, model_bytes)
            if limit is None:
                raise BudgetError(f"bytes is {self.bytes!r}, which is no size: give one such as 6MB or 10%bytes")
            return limit
        if self.bits is not None:
            raise BudgetError(
                f"bits is {self.bits}, but a budget in parameters ({budget}) rounds nothing: leave bits out, give a budget in "
                f"bytes, such as 8MB, or the bytes of the file as well"
            )
        return None


DEFAULTS = PlanOptions()
