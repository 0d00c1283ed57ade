"""The record of a healing run: one row for each check on the validation set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VALIDATION = "eval_validation"  # the name of ``GlobalLoss.validate`` in the Trainer's log
ENTROPY = "eval_entropy"  # the name of the routers' entropy on the last training batch in the Trainer's log


def history(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return one row per check: step, mean training loss since the last check, and validation loss in nats per example.

    Models with routers also have ``entropy``, that of single routes relative to even routes.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        for key, name in (("loss", "loss"), (VALIDATION, "validation"), (ENTROPY, "entropy")):
            if key in entry:
                rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})[name] = entry[key]
    return [rows[step] for step in sorted(rows)]
