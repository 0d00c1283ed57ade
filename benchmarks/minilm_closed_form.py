"""all-MiniLM-L6-v2 without training: whole model (STS-B), encoder alone (cosine), damage predicted against measured, cost.

Calibrates on the standard library's docstrings only. Prints one JSON object a line; a section can be run alone:
python benchmarks/minilm_closed_form.py [cost|whole|encoder|damage|reload ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr

import hpr
from common import peers
from common.paths import shared
from common.tables import count, say
from common.tasks import embedder, sts_correlation, sts_pairs
from hpr.checkpoints.open import open_model
from hpr.data.batches import text_batches
from hpr.data.splits import prepare
from hpr.evaluation.divergence import compare
from hpr.operators.registry import plannable
from hpr.pipeline.rescore import rescore
from hpr.planning import planner
from hpr.planning.draft import Draft
from hpr.planning.options import PlanOptions
from hpr.plans.plan import Plan
from hpr.profiling.objectives import OBJECTIVES
from hpr.runtime.environment import peak_memory
from hpr.solver import lagrangian
from hpr.solver.composite import restrict

GOAL = OBJECTIVES["embedding"]
EXAMPLES = 4096
_FRESH = """
import sys, torch
import hpr
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
batch, expected, texts, sentences = torch.load(sys.argv[2])
model = AutoModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(float((model(**batch).last_hidden_state - expected).abs().max()))
encoder = SentenceTransformer(sys.argv[1], device="cpu")
print(float((encoder.encode(texts, convert_to_tensor=True) - sentences).abs().max()))
"""


class Run:
    """The model, its data and what was measured of it once for all sections."""

    def __init__(self) -> None:
        opened = open_model(None)
        self.model, self.tokenizer, self.folder = opened.model, opened.tokenizer, opened.folder
        self.texts = prepare(None, opened, EXAMPLES)
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        for batch in self.texts.calibration:
            GOAL.loss(self.model(**batch), batch, generator).backward()
        self.model.zero_grad()
        self.step = time.perf_counter() - start
        start = time.perf_counter()
        self.profile = hpr.profile(self.model, self.texts.calibration, "embedding")
        middle = time.perf_counter()
        self.draft = planner.draft(self.model, self.profile)
        self.statistics, self.curves = middle - start, time.perf_counter() - middle

    def best(self, draft: Draft, budget: str) -> tuple[Plan, float, float]:
        """The plan that measures best on re-scoring text; seconds spent planning and re-scoring."""
        start = time.perf_counter()
        plans = draft.alternatives(draft.budget(budget), 3)
        middle = time.perf_counter()
        scores = rescore(self.model, self.profile, plans, self.texts.rescoring, GOAL)
        chosen = plans[min(range(len(plans)), key=lambda index: scores[index].divergence.mean)]
        return chosen, middle - start, time.perf_counter() - middle


def whole(run: Run) -> None:
    """STS-B at 80, 65 and 50 % of all parameters."""
    splits = {name: sts_pairs(shared() / "data" / "sts-b" / f"stsb-en-{name}.csv") for name in ("dev", "test")}
    dense = {name: sts_correlation(embedder(run.model, run.tokenizer), pairs) for name, pairs in splits.items()}
    say(section="whole", method="dense", **dense)
    for budget in ("80%", "65%", "50%"):
        plan, _, _ = run.best(run.draft, budget)
        student = hpr.share(run.model, plan, run.profile)
        found = compare(student, run.model, run.texts.heldout, GOAL)
        used = plan.parameters(run.draft.anatomy)
        scores = {name: sts_correlation(embedder(student, run.tokenizer), pairs) for name, pairs in splits.items()}
        say(
            section="whole",
            method="hpr",
            budget=budget,
            **scores,
            cosine=found.cosine,
            parameters=used,
            used=used / plan.budget.parameters,
            predicted=plan.damage,
            measured=found.divergence.mean,
            gap=plan.diagnostics["solver"]["gap"],
            operators=count(plan),
        )


def cost(run: Run) -> None:
    """Statistics, plan and fits against one forward and backward pass over the same text, in the same run."""
    plan, planning, rescoring = run.best(run.draft, "50%")
    start = time.perf_counter()
    hpr.share(run.model, plan, run.profile)
    fitting = time.perf_counter() - start
    say(
        section="cost",
        forward_and_backward=run.step,
        statistics=run.statistics,
        curves=run.curves,
        planning=planning,
        fitting=fitting,
        ratio=(run.statistics + run.curves + planning + fitting) / run.step,
        rescoring_apart=rescoring,
        peak_memory_bytes=peak_memory(),
    )


def encoder(run: Run) -> None:
    """The encoder's linear weights alone: mean cosine on held-out docstrings, against published methods."""
    draft = run.draft.narrowed("encoder.*")
    sites = [site for site in draft.anatomy.sites if site.stack == "encoder"]
    for budget, share in (("80%", 0.8), ("50%", 0.5), ("30%", 0.3)):
        for name in ("svd", "svd_llm", "basis_sharing"):
            student, _ = getattr(peers, name)(run.model, sites, run.profile, share)
            found = compare(student, run.model, run.texts.heldout, GOAL)
            say(section="encoder", method=f"peer: {name}", budget=budget, cosine=found.cosine)
        plan, _, _ = run.best(draft, budget)
        student = hpr.share(run.model, plan, run.profile)
        found = compare(student, run.model, run.texts.heldout, GOAL)
        say(section="encoder", method="hpr", budget=budget, cosine=found.cosine, operators=count(plan))
        start = time.perf_counter()
        hpr.refit(student, run.model, run.texts.calibration[:16], plan, run.profile)
        seconds = time.perf_counter() - start
        found = compare(student, run.model, run.texts.heldout, GOAL)
        say(section="encoder", method="hpr, refit", budget=budget, cosine=found.cosine, seconds=seconds)


