"""Reporting writes the report and the model card from saved artifacts (plan.json, metrics.json) alone."""

from hpr.reporting.card import render_card
from hpr.reporting.report import render_report

__all__ = ["render_card", "render_report"]
