"""Programs that never import hpr: they load its checkpoints where hpr is installed, and are told to install it elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import plan_everything
from hpr.errors import CheckpointError
from hpr.sharing.specification import NEEDS_HPR

ROOT = Path(__file__).parents[2]
Program = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("random_fit")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """``program(code, NAME="value")``: run code where hpr is installed with the entry points of this source."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "installed" / "hpr-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hpr\nVersion: 0.1.0\n", encoding="utf-8")
    groups = project["entry-points"].items()
    lines = [
        line for group, points in groups for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        places = os.pathsep.join([str(info.parent), str(ROOT / "src")])
        environment = os.environ | {"PYTHONPATH": places} | variables
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)

    return run


def saved(kind: str, model: nn.Module, ids: Tensor, folder: Path) -> Tensor:
    """Save a shared or a coded model, and return its outputs."""
    if kind == "shared":
        student = hpr.share(model, plan_everything(model))
        student.save_pretrained(folder)
    else:
        profile = hpr.profile(model, [{"input_ids": ids}])
        student = hpr.share(model, hpr.plan(model, profile, "45%bytes"), profile)
        hpr.save(student, folder)
    with torch.no_grad():
        return student(input_ids=ids)[0]


@pytest.fixture
def folders(bert: nn.Module, ids: Tensor, tmp_path: Path) -> dict[str, Path]:
    """A shared and a coded checkpoint, each with the outputs of its model."""
    for kind in ("shared", "coded"):
        torch.save((ids, saved(kind, bert, ids, tmp_path / kind)), tmp_path / f"{kind}.pt")
    return {kind: tmp_path / kind for kind in ("shared", "coded")}


def test_a_program_that_never_imports_hpr_loads_its_checkpoints(program: Program, folders: dict[str, Path]) -> None:
    done = program(
        f"import sys, torch\n"
        f"from transformers import AutoModel, BitsAndBytesConfig\n"
        f"from transformers.quantizers.auto import AutoHfQuantizer\n"
        f"assert 'hpr' not in sys.modules\n"
        f"try:\n"
        f"    another = BitsAndBytesConfig(load_in_8bit=True)\n"
        f"    AutoModel.from_pretrained({str(folders['shared'])!r}, quantization_config=another)\n"
        f"except ValueError as error:\n"
        f"    assert 'hpr.fold(model)' in str(error), error\n"
        f"else:\n"
        f"    raise SystemExit('another quantisation was accepted')\n"
        f"for folder in {list(map(str, folders.values()))}:\n"
        f"    model = AutoModel.from_pretrained(folder)\n"
        f"    ids, expected = torch.load(folder + '.pt')\n"
        f"    with torch.no_grad():\n"
        f"        assert torch.equal(model(input_ids=ids)[0], expected)\n"
        f"assert 'hpr' in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_description_that_is_read_alone_is_known_too(program: Program, folders: dict[str, Path]) -> None:
    """Lm-eval reads the description of a checkpoint itself, and hands it to the loading."""
    done = program(
        f"from transformers import AutoConfig, AutoModel\n"
        f"from transformers.quantizers import AutoQuantizationConfig\n"
        f"for folder in {list(map(str, folders.values()))}:\n"
        f"    described = AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained(folder).quantization_config)\n"
        f"    AutoModel.from_pretrained(folder, quantization_config=described)\n"
    )
    assert done.returncode == 0, done.stderr


def test_torch_and_transformers_alone_import_nothing_of_hpr(program: Program) -> None:
    done = program(
        "import sys, torch\n"
        "print([name for name in sys.modules if name.startswith(('hpr', 'transformers'))])\n"
        "import transformers.modeling_utils\n"
        "print([name for name in sys.modules if name.startswith('hpr')])\n"
        "print([one for one in sys.meta_path if type(one).__module__ == 'hpr_autoload'])\n"
    )
    assert done.stdout.splitlines() == ["['hpr_autoload']", "['hpr_autoload']", "[]"]


@pytest.mark.parametrize("switch", [{"HPR_AUTOLOAD": "0"}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}])
def test_without_hpr_the_last_line_says_what_to_install(
    program: Program, folders: dict[str, Path], switch: dict[str, str]
) -> None:
    done = program(
        f"import sys\n"
        f"sys.modules['hpr'] = None\n"
        f"from transformers import AutoModel\n"
        f"for folder in {list(map(str, folders.values()))}:\n"
        f"    try:\n"
        f"        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)\n"
        f"    except ValueError as error:\n"
        f"        print(str(error).splitlines()[-1])\n"
        f"AutoModel.from_pretrained(folder)\n",
        **switch,
    )
    lines = [*done.stdout.splitlines(), done.stderr.strip().splitlines()[-1]]
    assert done.returncode != 0
    assert len(lines) == 3
    assert all(line.endswith(NEEDS_HPR) for line in lines)
    assert "pip install hpr" in NEEDS_HPR


@pytest.mark.parametrize("given", [tf.BitsAndBytesConfig(load_in_8bit=True), tf.GPTQConfig(bits=4), tf.AutoRoundConfig()])
def test_another_quantisation_at_load_is_answered_with_the_mend(folders: dict[str, Path], given: object) -> None:
    for folder in folders.values():
        with pytest.raises(CheckpointError, match=rf"a {type(given).__name__} cannot be applied .* hpr\.fold\(model\)"):
            tf.AutoModel.from_pretrained(folder, quantization_config=given)


def test_the_note_in_the_configuration_goes_where_the_sharing_goes(bert: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    student = hpr.share(bert, plan_everything(bert))
    assert NEEDS_HPR in student.config.fusion_config
    student.save_pretrained(tmp_path / "first")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "first", fusion_config={})
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "config.json").read_bytes() == (tmp_path / "first" / "config.json").read_bytes()
    assert not hasattr(hpr.unshare(loaded).config, "fusion_config")
    saved("coded", bert, ids, tmp_path / "coded")
    plain = tf.AutoModel.from_pretrained(tmp_path / "coded")
    assert not hasattr(plain.config, "fusion_config")
    plain.save_pretrained(tmp_path / "plain")
    assert "hpr" not in (tmp_path / "plain" / "config.json").read_text(encoding="utf-8")
