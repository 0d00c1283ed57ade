"""The dial of speed on all-MiniLM-L6-v2: predicted against measured, and quality beside dropping layers at equal time.

Plans of the whole model at a share of its time, and the best set of as many dropped layers as give that time (every set is
tried on the text that chooses plans); both healed for the same steps on the same text. Times are shares of the original's: of
calls that take turns on one thread, the fastest of each counts, in time of the processor, which a busy machine changes less
than time by the clock. Prints one JSON object a line:
OMP_NUM_THREADS=1 python benchmarks/latency_dial.py --latency 0.5x --for 100steps
OMP_NUM_THREADS=1 python benchmarks/latency_dial.py --bert-base
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from common.paths import shared
from common.tables import say
from common.tasks import embedder, sts_correlation, sts_pairs
from hpr.checkpoints.open import open_model
from hpr.data.splits import prepare
from hpr.evaluation.divergence import compare, divergence
from hpr.layer_reuse.ablation import intervene
from hpr.layer_reuse.dead_weights import dead_weights
from hpr.layer_reuse.install import droppable, with_states
from hpr.layer_reuse.reuse import with_layers
from hpr.nn.bank import parameters
from hpr.operators.low_rank import private_term
from hpr.pipeline.layer_plans import reusing_plans
from hpr.planning import planner
from hpr.planning.dial import Dial, measured_dial
from hpr.planning.options import PlanOptions
from hpr.plans.layer_states import DROPPED, site_layer
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import Entry
from hpr.profiling.objectives import OBJECTIVES
from hpr.sharing.attach import attach

GOAL = OBJECTIVES["embedding"]
PASSES = 20  # of each model
RANKS = (160, 200, 240)  # of every weight of BERT-base's encoder


def minilm(options: argparse.Namespace) -> None:
    """Print what the dial gives at each share, and what dropping layers gives."""
    teacher = open_model(None, "cpu")
    model, anatomy = teacher.model, hpr.describe(teacher.model)
    texts = prepare(None, teacher, options.examples)
    choosing = texts.rescoring[: options.choosing]
    pairs = sts_pairs(shared() / "data" / "sts-b" / "stsb-en-test.csv")
    if options.profile.is_file():
        profile = hpr.Profile.load(options.profile)
    else:
        profile = hpr.profile(model, texts.calibration, GOAL.name)
        profile.save(options.profile)
    profile = replace(profile, interventions=intervene(model, choosing, GOAL))
    draft = planner.draft(model, profile, PlanOptions(align=False))

    def quality(student: nn.Module) -> dict[str, float]:
        sts = sts_correlation(embedder(student, teacher.tokenizer), pairs)
        return {"sts_b": round(sts, 4), "nats": round(compare(student, model, texts.heldout, GOAL).divergence.mean, 4)}

    def report(name: str, plan: Plan, dial: Dial, student: nn.Module, **more: object) -> None:
        fast = hpr.materialise(student, dial.costs.positions)
        shares = measured(fast, model, dial.costs.batch)
        kept = round(parameters(student) / anatomy.total_parameters, 3)
        say(model=name, target=dial.target.text, shape=dial.target.shape, **shares, kept=kept, **quality(student), **more)

    say(model="original", **quality(model))
    for text in options.latency:
        dial = measured_dial(model, anatomy, PlanOptions(latency=text, shape=options.shape))
        dialled = draft.dialled(dial)
        budget = dialled.budget(options.budget)
        start = time.perf_counter()
        proposals = [dialled.propose(budget)]
        seconds = time.perf_counter() - start
        proposals += reusing_plans(model, profile, dialled, budget, choosing, GOAL)
        scores = [divergence(hpr.share(model, one.plan, profile), model, choosing, GOAL).mean for one in proposals]
        plans = [
            {"label": one.plan.diagnostics["label"], "predicted": one.plan.damage, "nats": score}
            for one, score in zip(proposals, scores, strict=True)
        ]
        say(target=text, plans=plans, gap=proposals[0].plan.diagnostics["solver"]["gap"], seconds=round(seconds, 1))
        plan = proposals[scores.index(min(scores))].plan
        names = [layer for layer, reason in droppable(model, anatomy).items() if reason is None]
        dropped = _dropped(model, names, dial, choosing)
        reuse = with_layers(keep_all(anatomy), anatomy, dropped, dead_weights(model, dropped, choosing[0]))
        students = {"dial": (plan, hpr.share(model, plan, profile)), "layers dropped": (reuse, hpr.share(model, reuse))}
        for name, (made, student) in students.items():
            used = dict(Counter(entry.operator for entry in made.entries.values()))
            report(name, made, dial, student, predicted=round(dial.share(made, dial.costs.beside(student)), 3), operators=used)
        for name, (made, student) in students.items() if options.amount else ():
            healed = hpr.heal(student, teacher, texts, hpr.Recipe(duration=options.amount))
            report(f"{name}, healed", made, dial, student, steps=healed.steps, seconds=round(healed.seconds))


def _dropped(model: nn.Module, names: list[str], dial: Dial, batches: list) -> dict[str, str]:
    """The set of dropped layers of least divergence, of the number that comes nearest to the time that is asked for."""
    anatomy, misses = hpr.describe(model), []
    for number in range(1, len(names) + 1):
        gone = dict.fromkeys(names[-number:], DROPPED)
        left = (cost.dense for name, cost in dial.costs.sites.items() if site_layer(anatomy[name]) not in gone)
        misses.append(abs(dial.costs.beside(with_states(model, gone)) + sum(left) - dial.allowed))
    number = 1 + misses.index(min(misses))
    sets = [dict.fromkeys(several, DROPPED) for several in itertools.combinations(names, number)]
    return min(sets, key=lambda states: divergence(with_states(model, states), model, batches, GOAL).mean)


@torch.inference_mode()
def measured(changed: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """The time of a call as a share of the model's: the fastest of both, and the median over pairs of calls."""
    changed.eval(), model.eval()
    times = [[_processor_time(one, batch) for one in (changed, model)] for _ in range(PASSES + 1)][1:]  # one to warm up
    fastest = [min(column) for column in zip(*times, strict=True)]
    middle = statistics.median(after / before for after, before in times)
    return {"measured": round(fastest[0] / fastest[1], 3), "measured_median": round(middle, 3)}


