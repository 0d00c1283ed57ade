"""The public face: few names, all of them shown by examples that run, and an import that stays light."""

from __future__ import annotations

import copy
import doctest
import inspect
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hpr

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]
WITHOUT_EXAMPLE = {"HprError", "extras", "presets"}  # an error and two modules
HEAVY = ("networkx", "hpr.reporting", "hpr.healing", "hpr.planning", "hpr.pipeline", "hpr.operators", "hpr.profiling")


def test_at_most_two_dozen_names() -> None:
    assert len(hpr.__all__) <= 24
    assert all(getattr(hpr, name) is not None for name in hpr.__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/rules.md", "docs/how-it-works.md"])
def test_pages_use_public_names_that_exist(page: str) -> None:
    """Every ``hpr.name`` in a code block is public, and every import in one works."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for name in re.findall(r"(?<![\w.])hpr\.([A-Za-z_]\w*)", re.sub(r"^(from|import) .*$", "", block, flags=re.MULTILINE)):
            assert name in hpr.__all__, f"{page}: hpr.{name}"
        for line in re.findall(r"^(?:from hpr|import hpr).*$", block, flags=re.MULTILINE):
            exec(line.partition("#")[0], {})
        for name in re.findall(r"hpr\.extras\.(\w+)", block):
            assert hasattr(hpr.extras, name), f"{page}: hpr.extras.{name}"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples may use: a small sentence encoder, texts, a profile, a plan, a student and a folder."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = tf.BertTokenizer(str(folder / "vocab.txt"), model_max_length=24)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    model = tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[5:], k=draw.randint(3, 8))) for _ in range(64)]
    loaded = hpr.open_model(model, tokenizer=tokenizer)
    measured = hpr.profile(loaded, texts)
    plan = hpr.plan(model, measured, "60%")
    student = hpr.share(model, plan, measured)
    return {
        **{"hpr": hpr, "model": model, "tokenizer": tokenizer, "texts": texts, "loaded": loaded, "folder": folder},
        **{"profile": measured, "plan": plan, "student": student, "teacher": model, "copy": copy},
    }


@pytest.mark.parametrize("name", sorted(set(hpr.__all__) - WITHOUT_EXAMPLE))
def test_every_public_docstring_has_an_example_that_runs(name: str, names: dict[str, Any]) -> None:
    thing = getattr(hpr, name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", {**names}, name, None, 0)
    assert examples.examples, f"hpr.{name} has no example"
    said: list[str] = []
    with torch.random.fork_rng():
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert not said, "".join(said)


def test_importing_and_loading_stay_light(names: dict[str, Any]) -> None:
    folder = names["folder"] / "light"
    hpr.save(names["student"], folder)
    script = (
        "import sys, transformers\n"
        "from transformers import AutoModel\n"
        "before = set(sys.modules)\n"
        "import hpr\n"
        f"AutoModel.from_pretrained({str(folder)!r})\n"
        f"print([name for name in sys.modules if name.startswith({HEAVY!r})])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