def damage(run: Run) -> None:
    """Predicted against measured damage, plans of every operator at five budgets; what leaving one out costs."""
    rows, inside = [], []
    every = planner.draft(run.model, run.profile, PlanOptions(operators=plannable(), align=False)).tracks
    for budget in ("80%", "65%", "50%", "40%", "30%"):
        limit = run.draft.budget(budget)
        found = [*lagrangian.plan_candidates(every, run.draft.limit(limit))]
        found += lagrangian.k_best(every, run.draft.limit(limit), 3)
        for name in plannable():  # tables are always segmented: no operator alone could meet the smaller budgets
            for beside in (set(), {"low rank"}):
                with suppress(hpr.HprError):
                    tracks = restrict(every, {name, "segments", *beside})
                    found.append(lagrangian.solve(tracks, run.draft.limit(limit)))
        unique = {solution.structure: solution for solution in found}
        plans = [run.draft.plan(solution, limit) for solution in unique.values()]
        scores = rescore(run.model, run.profile, plans, run.texts.rescoring, GOAL)
        pairs = [(plan.damage, score.divergence.mean) for plan, score in zip(plans, scores, strict=True)]
        rows += pairs
        inside.append(float(spearmanr(*zip(*pairs, strict=True)).statistic))
        say(section="damage", budget=budget, plans=len(pairs), spearman=inside[-1], pairs=pairs)
    overall = float(spearmanr(*zip(*rows, strict=True)).statistic)
    say(section="damage", plans=len(rows), spearman=overall, median_within=median(inside))
    limit = run.draft.budget("50%")
    best = run.draft.best(limit)
    gains: dict[str, float | None] = {}
    for name in count(best).keys() - {"keep"}:
        try:
            gains[name] = run.draft.without(name, limit).damage / best.damage - 1
        except hpr.HprError:
            gains[name] = None  # without it this budget cannot be met
    say(section="damage", budget="50%", extra_damage_without=gains)


def reload(run: Run) -> None:
    """Save at 50 %, load in a fresh process through AutoModel and SentenceTransformer, compare bit by bit."""
    from sentence_transformers import SentenceTransformer

    plan = run.draft.best(run.draft.budget("50%"))
    student = hpr.share(run.model, plan, run.profile)
    with tempfile.TemporaryDirectory() as folder:
        out = hpr.save(student, Path(folder) / "out", run.tokenizer, source=run.folder)
        size = (out / "model.safetensors").stat().st_size
        texts = ["one sentence", "and another, somewhat longer sentence"]
        batch = text_batches(texts, run.tokenizer)[0]
        with torch.no_grad():
            expected = student(**batch).last_hidden_state
        original = SentenceTransformer(str(run.folder), device="cpu")
        original[0].model = student
        torch.save((batch, expected, texts, original.encode(texts, convert_to_tensor=True)), out / "expected.pt")
        answer = subprocess.run(
            [sys.executable, "-c", _FRESH, str(out), str(out / "expected.pt")], capture_output=True, text=True
        )
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    auto, sentence = (float(line) for line in answer.stdout.split())
    used = plan.parameters(run.draft.anatomy)
    say(section="reload", auto_model=auto, sentence_transformer=sentence, bytes=size, bytes_over_four_times=size - 4 * used)


def main() -> None:
    """Run the sections named on the command line, all by default."""
    sections = {"cost": cost, "whole": whole, "encoder": encoder, "damage": damage, "reload": reload}
    run = Run()
    for name in sys.argv[1:] or sections:
        sections[name](run)


if __name__ == "__main__":
    main()
