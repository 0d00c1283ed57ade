"""Optional features by one import, each loaded alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpr import extras


def loaded_by(expression: str) -> set[str]:
    """The modules of hpr that a fresh interpreter has imported after one expression."""
    script = f"import sys, hpr; {expression}; print('\\n'.join(name for name in sys.modules if name.startswith('hpr.')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_a_router_does_not_load_healing() -> None:
    assert not {name for name in loaded_by("hpr.extras.routed") if name.startswith(("hpr.healing", "hpr.pipeline"))}


def test_the_learner_loads_healing() -> None:
    assert "hpr.healing.online.healer" in loaded_by("hpr.extras.OnlineHealer")


def test_the_package_alone_loads_no_feature() -> None:
    features = ("hpr.healing", "hpr.layer_reuse", "hpr.pipeline", "hpr.planning", "hpr.routing", "hpr.nn.multitask")
    assert not {name for name in loaded_by("import hpr.extras") if name.startswith(features)}


@pytest.mark.parametrize("name", extras.__all__)
def test_every_name_has_a_home(name: str) -> None:
    assert getattr(extras, name).__name__ == name
    assert name in dir(extras)


def test_other_names_are_refused() -> None:
    assert set(extras._HOMES) == set(extras.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        extras.nothing  # noqa: B018
