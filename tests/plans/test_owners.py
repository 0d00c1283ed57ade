"""Who uses a factor, and which sites hang together."""

from hpr.plans.owners import connected, owners
from hpr.plans.terms import Route, Term

TERMS = {
    "a": (Term("basis", "own a", 2),),
    "b": (Term("alone", row_scale="scale"),),
    "c": (Term("base"), Term("basis", "own c", 2), Term("base", column_scale="scale c")),
    "kept": (),
    "d": (Term("base"),),
    "e": (Term("u", "v", 2, route=Route("router", 2)),),
    "f": (Term("w", route=Route("router", 2, expert=0)),),
}


def test_each_user_of_a_factor_is_named_once_and_in_order() -> None:
    found = owners(TERMS)
    assert found["basis"] == ["a", "c"]
    assert found["base"] == ["c", "d"]
    assert found["alone"] == found["scale"] == ["b"]
    assert "router" not in found


def test_sites_hang_together_through_others_and_not_through_routers() -> None:
    assert connected(TERMS) == [["a", "c", "d"], ["b"], ["e"], ["f"]]
    assert connected({"a": (Term("x"),), "b": (Term("y"),), "c": (Term("y"), Term("x"))}) == [["a", "b", "c"]]
