"""Turns a user's data (texts, tables, arrays, data sets) into batches, and divides them between the uses of data."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from hpr.data.batches import Batches, array_batches, first_batches, given_batches, input_batches, labelled, listed, text_batches
from hpr.data.datasets import are_objects, is_frame, read_columns
from hpr.data.docstrings import Split, docstrings
from hpr.data.files import format_of, read_array, read_examples, suffixes
from hpr.data.loaded_model import LoadedModel
from hpr.data.sources import Columns, Mixture, interleaved, with_shares
from hpr.data.targets import longest_input, own_answers
from hpr.errors import DataError, HprError
from hpr.profiling.first_pass import check_batches, reading
from hpr.runtime.batch import Batch, examples_in

_log = logging.getLogger(__name__)
PROFILED = 4096  # examples that a profile is measured on
TRAINED = 65536  # examples that healing trains on
RESCORED = 256  # examples that plans are re-scored on
EVALUATED = 1024  # held-out examples for the final figures
_VALIDATION_EVERY = 8  # one of so many examples that the profile does not use is for validation
_SMALLEST_VALIDATION = 32  # with fewer examples healing validates on the re-scoring examples instead


@dataclass(frozen=True)
class Rows:
    """The examples of a source: texts, an array, or mappings of model inputs.

    ``name`` names the source in reports and error messages. ``labels`` holds one label for each example, or None.
    """

    values: list[Any] | np.ndarray
    name: str
    labels: list[float] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: Sequence[int]) -> Rows:
        """The examples at some indices, with their labels."""
        values = self.values[list(places)] if isinstance(self.values, np.ndarray) else [self.values[i] for i in places]
        return Rows(values, self.name, None if self.labels is None else [self.labels[i] for i in places])


def rows_of(data: Any, split: Split = "calibration", labels: bool = False) -> Rows:
    """The examples of a file, a list of texts, an array or a data set with columns; docstrings for None.

    ``hpr.data.files.FORMATS`` lists the formats of files. ``Columns`` name the columns of texts and labels. ``labels`` says
    whether the examples need labels. Raises ``DataError`` for any other kind of data, for empty or damaged files, and if
    labels are needed and the data has none.
    """
    column, label = None, None
    if isinstance(data, Columns):
        data, column, label = data.data, data.column, data.label
    has_columns = hasattr(data, "column_names") or is_frame(data) or are_objects(data)
    is_file = isinstance(data, str | os.PathLike)
    if (column, label) != (None, None) and not (has_columns or is_file):
        raise DataError(f"Columns holds a {type(data).__name__}, which has no columns of text: give a file or a data set")
    if isinstance(data, Mapping | Mixture):
        raise DataError("a source of data is a mapping or a Mixture: give all sources in one mapping or Mixture")
    if data is None:
        _log.info("no data is given: HPR reads docstrings of Python's standard library instead (%s part)", split)
        rows = Rows(docstrings(split), "docstrings of Python's standard library")
    elif has_columns:
        rows = Rows(*read_columns(data, labels, column, label))
    elif isinstance(data, np.ndarray) and data.ndim == 1 and all(isinstance(value, str) for value in data[:1]):
        rows = Rows(data.tolist(), "the texts given")
    elif isinstance(data, np.ndarray):
        rows = Rows(read_array(data), "the array given")
    elif is_file and format_of(data).array is not None:
        if label is not None:
            raise DataError(f"{data} holds arrays, which have no column of labels {label!r}: leave it out, or give a table")
        rows = Rows(read_array(data, None if column is None else str(column)), Path(data).name)
    elif is_file:
        values, numbers = read_examples(data, labels, column, label)
        rows = Rows(values, Path(data).name, numbers)
    elif hasattr(data, "__iter__") and not isinstance(data, bytes | bytearray):
        rows = Rows(list(data), "the texts given")
    else:
        raise DataError(f"data is a {type(data).__name__}, which HPR cannot read: give texts, a file, an array or a data set")
    if labels and rows.labels is None:
        raise DataError(
            f"labels count in the loss, but {rows.name} has none: set their weight to 0, or give a column 'label' "
            f"or another name for it, as in hpr.extras.Columns(data, label=...)"
        )
    if rows.labels is not None and len(rows.labels) != len(rows):
        raise DataError(f"{rows.name} has {len(rows)} examples and {len(rows.labels)} labels: give each text one label")
    return rows


def open_data(
    data: Any,
    model: LoadedModel,
    split: Split = "calibration",
    examples: int = PROFILED,
    batch_size: int = 64,
    max_length: int = 256,
) -> tuple[Batches, str]:
    """Batches for a single use of data, and a name for the data. ``prepare`` divides data between all uses.

    ``data``: any kind that ``prepare`` takes. HPR reads the first ``examples`` examples; several sources divide this number by
    their shares. ``split`` has an effect on docstrings only. A causal language model reads a text longer than ``max_length``
    tokens in several examples. A sequence-to-sequence model gets the targets that it generates (see ``own_answers``).

    Raises ``DataError`` for texts if the model has no tokenizer, and for empty, damaged or non-finite data; ``HprError`` for
    ``examples`` below 1.

    >>> batches, label = open_data(["some text", "another text"], loaded)  # doctest: +SKIP
    """
    if examples < 1:
        raise HprError(f"examples is {examples}: give at least 1")
    batches: list[Batches] = []
    labels = []
    for source, share in with_shares(listed(data)).values():
        given = given_batches(source)
        if given is not None:
            batches.append(_whole(given))
            labels.append(f"{len(given)} batches")
            continue
        rows = rows_of(source, split)
        batches.append(_batches(rows, model, math.ceil(examples * share), batch_size, max_length))
        labels.append(f"{rows.name} ({split} part)" if source is None else rows.name)
    return interleaved(batches), ", ".join(labels)


@dataclass(frozen=True)
class Splits:
    """Batches for each use of data.

    ``calibration`` is for the profile, ``rescoring`` for the choice between plans, and ``heldout`` for the final figures. These
    three share no example. ``training`` and ``validation`` are for healing. ``training`` holds the examples of
    ``calibration`` and further ones up to a limit. ``validation`` holds examples that the profile and the choice of a plan do
    not use. Both are tokenised at their first use.

    If the data is too small for a separate validation part, ``validation`` is ``rescoring``. If the teacher generates the
    targets, ``validation`` is ``rescoring`` and ``training`` is ``calibration``.

    ``source`` names the data in reports. ``own`` says whether the user gave the data; a refit then adapts the model to the data
    of its later use. ``more`` makes ``training`` and ``validation``. ``parts`` and ``shares`` hold the splits and the share of
    each source by name.
    """

    calibration: Batches
    rescoring: Batches
    heldout: Batches
    source: str
    own: bool
    more: Callable[[], tuple[Batches, Batches]] | None = field(default=None, repr=False, compare=False)
    parts: Mapping[str, Splits] = field(default_factory=dict, repr=False, compare=False)
    shares: Mapping[str, float] | None = None

    @cached_property
    def _healing(self) -> tuple[Batches, Batches]:
        return (self.calibration, self.rescoring) if self.more is None else self.more()

    def check(self, model: LoadedModel) -> None:
        """Raise ``DataError`` if a model cannot read the batches beside those of the profile, which looks at its own.

        A few examples are run.
        """
        for part in self.parts.values() or (self,):
            for batches in (part.rescoring, part.heldout):
                check_batches(model.model, batches, model.goal)

    @property
    def training(self) -> Batches:
        """The batches that healing trains on."""
        return self._healing[0]

    @property
    def validation(self) -> Batches:
        """The batches on which healing compares weights, to keep the best ones."""
        return self._healing[1]


def prepare(data: Any, model: LoadedModel, examples: int = PROFILED, labels: bool = False, share: float = 1.0) -> Splits:
    """Data of any kind as batches for a model, divided between all uses of data (see ``Splits``).

    ``data``: texts, a file (see ``hpr.data.files.FORMATS``), an array, a data set, ``Columns`` of these, batches of model
    inputs, None for the standard library's docstrings, a mapping of names to these, or a ``Mixture``. ``Splits`` come back
    unchanged. ``labels`` says whether batches keep the labels of the data.

    The parts have limits in examples: ``examples`` for the profile, 256 for re-scoring, 1,024 held out and 65,536 for training.
    ``share`` scales these limits, and several sources divide them by their shares.

    Of every eight examples one is for re-scoring and one is held out, so that a sorted file is split fairly. Given batches are
    divided in the same way and stay whole. Docstrings have a separate held-out part.

    Raises ``DataError`` for unreadable data, and for fewer than eight examples or batches of a source; ``HprError`` for
    ``examples`` below 2.

    >>> splits = prepare("texts.txt", open_model("bert-base-uncased"))  # doctest: +SKIP
    >>> profile = hpr.profile(model, splits.calibration)  # doctest: +SKIP
    """
    if isinstance(data, Splits):
        return data
    sources = with_shares(listed(data))
    parts = {name: _dealt(source, model, examples, labels, share * part) for name, (source, part) in sources.items()}
    return replace(_joined(list(parts.values())), parts=parts, shares=data.shares if isinstance(data, Mixture) else None)


def _dealt(data: Any, model: LoadedModel, examples: int, labels: bool, share: float) -> Splits:
    """The splits of one source."""
    if examples < 2:
        raise HprError(f"examples is {examples}: give at least 2")
    given = given_batches(data)
    if given is not None:
        return _dealt_batches(given, examples)
    given_by_user, rows = data is not None, rows_of(data, labels=labels)
    if len(rows) < 8:
        raise DataError(f"{len(rows)} examples are too few to profile, re-score and evaluate on: give at least 8")
    turns = [index % 8 for index in range(len(rows))]
    parts = [[i for i, turn in enumerate(turns) if turn in wanted] for wanted in ((0, 2, 4, 5, 6, 7), (1,), (3,))]
    if not given_by_user:
        parts[0] = [i for i, turn in enumerate(turns) if turn != 1]
    dealt = [rows.take(part) for part in parts]
    if not given_by_user:
        dealt[2] = rows_of(None, "heldout")
    limits = [math.ceil(share * min(most, examples)) for most in (examples, RESCORED, EVALUATED)]
    first, second, third = (_batches(part, model, limit) for part, limit in zip(dealt, limits, strict=True))
    spare, most = range(limits[0], len(dealt[0])), math.ceil(share * TRAINED)
    chosen = set(spare[: max(0, most - limits[0]) : _VALIDATION_EVERY][:RESCORED])
    if model.goal.writes_targets or len(chosen) < _SMALLEST_VALIDATION:
        _log.info("%s: healing validates on the re-scoring part", rows.name)
        chosen = set()

    def more() -> tuple[Batches, Batches]:
        trained = [place for place in range(min(most, len(dealt[0]))) if place not in chosen]
        calibration_only = model.goal.writes_targets or len(trained) <= limits[0]
        training = first if calibration_only else _batches(dealt[0].take(trained), model, most)
        return training, _batches(dealt[0].take(sorted(chosen)), model, RESCORED) if chosen else second

    return Splits(first, second, third, rows.name, given_by_user, more)


def _dealt_batches(batches: list[Batch], examples: int) -> Splits:
    """The splits of batches of model inputs: of every eight batches one is for re-scoring and one is held out."""
    if len(batches) < 8:
        raise DataError(f"{len(batches)} batches are too few to profile, re-score and evaluate on: give at least 8")
    first = [batch for place, batch in enumerate(batches) if place % 8 not in (1, 3)]
    calibration = first_batches(first, examples)
    more = None if len(calibration) == len(first) else lambda: (_whole(first), _whole(batches[1::8]))
    return Splits(_whole(calibration), _whole(batches[1::8]), _whole(batches[3::8]), f"{len(batches)} batches", True, more)


def _whole(batches: list[Batch]) -> Batches:
    """``Batches`` whose examples are in the order of the user's data."""
    return Batches(batches, range(sum(examples_in(batch) for batch in batches)))


