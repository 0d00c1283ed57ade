"""Statistics of routes: which inputs use which expert of a routed model, as values for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpr.data.splits import Splits
from hpr.nn.bank import bank_of, terms_of
from hpr.nn.router import Taken, recorded, spread
from hpr.plans.terms import routers_of
from hpr.runtime.batch import Batch, BatchLike, as_batches, examples_in
from hpr.runtime.hooks import eval_mode, run, to_device_of

SHOWN = 3  # the number of examples for each expert, and of routers with examples
LONGEST = 160  # characters of an example, at most


@torch.no_grad()
def routes(student: nn.Module, kinds: Mapping[str, Sequence[BatchLike]], tokenizer: Any = None) -> dict[str, Any] | None:
    """How a model uses its experts, as JSON values; None for a model whose weights do not depend on the input.

    ``kinds``: batches by the name of their kind. The result has four entries. ``experts``: the largest number of experts of a
    router. ``shares``: router → kind → the share of each expert, averaged over the positions of an example (without padding),
    then over examples; the shares of all experts add up to 1. ``entropy``: the entropy of the shares of a ``single`` example,
    and of the ``mean`` shares, each as a fraction of the entropy of equal shares, averaged over routers. ``nearest``: for the
    routers that distinguish the kinds best (or, with one kind, the examples), the examples that use each expert most. The
    ``tokenizer`` decodes them; without one, ``nearest`` is empty.
    """
    bank = bank_of(student)
    if bank is None or not routers_of(term for terms in terms_of(student).values() for term in terms):
        return None
    by_router: dict[str, dict[str, list[Tensor]]] = {}
    texts: list[str] = []
    with eval_mode(student):
        for kind, batches in kinds.items():
            for batch in as_batches(batches):
                with recorded(bank.routing) as records:
                    run(student, to_device_of(batch, student))
                examples = examples_in(batch)
                for router, rows in _rows_by_router(records, examples).items():
                    by_router.setdefault(router, {}).setdefault(kind, []).append(rows)
                texts += _decoded(batch, tokenizer)
    if not by_router:  # all routers are fixed
        return None
    shares = {router: {kind: torch.cat(rows) for kind, rows in by_kind.items()} for router, by_kind in by_router.items()}
    pooled = {router: torch.cat(list(by_kind.values())) for router, by_kind in shares.items()}
    best = sorted(pooled, key=lambda router: -_distance(list(shares[router].values())))[:SHOWN]
    return {
        "experts": max(rows.shape[1] for rows in pooled.values()),
        "shares": {
            router: {kind: rows.mean(0).tolist() for kind, rows in by_kind.items()} for router, by_kind in shares.items()
        },
        "entropy": {
            "single": _mean([float(spread(rows).mean()) for rows in pooled.values()]),
            "mean": _mean([float(spread(rows.mean(0))) for rows in pooled.values()]),
        },
        "nearest": {router: _nearest(pooled[router], texts) for router in best} if texts else {},
    }


def routes_taken(student: nn.Module, dealt: Mapping[str, Splits], tokenizer: Any) -> dict[str, Any]:
    """``{"routes": …}`` with the result of ``routes`` on the held-out batches, for ``metrics.json``; empty for a static model.

    ``dealt``: the splits of the data by source. Each source is a kind.
    """
    kinds = {name if len(dealt) > 1 else part.source: part.heldout for name, part in dealt.items()}
    statistics = routes(student, kinds, tokenizer)
    return {} if statistics is None else {"routes": statistics}


def _rows_by_router(records: Taken, examples: int) -> dict[str, Tensor]:
    """Router → its shares (examples, experts) in one pass, the mean over its calls.

    Skips calls whose rows cannot be assigned to examples, and routers without other calls.
    """
    rows: dict[str, list[Tensor]] = {}
    for (_, router), calls in records.items():
        for alpha, counted in calls:
            if alpha[..., 0].numel() % examples == 0:
                rows.setdefault(router, []).append(_by_example(alpha, counted, examples))
    return {router: torch.stack(parts).mean(0) for router, parts in rows.items()}


def _by_example(alpha: Tensor, counted: Tensor | None, examples: int) -> Tensor:
    """The shares (examples, experts) in float64 from α, (batch, …, experts) or (batch · positions, experts)."""
    rows = alpha.double().cpu() / alpha.shape[-1]
    if counted is None:
        return rows.reshape(examples, -1, rows.shape[-1]).mean(1)
    weights = counted.double().cpu().unsqueeze(-1)
    return (rows * weights).flatten(1, -2).sum(1) / weights.flatten(1).sum(1, keepdim=True).clamp(min=1)


def _distance(kinds: Sequence[Tensor]) -> float:
    """The mean squared distance of the kinds from their mean; with one kind, that of its examples."""
    rows = torch.stack([rows.mean(0) for rows in kinds]) if len(kinds) > 1 else kinds[0]
    return float((rows - rows.mean(0)).square().sum(1).mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _nearest(rows: Tensor, texts: Sequence[str]) -> list[list[str]]:
    """For each expert, the examples that use it most."""
    return [[texts[index] for index in column.topk(min(SHOWN, len(texts))).indices.tolist()] for column in rows.T]


def _decoded(batch: Batch, tokenizer: Any) -> list[str]:
    """The examples of a batch as text; empty without a tokenizer, and for a batch without token ids."""
    if tokenizer is None or "input_ids" not in batch:
        return []
    return [text[:LONGEST] for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
