"""All operators by name, in the order in which the planner tries them. A new operator is one file and one entry here."""

from __future__ import annotations

from hpr.operators import base_block_private, keep, kept_rows, low_rank, shared_basis, tie, tie_delta, vocab_segments
from hpr.operators.operator import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        keep.OPERATOR,
        low_rank.OPERATOR,
        tie.OPERATOR,
        tie.SCALED_OPERATOR,
        tie_delta.OPERATOR,
        shared_basis.INPUT_OPERATOR,
        shared_basis.OUTPUT_OPERATOR,
        base_block_private.OPERATOR,
        vocab_segments.OPERATOR,
        kept_rows.OPERATOR,
    )
}


def plannable() -> tuple[str, ...]:
    """The names of the operators that the planner may choose. Users may pass these names to the planner."""
    return tuple(name for name, operator in OPERATORS.items() if not operator.needs_layer_state)
