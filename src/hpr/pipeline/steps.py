"""The steps of the pipeline one by one, each on data of any kind.

Data is a text file, a list of texts, an array or its file, a ``datasets.Dataset``, batches of model inputs, a ``Mixture`` of
several, or None for the standard library's docstrings. A model is a module, or what ``hpr.open_model`` gave: text needs a
tokenizer, which a bare module does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hpr.anatomy.describe import describe as describe_module
from hpr.anatomy.model import Anatomy
from hpr.anatomy.wrappers import inside, unwrapped
from hpr.checkpoints.open import open_model
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import EVALUATED, PROFILED, open_data
from hpr.errors import PlanError, check_kind
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.evaluate import evaluate as evaluate_batches
from hpr.evaluation.evaluate import measured_on
from hpr.nn.bank import recorded_objective
from hpr.operators.fitting import Fits
from hpr.pipeline.coded import check_options
from hpr.planning.options import DEFAULTS, PlanOptions
from hpr.planning.planner import plan as plan_module
from hpr.plans.budget import byte_limit
from hpr.plans.plan import Plan
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile as profile_batches
from hpr.rounding.plan import plan_bytes, round_model
from hpr.rounding.shared import aligned_profile, round_factors, round_shared
from hpr.sharing.refit import refit as refit_batches
from hpr.sharing.share import Rule
from hpr.sharing.share import share as share_module

if TYPE_CHECKING:  # the Trainer is imported only if something is healed
    from hpr.healing.recipe import Recipe
    from hpr.healing.train import Healing

AnyModel = str | Path | nn.Module | LoadedModel | None
REFITTED = 1024  # examples that a refit reads, at most


def describe(model: AnyModel) -> Anatomy:
    """The stacks, layers, slots and sites of a model, found by structure. A module may be on the meta device.

    Raises ``HprError`` if the model has no weight matrix.

    >>> anatomy = hpr.describe(model)
    >>> [(stack.name, stack.layers) for stack in anatomy.stacks]
    [('encoder', 2)]
    >>> anatomy["encoder.layer.1.output.dense"].parameters
    512
    """
    return describe_module(module_of(model))


def plan(model: AnyModel, profile: Profile, budget: str = "50%", options: PlanOptions = DEFAULTS) -> Plan:
    """The plan of least predicted damage under a budget: ``50%`` or ``11M`` parameters, or ``8MB`` on disk.

    A budget in bytes (also ``10%bytes``) gives a plan that rounds every weight with one step size. A percentage counts all
    unique parameters; with ``options.only`` it counts the selected weights alone. Raises
    ``BudgetError`` for a budget that cannot be read or met, naming the smallest possible.

    >>> plan = hpr.plan(model, profile, "60%", hpr.PlanOptions(only="encoder.*"))
    >>> print(plan)  # the table that ``hpr plan`` prints
    encoder · attention.self.query ...
    """
    module = module_of(model)
    check_kind("the profile", profile, Profile, "what hpr.profile or Profile.load returns")
    check_kind("options", options, PlanOptions, "hpr.PlanOptions(...)")
    if (limit := byte_limit(budget, disk_bytes(module))) is not None:
        check_options(options, budget)
        return plan_bytes(module, profile, budget.strip(), limit, bits=options.bits).plan
    limit = options.file_limit(budget, disk_bytes(module))
    plan = plan_module(module, profile, budget, options)
    if limit is None:
        return plan
    fits = Fits(module, profile)
    student = share_module(module, plan, profile, fits=fits)
    return round_shared(student, plan, aligned_profile(fits, plan), limit, bits=options.bits).plan


def share(model: AnyModel, plan: Plan | Rule, profile: Profile | None = None) -> nn.Module:
    """A copy of a model whose layers share factors as the plan says. The model itself is not changed.

    With a profile the factors are fitted in its metric, without one by plain least squares, which is much worse. A preset or
    another rule in place of the plan fits nothing: each factor starts as the weight of its group's first layer. A plan for
    a budget in bytes needs the profile; the copy then has the original's modules with rounded weights. Raises
    ``PlanError`` if the plan does not fit the model, and ``HprError`` for a model that is shared or quantised already.

    >>> student = hpr.share(model, plan, profile)
    >>> type(student) is type(model)
    True
    """
    if not (hasattr(plan, "plan") and hasattr(plan, "fit")):  # a rule of one's own needs no base class
        check_kind("the plan", plan, Plan, "what hpr.plan or Plan.load returns, or a rule of hpr.presets")
    if profile is not None and isinstance(plan, Plan):
        check_kind("the profile", profile, Profile, "what hpr.profile or Profile.load returns")
    if isinstance(plan, Plan) and plan.rounding is not None:
        return _rounded(module_of(model), plan, profile)
    return share_module(module_of(model), plan, profile)


def _rounded(model: nn.Module, plan: Plan, profile: Profile | None) -> nn.Module:
    assert plan.rounding is not None
    if profile is None:
        raise PlanError("a plan with a rounding rounds in the metric of the profile: give the profile that it was made with")
    if not plan.rounding.factors:
        return round_model(model, plan, profile)
    fits = Fits(model, profile)
    student = share_module(model, replace(plan, rounding=None), profile, fits=fits)
    return round_factors(student, plan, aligned_profile(fits, plan))


def module_of(model: AnyModel) -> nn.Module:
    """The module of a model that is loaded, or that is loaded now."""
    return unwrapped(model) if isinstance(model, nn.Module) else open_model(model).model


def profile(model: AnyModel, data: Any = None, objective: str | None = None, seed: int = 0, structure: bool = True) -> Profile:
    """Measure every site and layer of a model on unlabelled data. The model is left as it was.

    ``objective``: what the outputs mean, by default what the model's class says (see the guide). ``structure=False`` measures
    no layers and looks for no symmetries, which saves time if the budget is in bytes: such a plan does not use them. At most
    4,096 examples are read. Raises ``HprError`` for no data, and for losses, activations or gradients that are not finite.

    >>> hpr.profile(loaded, texts).about["examples"]
    64
    """
    loaded = open_model(model, objective=objective)
    batches, _ = open_data(data, loaded, "calibration", PROFILED)
    return profile_batches(loaded.model, batches, loaded.objective, seed, structure)


def refit(student: nn.Module, teacher: AnyModel, data: Any, plan: Plan, profile: Profile) -> None:
    """Fit private factors and biases again, in place, to what the compressed layers below really emit.

    It pays on data like that which the model will see, and can lose on other data, because the regression follows its text
    closely. At most 1,024 examples are read. Raises ``HprError`` for a profile or plan of another model.

    >>> hpr.refit(student, loaded, texts, plan, profile)
    """
    check_kind("the plan", plan, Plan, "what hpr.plan or Plan.load returns")
    check_kind("the profile", profile, Profile, "what hpr.profile or Profile.load returns")
    loaded = open_model(teacher)
    batches, _ = open_data(data, loaded, "calibration", REFITTED)
    refit_batches(unwrapped(student), loaded.model, plan, profile, batches)


def heal(student: nn.Module, teacher: AnyModel, data: Any = None, recipe: Recipe | None = None) -> Healing:
    """Train a student in place to imitate its teacher (distillation), and return the record of the run.

    The student ends with the weights of least divergence on a validation set, or with its first weights if no others are
    better. The validation set is a part of the data, and the student does not train on it. ``recipe``: duration, learning rate
    and further settings. The objective is ``recipe.objective``, else that of the student's profile, else the teacher's (see
    ``evaluate``). Raises ``HprError`` if the data or the recipe does not fit.

    >>> healed = hpr.heal(student, loaded, texts, hpr.Recipe(duration="2steps"))
    >>> healed.after.mean <= healed.before.mean
    True
    """
    from hpr.healing.heal import heal as heal_data
    from hpr.healing.recipe import Recipe

    if recipe is not None:
        check_kind("the recipe", recipe, Recipe, "hpr.Recipe(...)")
    return heal_data(unwrapped(student), open_model(teacher), data, recipe)


def evaluate(
    student: nn.Module,
    teacher: AnyModel,
    data: Any = None,
    objective: str | None = None,
    labels: Sequence[int] | Tensor | None = None,
    repeats: int = 9,
) -> dict[str, Any]:
    """Compare a student with its teacher: quality, sizes and latency, as the JSON values that the report reads.

    ``objective`` says how to read the outputs. Every divergence is in nats per example, but the examples are read differently:

    - ``embedding``, ``cls-embedding``: ½‖e − ê‖² between normalised vectors, one per example; at most 2 nats;
    - ``classification``: KL divergence between two class distributions, one per example;
    - ``causal-lm``, ``masked-lm``, ``seq2seq``: KL divergence between token distributions, summed over the example's tokens;
    - ``hidden``: ½‖h − ĥ‖² between last hidden states, summed over the example's positions.

    Figures of different objectives are not comparable. By default the objective is that of the profile that the student was
    fitted with; ``hpr.share`` and the checkpoint record it. A student without such a record takes the objective of the teacher:
    the one that ``open_model`` got, or the default of the model's class.

    ``labels``: the classes of a classifier's examples, in the order of the data; they add its accuracy. ``repeats``: timed
    passes; 0 leaves latency and peak memory out. At most 1,024 examples are read, or one for each label. Raises ``HprError``
    for no data, for outputs that are not finite or differ in shape, and for labels that do not fit.

    >>> sorted(hpr.evaluate(student, loaded, texts, repeats=0))
    ['parts', 'quality', 'sizes']
    """
    loaded = open_model(teacher, objective=recorded_objective(inside(student)) if objective is None else objective)
    if labels is not None and (isinstance(labels, Mapping) or not hasattr(labels, "__len__")):
        check_kind("labels", labels, Sequence, "one class for each example, as a list")
    examples = EVALUATED if labels is None else max(EVALUATED, len(labels))
    batches, label = open_data(data, loaded, "heldout", examples)
    return measured_on(evaluate_batches(student, loaded.model, batches, loaded.goal, labels, repeats), label)