def _processor_time(model: nn.Module, batch: dict[str, Tensor]) -> float:
    start = time.thread_time()
    model(**batch)
    return time.thread_time() - start


def bert_base(shape: str) -> None:
    """Print parameters, predicted and measured time of BERT-base's shape with every weight of the encoder at one rank.

    Weights are random, since they do not change the time.
    """
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig()).eval()
    anatomy = hpr.describe(model)
    dial = measured_dial(model, anatomy, PlanOptions(latency="0.6x", shape=shape))
    for rank, table in itertools.product(RANKS, (None, 240)):
        terms = {site.name: (private_term(site, rank),) for site in anatomy.sites if site.stack is not None}
        if table:
            words = anatomy["embeddings.word_embeddings"]
            terms[words.name] = (private_term(words, table),)
        shapes = {name: one for site, several in terms.items() for name, one in several[0].shapes(anatomy[site]).items()}
        entries = {name: Entry("low rank", several) for name, several in terms.items()}
        student = copy.deepcopy(model)
        with torch.no_grad():
            for factor in attach(student, terms, shapes).parameters():
                factor.normal_(0, 0.02)
        everything = {site.name: entries.get(site.name, Entry("keep")) for site in anatomy.sites}
        predicted = dial.costs.predicted(everything, [])
        fast = hpr.materialise(student, dial.costs.positions)
        shares = measured(fast, model, dial.costs.batch)
        counts = {"millions": round(parameters(student) / 1e6, 1), "rank": rank, "rank_of_table": table}
        say(model="BERT-base", shape=shape, **counts, predicted=round(predicted, 3), **shares)


def main() -> None:
    """Read the options, and run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", nargs="+", default=["0.5x", "0.7x"])
    parser.add_argument("--budget", default="100%")
    parser.add_argument("--shape", default="1x128")
    parser.add_argument("--for", dest="amount", default="", help="heal both for this long: 100steps")
    parser.add_argument("--examples", type=int, default=768)
    parser.add_argument("--choosing", type=int, default=4, help="batches of text that choose plans and layers")
    parser.add_argument("--profile", type=Path, default=Path("out/minilm-768.safetensors"), help="read, or written")
    parser.add_argument("--bert-base", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bert_base:
        bert_base(options.shape)
    else:
        minilm(options)


if __name__ == "__main__":
    main()
