"""The registry of operators: one entry for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators import base_block_private, keep, kept_rows, low_rank, shared_basis, tie, tie_delta, vocab_segments
from hpr.operators.metric import Measured
from hpr.plans.terms import KEEP, Term
from hpr.solver.candidates import Candidate

Terms = Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True)
class Operator:
    """``shared``: for groups of two or more sites; else for single ones. ``candidate`` gives None where it does not apply.

    ``alike``: one matrix stands for several, so it is hopeless where these have nothing in common (see ``tie.alike``).
    """

    shared: bool
    candidate: Callable[[Sequence[Measured]], Candidate | None]
    terms: Callable[[Sequence[Site], tuple[int, ...]], dict[str, tuple[Term, ...]]]
    fit: Callable[[Sequence[Measured], Terms], dict[str, Tensor]]
    alike: bool = False


OPERATORS: dict[str, Operator] = {
    KEEP: Operator(False, keep.candidate, keep.terms, keep.fit),
    low_rank.NAME: Operator(False, low_rank.candidate, low_rank.terms, low_rank.fit),
    tie.TIE: Operator(True, tie.candidate, tie.terms, tie.fit, alike=True),
    tie.SCALE: Operator(True, tie.scale_candidate, tie.scale_terms, tie.scale_fit, alike=True),
    tie_delta.NAME: Operator(True, tie_delta.candidate, tie_delta.terms, tie_delta.fit, alike=True),
    shared_basis.INPUT: Operator(True, shared_basis.input_candidate, shared_basis.input_terms, shared_basis.input_fit),
    shared_basis.OUTPUT: Operator(True, shared_basis.output_candidate, shared_basis.output_terms, shared_basis.output_fit),
    base_block_private.NAME: Operator(
        True, base_block_private.candidate, base_block_private.terms, base_block_private.fit, alike=True
    ),
}
FITS = {name: operator.fit for name, operator in OPERATORS.items()} | {
    vocab_segments.NAME: vocab_segments.fit,
    kept_rows.NAME: kept_rows.fit,
}
