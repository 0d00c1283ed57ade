"""From terms to a matrix, against sums written out."""

import pytest
import torch

from hpr.errors import HprError, PlanError
from hpr.plans.product import component_weights, fixed_weights, product
from hpr.plans.terms import Route, Term

DRAW = torch.Generator().manual_seed(0)
VALUES = {
    name: torch.randn(*shape, generator=DRAW, dtype=torch.float64)
    for name, shape in {
        "w": (5, 4),
        "u": (5, 3),
        "v": (3, 4),
        "part": (2, 4),
        "r": (1, 5),
        "c": (1, 4),
        "router": (3, 1),
    }.items()
}


def test_terms_add_up_with_their_scales_and_rows() -> None:
    terms = [Term("w", row_scale="r"), Term("u", "v", 3, column_scale="c"), Term("part", rows=(1, 3))]
    expected = torch.diag(VALUES["r"][0]) @ VALUES["w"] + VALUES["u"] @ VALUES["v"] @ torch.diag(VALUES["c"][0])
    expected[1:3] += VALUES["part"]
    torch.testing.assert_close(product(terms, VALUES, 5, 4), expected)
    assert product([Term("part", rows=(1, 3))], VALUES, 5, 4)[[0, 3, 4]].abs().sum() == 0


def test_no_value_is_changed_and_gradients_flow() -> None:
    u, v = (VALUES[name].clone().requires_grad_() for name in "uv")
    product([Term("u", "v", 3), Term("u", "v", 3)], {"u": u, "v": v}, 5, 4).sum().backward()
    torch.testing.assert_close(u.grad, 2 * VALUES["v"].sum(1).expand(5, 3))
    torch.testing.assert_close(u.detach(), VALUES["u"])


def test_a_fixed_route_weighs_components_if_its_router_is_given() -> None:
    term = Term("u", "v", 3, route=Route("router", 3, "fixed"))
    alpha = 3 * VALUES["router"][:, 0].softmax(0)
    torch.testing.assert_close(product([term], VALUES, 5, 4), VALUES["u"] @ torch.diag(alpha) @ VALUES["v"])
    without = {name: value for name, value in VALUES.items() if name != "router"}
    torch.testing.assert_close(product([term], without, 5, 4), VALUES["u"] @ VALUES["v"])
    assert component_weights(alpha, term.route, 3).shape == (3,)


def test_a_route_that_depends_on_the_input_gives_no_matrix() -> None:
    route = Route("router", 3)
    with pytest.raises(HprError, match=r"depends on the input: use hpr\.extras\.collapse"):
        product([Term("u", "v", 3, route=route)], VALUES, 5, 4)
    with pytest.raises(HprError, match="depends on the input"):
        fixed_weights(route, VALUES["router"])


def test_a_term_with_neither_rank_nor_expert_has_no_component_to_weigh() -> None:
    with pytest.raises(PlanError, match="the route to router names no expert and its term has no rank"):
        component_weights(torch.ones(3), Route("router", 3), None)
