"""Which inputs take which route, where the weights of a model depend on the input: values for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpr.data.splits import Splits
from hpr.nn.bank import bank_of, terms_of
from hpr.nn.router import recorded, spread
from hpr.plans.terms import routers_of
from hpr.runtime.batch import Batch, BatchLike, as_batches, examples_in
from hpr.runtime.hooks import eval_mode, run, to_device_of

SHOWN = 3  # examples of a route, and routers of which examples are shown
LONGEST = 160  # characters of an example


@torch.no_grad()
def routes(student: nn.Module, kinds: Mapping[str, Sequence[BatchLike]], tokenizer: Any = None) -> dict[str, Any] | None:
    """Shares of the experts by router and kind of input, entropies, and the examples nearest to each route as JSON values.

    ``kinds``: batches by name. A share is the mean over examples, each the mean over its positions that count; shares of
    all experts add up to 1. Entropies are shares of that of even routes, the mean over routers: of ``single`` examples, and of
    their ``mean``. Examples are decoded by the ``tokenizer`` for the routers that tell kinds, or examples, apart best. None
    for a model whose weights do not depend on the input.
    """
    bank = bank_of(student)
    if bank is None or not routers_of(term for terms in terms_of(student).values() for term in terms):
        return None
    taken: dict[str, dict[str, list[Tensor]]] = {}
    texts: list[str] = []
    with eval_mode(student):
        for kind, batches in kinds.items():
            for batch in as_batches(batches):
                with recorded(bank.routing) as found:
                    run(student, to_device_of(batch, student))
                several: dict[str, list[Tensor]] = {}
                examples = examples_in(batch)
                for (_, router), calls in found.items():
                    apart = [one for one in calls if one[0][..., 0].numel() % examples == 0]  # not what is of no one example
                    several.setdefault(router, []).extend(_by_example(*one, examples) for one in apart)
                for router, parts in ((router, parts) for router, parts in several.items() if parts):
                    taken.setdefault(router, {}).setdefault(kind, []).append(torch.stack(parts).mean(0))
                texts += _decoded(batch, tokenizer)
    if not taken:  # routers that no input changes
        return None
    shares = {router: {kind: torch.cat(rows) for kind, rows in by_kind.items()} for router, by_kind in taken.items()}
    every = {router: torch.cat(list(by_kind.values())) for router, by_kind in shares.items()}
    telling = sorted(every, key=lambda router: -_told(list(shares[router].values())))[:SHOWN]
    return {
        "experts": max(rows.shape[1] for rows in every.values()),
        "shares": {name: {kind: rows.mean(0).tolist() for kind, rows in own.items()} for name, own in shares.items()},
        "entropy": {
            "single": _mean([float(spread(rows).mean()) for rows in every.values()]),
            "mean": _mean([float(spread(rows.mean(0))) for rows in every.values()]),
        },
        "nearest": {router: _nearest(every[router], texts) for router in telling} if texts else {},
    }


def routes_taken(student: nn.Module, dealt: Mapping[str, Splits], tokenizer: Any) -> dict[str, Any]:
    """``routes`` of what sources held out, under that name for ``metrics.json``; nothing for a static model."""
    kinds = {name if len(dealt) > 1 else part.source: part.heldout for name, part in dealt.items()}
    found = routes(student, kinds, tokenizer)
    return {} if found is None else {"routes": found}


def _by_example(alpha: Tensor, counted: Tensor | None, examples: int) -> Tensor:
    """(batch, …, experts), or (batch · positions, experts), as (batch, experts), float64, adding up to 1."""
    rows = alpha.double().cpu() / alpha.shape[-1]
    if counted is None:
        return rows.reshape(examples, -1, rows.shape[-1]).mean(1)
    kept = counted.double().cpu().unsqueeze(-1)
    return (rows * kept).flatten(1, -2).sum(1) / kept.flatten(1).sum(1, keepdim=True).clamp(min=1)


def _told(kinds: Sequence[Tensor]) -> float:
    """How far kinds lie apart; with one kind, how far its examples do."""
    rows = torch.stack([rows.mean(0) for rows in kinds]) if len(kinds) > 1 else kinds[0]
    return float((rows - rows.mean(0)).square().sum(1).mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _nearest(rows: Tensor, texts: Sequence[str]) -> list[list[str]]:
    """For each expert the examples that use it most."""
    return [[texts[place] for place in column.topk(min(SHOWN, len(texts))).indices.tolist()] for column in rows.T]


def _decoded(batch: Batch, tokenizer: Any) -> list[str]:
    if tokenizer is None or "input_ids" not in batch:
        return []
    return [text[:LONGEST] for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
