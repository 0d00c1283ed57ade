"""Results as tables that fit 80 columns, with numbers formatted as in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.columns import Columns
from rich.table import Table

from hpr.plans.table import read_plan
from hpr.plans.text_table import runs
from hpr.reporting.formatting import byte_count, exact, figure, percent, present, records, seconds, size_rows, table


def parts_table(anatomy: Mapping[str, Any]) -> Table:
    """Slots with shapes, counts and parameters."""
    grid = _grid(
        f"{anatomy['class']}: {exact(anatomy['parameters'])} unique parameters",
        "part",
        ">sites",
        ">shape",
        ">parameters",
        ">share",
    )
    for part in anatomy["parts"]:
        shape = "×".join(map(str, part["shape"])) if part["shape"] else ""
        sites = str(part["sites"]) if part["sites"] else ""
        grid.add_row(part["name"], sites, shape, exact(part["parameters"]), percent(part["parameters"], anatomy["parameters"]))
    return grid


def stack_lines(stack: Mapping[str, Any]) -> list[str]:
    """The layers of a stack, and which of them can reuse attention or be dropped, or why none can."""
    said = [f"{stack['name']}: {stack['layers']} layers"]
    for key, what in (("attention_reuse", "attention weights can be reused"), ("drop", "layers can be dropped")):
        able = [layer for layer, reason in stack[key].items() if reason is None]
        why = next(reversed(stack[key].values()))
        said.append(f"{stack['name']}: {what}: {', '.join(able) if able else f'no, {why}'}")
    return said


def uncovered_line(row: Mapping[str, Any]) -> str:
    """Matrices that are no sites: whose, how many, how large, and why."""
    many = f"{row['count']} of " if row["count"] > 1 else ""
    return f"{many}{row['owner']}.{row['parameter']}, {exact(row['parameters'])} parameters: {row['reason']}"


def layers_table(layers: Mapping[str, Any]) -> Table:
    """Per layer: block influence, context dependence, similarity to the layer above."""
    grid = _grid("Layers", "layer", ">block influence", ">context dependence", ">similar to the next")
    for stack, features in layers.items():
        similarity = features["similarity"]
        rows = zip(features["block_influence"], features["context_dependence"], strict=True)
        for layer, (influence, context) in enumerate(rows):
            above = figure(similarity[layer][layer + 1]) if layer + 1 < len(similarity) else ""
            grid.add_row(f"{stack}.{layer}", figure(influence), figure(context), above)
    return grid


def operators_table(plan: Mapping[str, Any]) -> Table:
    """For each operator: how many sites use it, and their predicted damage."""
    grid = _grid("Operators", "operator", "short", ">sites", ">predicted damage")
    for operator in read_plan(plan).operators:
        grid.add_row(operator.name, operator.code, str(operator.sites), figure(operator.damage, "nats"))
    return grid


def plan_table(plan: Mapping[str, Any]) -> Table:
    """The plan, one line for each slot: layers, operator and rank of every group."""
    found = read_plan(plan)
    grid = _grid("Plan (layers: operator rank)", "part", "groups")
    for stack in found.stacks:
        for row in stack.rows:
            grid.add_row(f"{stack.name} · {row.slot}", Columns(runs(row.cells), padding=(0, 2)))
    for cell in found.outside:
        grid.add_row(cell.site, cell.word)
    return grid


def before_after(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Table]:
    """Sizes and quality of original and compressed model."""
    sizes = _grid("Size", "what is counted", ">original", ">compressed", ">ratio")
    for size in size_rows(plan, metrics):
        if size["known"]:
            sizes.add_row(size["label"], size["before"], size["after"], size["kept"])
    rows = records(metrics, "quality")
    places = {present(row.get("data")) for row in rows}
    quality = _grid(f"Quality on {places.pop()}" if len(places) == 1 else "Quality", "measure", ">original", ">compressed")
    for row in rows:
        name = present(row.get("name")) + (f" ({row['unit']})" if row.get("unit") else "")
        name += f" on {row.get('data')}" if places else ""
        quality.add_row(name, "–" if row.get("before") is None else figure(row["before"]), figure(row.get("after")))
    return [sizes, quality] if rows else [sizes]


def profile_lines(about: Mapping[str, Any]) -> list[str]:
    """One line that says what a profile was measured on."""
    soft = f" at temperature {about['temperature']:g}" if about["temperature"] != 1 else ""
    return [
        f"{exact(about['examples'])} examples, {exact(about['tokens'])} tokens, objective {about['objective']}{soft}; "
        f"{seconds(about['seconds'])}, peak memory {byte_count(about['peak_memory_bytes'])}"
    ]


def solver_line(plan: Mapping[str, Any], parameters: int) -> str:
    """Parameters against the budget, predicted damage, and how far it may be from the least possible."""
    budget = plan["budget"]
    gap = table(plan, "diagnostics", "solver").get("gap")
    bound = "" if gap is None else f", at most {100 * gap:.2f} % above the least possible"
    return (
        f"{exact(parameters)} parameters ({percent(parameters, plan['model']['dense_parameters'])} of the original); "
        f"budget {budget['text']} = {exact(budget['parameters'])}, {percent(parameters, budget['parameters'])} of it used\n"
        f"predicted damage {figure(plan['predicted_damage'], 'nats')} per example{bound}"
    )


def rounding_line(plan: Mapping[str, Any]) -> str:
    """The step, the size of the file, and the predicted damage of a plan for a budget in bytes."""
    size, bits = plan["diagnostics"]["bytes"], plan["rounding"].get("bits")
    kept = f", codes of {bits} bits" if bits else ""
    above = plan["diagnostics"].get("decibels")
    limit = "" if above is None else f", {above:.1f} decibels above the limit of a code of so many bits"
    if (rounding := plan["diagnostics"].get("rounding_damage")) is not None:
        limit = f" by sharing, {figure(rounding, 'nats')} by rounding"
    return (
        f"{byte_count(size)} on disk, budget {plan['budget']['text']}; every number is rounded with the step "
        f"{plan['rounding']['step']:.3g}{kept}\npredicted damage {figure(plan['predicted_damage'], 'nats')} per example{limit}"
    )


def alignment_line(aligned: float, plain: float) -> str:
    """How much predicted damage alignment saves."""
    saved = 100 * (1 - aligned / plain)
    return f"layers are aligned first: that saves {saved:.1f} % of {figure(plain, 'nats')} predicted without"


def _grid(title: str, *columns: str) -> Table:
    """A table without side borders; a column whose name starts with > holds numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        grid.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return grid


def healing_line(healing: Mapping[str, Any]) -> str:
    """One line with the result of healing."""
    took = f"{healing['recipe']['steps']} steps in {seconds(healing['seconds'])}"
    if not healing["best_step"]:
        return f"{took}: no check was better than the start, whose weights are kept; use a lower --learning-rate, or more data"
    return (
        f"{took}: divergence on the validation set {healing['before']:.4g} → {healing['after']:.4g} nats, "
        f"the weights of step {healing['best_step']}"
    )
