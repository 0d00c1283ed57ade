"""Every family of docs/families.md keeps every promise there, on tiny random models."""

import pytest

import families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_keeps_every_promise(name: str) -> None:
    row = families.check(families.FAMILIES[name])
    assert {key: row[key] for key in families.COLUMNS if row[key] is False} == {}
    assert row["shared"] > 0
