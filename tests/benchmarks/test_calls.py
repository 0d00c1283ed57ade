"""The counts of expensive calls, on a tiny model."""

from pathlib import Path

import calls
import hpr
from hpr.anatomy import describe as describing
from hpr.checkpoints.open import open_model
from hpr.operators.registry import OPERATORS
from hpr.solver import lagrangian


def test_every_expensive_call_is_counted(tmp_path: Path, folder: Path) -> None:
    before = vars(describing).copy(), vars(lagrangian).copy(), dict(OPERATORS)
    texts = [f"the layer reads a factor {'text ' * (number % 7)}" for number in range(60)]
    with calls.counting() as counted:
        hpr.compress(folder, "80%", data=texts, output=tmp_path / "out")
    assert set(counted.counts) == set(counted.seconds) == {*calls.WATCHED, calls.FITS}
    assert min(counted.counts.values()) > 0
    assert min(counted.seconds.values()) > 0
    assert before == (vars(describing).copy(), vars(lagrangian).copy(), dict(OPERATORS))
    kept = dict(counted.counts)
    hpr.describe(open_model(folder).model)
    assert counted.counts == kept  # nothing is counted after the block


def test_calls_from_every_module_are_counted(folder: Path) -> None:
    model = open_model(folder).model
    with calls.counting() as counted:
        hpr.describe(model)
        describing.describe(model)
    assert counted.counts["describe"] == 2


def test_the_output_folder_is_read_from_the_arguments() -> None:
    for arguments in (["-o", "x"], ["--budget", "50%", "--output", "x"], ["--output=x"]):
        assert calls.output_of(arguments) == Path("x")
    assert calls.output_of(["--budget", "50%"]) == Path(calls.DEFAULT_OUTPUT)
