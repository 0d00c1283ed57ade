"""The report: one HTML file that needs no network and no script, made from plan.json and metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hpr.plans.table import read_plan
from hpr.reporting import captions, formatting, routes, sections


def render_report(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """A self-contained HTML page on one compression run.

    ``plan`` is what ``Plan.to_dict`` gives, ``metrics`` what ``metrics.json`` holds. Missing values appear as
    "not recorded".
    """
    plan_map = read_plan(plan)
    sizes = formatting.size_rows(plan, metrics)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            plan=plan,
            metrics=metrics,
            name=model_name(plan, metrics),
            plan_map=plan_map,
            sizes=sizes,
            size={row["key"]: row for row in sizes},
            speed=formatting.speed_lines(formatting.table(metrics, "speed")),
            quality=sections.quality(metrics),
            parts=sections.parts(metrics),
            layers=sections.layers(metrics),
            boundaries=sections.boundaries(plan_map, metrics),
            plans=sections.plans(metrics),
            gains=sections.gains(metrics),
            solver=sections.solver(metrics),
            healing=sections.healing(metrics),
            routes=routes.routes(metrics),
            timing=sections.timing(metrics),
        )
    )


def model_name(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The model's name, else its class."""
    names = (
        formatting.dig(metrics, "model", "name"),
        formatting.dig(metrics, "model", "class"),
        formatting.dig(plan, "model", "class"),
    )
    return str(next((name for name in names if name), "A model without a recorded name"))


def _breakable(text: object) -> Markup:
    """Text that may wrap after dots, slashes and underscores, as long module paths must on a telephone."""
    marked = str(escape(text))
    for sign in "./_":
        marked = marked.replace(sign, f"{sign}<wbr>")
    return Markup(marked)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hpr.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    environment.globals.update(
        {
            name: getattr(formatting, name)
            for name in ("byte_count", "count", "exact", "figure", "moment", "number", "present", "dig", "table", "percent")
        },
        plan_reading=captions.plan_reading,
        hover=captions.hover,
        stack_note=sections.stack_note,
    )
    return environment
