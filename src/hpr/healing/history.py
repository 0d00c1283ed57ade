"""The record of a healing run: its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Watch = Callable[[Mapping[str, float]], None]  # step, loss and guard at each check
GUARD = "eval_guard"  # what ``GlobalLoss.guard`` gives, as the Trainer's log names it
ENTROPY = "eval_entropy"  # of routes on the batch before, likewise


def history(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row a check of what the Trainer logged: step, the mean loss since the check before, and guard in nats per example.

    Where weights depend on the input also the ``entropy`` of routes, as a share of that of even ones.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        for key, name in (("loss", "loss"), (GUARD, "guard"), (ENTROPY, "entropy")):
            if key in entry:
                rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})[name] = entry[key]
    return [rows[step] for step in sorted(rows)]