def _joined(parts: Sequence[Splits]) -> Splits:
    """The splits of several sources combined into one."""
    if len(parts) == 1:
        return parts[0]
    return Splits(
        interleaved([part.calibration for part in parts]),
        interleaved([part.rescoring for part in parts]),
        interleaved([part.heldout for part in parts]),
        ", ".join(part.source for part in parts),
        all(part.own for part in parts),
        lambda: (interleaved([part.training for part in parts]), interleaved([part.validation for part in parts])),
    )


def _batches(rows: Rows, model: LoadedModel, examples: int, batch_size: int = 64, max_length: int = 256) -> Batches:
    """The first examples as batches of inputs for the model, with generated targets if the objective needs them."""
    rows = rows.take(range(min(examples, len(rows))))
    if isinstance(rows.values, np.ndarray):
        batches = array_batches(rows.values, batch_size=batch_size, argument=getattr(model.model, "main_input_name", None))
    elif isinstance(rows.values[0], Mapping):
        batches = input_batches(rows.values, batch_size)
    else:
        if (reads := _reads_instead_of_text(model.model)) is not None:
            raise DataError(f"{model.label} reads {reads}, not text: give its inputs as a file ({suffixes('array')})")
        if model.tokenizer is None:
            raise DataError(
                f"{model.label} has no tokenizer, so it cannot read text: give its inputs as a file ({suffixes('array')})"
            )
        windows = examples if model.goal.shifts_labels else None
        length = min(max_length, longest_input(model.model))
        batches = text_batches(rows.values, model.tokenizer, batch_size, length, windows)
        if rows.labels is not None and windows is None:
            batches = labelled(batches, rows.labels)
    if not model.goal.writes_targets:
        return batches
    _log.info("%s generates the targets of batches without labels", model.label)
    answered = []
    for index, batch in enumerate(batches):
        with reading(model.model, batch, index):
            answered.append(batch if "labels" in batch else {**batch, "labels": own_answers(model.model, batch)})
    return Batches(answered, batches.order)


def _reads_instead_of_text(model: nn.Module) -> str | None:
    """The main input of a transformers model that takes no token ids, such as pixel_values; None for any other model."""
    name = getattr(model, "main_input_name", None)
    if not isinstance(model, PreTrainedModel) or name == "input_ids":
        return None
    return None if "input_ids" in inspect.signature(model.forward).parameters else name
