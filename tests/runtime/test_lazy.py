"""Names of a package that are imported when they are first used."""

from __future__ import annotations

import fractions
import sys
from types import ModuleType

import pytest

from hpr.runtime.lazy import lazy_names

PACKAGE = "package_with_lazy_names"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(PACKAGE)
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    get, names = lazy_names(PACKAGE, {"Fraction": "fractions"}, {"rationals": "fractions"})
    vars(module).update(__getattr__=get, __dir__=names)
    return module


def test_a_name_is_imported_once_and_then_belongs_to_the_package(package: ModuleType) -> None:
    assert "Fraction" not in vars(package)
    assert package.Fraction is fractions.Fraction
    assert vars(package)["Fraction"] is fractions.Fraction


def test_a_module_has_the_name_of_the_table(package: ModuleType) -> None:
    assert package.rationals is fractions


def test_names_are_listed_before_they_are_used(package: ModuleType) -> None:
    assert {"Fraction", "rationals"} <= set(dir(package))


def test_any_other_name_raises_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{PACKAGE}' has no attribute 'Decimal'"):
        package.Decimal  # noqa: B018
