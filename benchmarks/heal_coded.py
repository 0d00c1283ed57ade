"""Models at a number of bytes, healed within the same bytes: divergence, task score, bytes and seconds, before and after.

MiniLM reads unlabelled text of six kinds (``common/texts.py``; no sentence of STS-B), and is scored on sentences of these kinds
that nothing else reads, on held-out docstrings, and on STS-B's test set. KWT-1 reads its calibration clips, and is scored on
its evaluation clips. ``--steps 0`` rounds only. Prints one JSON object a line as results come in, and a table at the end:

python benchmarks/heal_coded.py minilm --megabytes 4.0 3.0 --steps 300
python benchmarks/heal_coded.py kwt1 --megabytes 0.095 --steps 400
python benchmarks/heal_coded.py kwt1 --megabytes 0.080 --steps 400 --shared 100% 50%

``--shared`` compares at equal bytes and equal healing: "100%" rounds every weight, a smaller share lets layers share factors
under such a budget in parameters first, and rounds the factors.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

import hpr
from common.byte_ground import Ground, minilm, speech
from common.quantised.coded import saved_bytes
from common.tables import markdown, say
from common.texts import divided
from hpr.data.loaded_model import as_loaded
from hpr.data.splits import TRAINED, prepare
from hpr.healing.coded.budget import ByteBudget
from hpr.healing.coded.heal import heal_codes
from hpr.healing.loss import Weights
from hpr.operators.fitting import Fits
from hpr.rounding.plan import CodedPlan, plan_bytes
from hpr.rounding.shared import aligned_profile, round_shared
from kwt1_closed_form import clips

EACH = 4000  # sentences of every kind that MiniLM trains on


def trained_on(on: Ground) -> Any:
    """What healing reads."""
    if on.loaded is None:
        return list(clips("calibration")[0].split(50))
    return prepare(divided(each=EACH)[0], on.loaded, TRAINED)


def rounded(on: Ground, share: str, limit: int) -> CodedPlan:
    """The model at so many bytes, whole or with a share of its parameters."""
    words = f"{limit / 1e6}MB"
    if share == "100%":
        return plan_bytes(on.model, on.profile, words, limit, on.measure)
    plan, fits = hpr.plan(on.model, on.profile, share), Fits(on.model, on.profile)
    student = hpr.share(on.model, plan, on.profile)
    return round_shared(student, plan, aligned_profile(fits, plan), limit, on.measure)


def main() -> None:
    """Print what was measured before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "kwt1"))
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4.0, 3.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=hpr.Recipe.learning_rate)
    parser.add_argument("--hidden", type=float, default=Weights.hidden, help="weight of hidden states in the loss")
    parser.add_argument("--relations", type=float, default=Weights.relations, help="weight of relations between texts")
    parser.add_argument("--checks", type=int, default=6, help="each codes the whole model, which takes as long as some steps")
    parser.add_argument("--shared", nargs="+", default=["100%"], metavar="SHARE", help="of the parameters, before rounding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="a file that keeps MiniLM's profile from run to run")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    on = speech() if given.model == "kwt1" else minilm("six", given.profile)
    teacher = on.loaded or as_loaded(on.model, None, on.goal.name)
    data = trained_on(on)
    weights = Weights(hidden=given.hidden, relations=given.relations)
    recipe = hpr.Recipe(given.steps or 1, learning_rate=given.rate, checks=given.checks, seed=given.seed, weights=weights)
    rows = [say(model="original", **on.score(on.model))]
    for megabytes, share in product(given.megabytes, given.shared):
        limit, start = int(megabytes * 1e6), time.perf_counter()
        made = rounded(on, share, limit)
        assert made.plan.rounding is not None
        size, seconds = saved_bytes(made.student) / 1e6, time.perf_counter() - start
        rows.append(say(model="rounded", share=share, megabytes=size, seconds=seconds, **on.score(made.student)))
        if given.steps:
            budget = ByteBudget(limit, made.plan.rounding, on.profile.others)
            found = heal_codes(made.student, teacher, data, recipe, budget)
            facts = {"megabytes": saved_bytes(made.student) / 1e6, "seconds": found.seconds, "best step": found.best_step}
            history = {"before": found.before.mean, "after": found.after.mean, "history": found.history}
            rows.append(say(model="healed", share=share, **facts, **on.score(made.student), **history))
    columns = {
        "model": "",
        "share": "",
        "megabytes": ".3f",
        "divergence": ".5f",
        "six kinds": ".5f",
        "STS-B": ".4f",
        "accuracy": ".1f",
    }
    columns |= {"before": ".5f", "after": ".5f", "best step": "", "seconds": ".0f"}
    print(markdown(rows, {key: form for key, form in columns.items() if any(row.get(key) for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
