"""Healing on two processes: the same losses, gradients and weights as on one at the same global batch, whole or sharded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_healing import CONFIG, batches, equal, teacher_of
from transformers import AutoModel

import hpr

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from transformers import Trainer
import test_healing as t
from hpr.healing import distributed, trainer
from hpr.healing.recipe import Recipe

torch.set_num_threads(1)
out, kind = Path(sys.argv[1]), sys.argv[3]
teacher = t.teacher_of()
profile = t.hpr.profile(teacher, t.batches())
student = t.hpr.share(teacher, t.hpr.plan(teacher, profile, "50%"), profile)
gradients, losses = [], []
step, made = torch.optim.AdamW.step, trainer.HealingTrainer.training_step

def noting(self, *args, **kwargs):
    found = [distributed.whole(group["params"][0].grad) for group in self.param_groups if group["params"][0].grad is not None]
    gradients.append([value.clone() for value in found])
    return step(self, *args, **kwargs)

def losing(self, *args, **kwargs):
    losses.append(made(self, *args, **kwargs))
    return losses[-1]

torch.optim.AdamW.step, trainer.HealingTrainer.training_step = noting, losing
recipe = Recipe(3, checks=3, learning_rate=1e-3, accumulate=2 if kind == "one" else 1, sharded=kind == "sharded")
found = t.train(student, teacher, t.batches(), t.batches(2, seed=5), recipe)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
noted = {"gradients": gradients, "losses": losses, "weights": student.state_dict(), "history": found.history}
torch.save(noted, out / f"{kind}-{rank}.pt")
if rank == 0:
    t.hpr.save(student, out / kind)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What one process, two processes and two with a part of each parameter leave behind."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    for kind in ("one", "two", "sharded"):
        start = [] if kind == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *start, str(folder / "script.py"), str(folder), str(Path(__file__).parent), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_losses_and_gradients_of_three_steps(runs: Path, kind: str) -> None:
    one, first, second = (torch.load(runs / f"{name}.pt") for name in ("one-0", f"{kind}-0", f"{kind}-1"))
    assert len(one["gradients"]) == len(first["gradients"]) == 3
    for expected, found, other in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        assert len(expected) == len(found) > 10
        for want, got, also in zip(expected, found, other, strict=True):
            assert torch.equal(got, also)
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    for number in range(3):  # one process accumulates the two batches that two processes see at once
        want = one["losses"][2 * number] + one["losses"][2 * number + 1]
        assert float(first["losses"][number] + second["losses"][number]) / 2 == pytest.approx(float(want), rel=1e-5)
    for want, got in zip(one["history"], first["history"], strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_both_processes_have_the_weights_and_they_load(runs: Path, kind: str) -> None:
    first, second = (torch.load(runs / f"{kind}-{rank}.pt")["weights"] for rank in (0, 1))
    assert equal(first, second)
    loaded = AutoModel.from_pretrained(runs / kind)
    assert equal(loaded.state_dict(), first)
    teacher = teacher_of()
    assert loaded.config.vocab_size == CONFIG.vocab_size
    apart = hpr.evaluate(loaded, teacher, batches(2, seed=5))
    assert apart["quality"]
