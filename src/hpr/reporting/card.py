"""The model card: README.md with YAML front matter, from plan.json and metrics.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hpr.plans.table import read_plan
from hpr.reporting import captions, formatting, sections
from hpr.reporting.report import model_name

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def render_card(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The README.md of an output folder: figures with what they count, how to load, how it was made, and its limits."""
    name = model_name(plan, metrics)
    plan_map = read_plan(plan)
    sizes = formatting.size_rows(plan, metrics)
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(
            plan=plan,
            metrics=metrics,
            name=name,
            base_model=name if _HUB_NAME.fullmatch(name) else None,
            model_class=formatting.dig(metrics, "model", "class") or formatting.dig(plan, "model", "class"),
            plan_map=plan_map,
            sizes=sizes,
            size={row["key"]: row for row in sizes},
            speed=formatting.speed_lines(formatting.table(metrics, "speed")),
            quality=sections.quality(metrics),
            healing=sections.healing(metrics),
        )
    )


def _plain(value: object) -> str:
    """Text that stays text in Markdown and inside a table: no markup, no HTML, no line break."""
    text = re.sub(r"\s+", " ", str(value).replace("\u00a0", " "))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _code(value: object) -> str:
    """Text as a code span, safe inside a table."""
    text = re.sub(r"[\s|`]+", " ", str(value)).strip()
    return f"`{text or ' '}`"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hpr.reporting", "."),
        autoescape=False,  # Markdown: values pass through `plain`, `code` or `yaml`
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(plain=_plain, code=_code, yaml=lambda value: json.dumps(str(value), ensure_ascii=True))
    environment.globals.update(
        {name: getattr(formatting, name) for name in ("count", "exact", "figure", "moment", "present", "dig", "table")}
    )
    environment.globals["plan_reading"] = captions.plan_reading
    return environment
