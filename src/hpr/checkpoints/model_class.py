"""The class of transformers that a checkpoint means, and the classes that could hold its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from hpr.checkpoints.sentence_folder import SentenceFolder
from hpr.errors import CheckpointError
from hpr.runtime.files import CONFIG

_OF_TASKS = {  # the class that sentence-transformers opens for a task
    "sequence-classification": "AutoModelForSequenceClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "any-to-any": "AutoModelForMultimodalLM",
}


def class_to_open(config: Mapping[str, Any], folder: Path, sentence: SentenceFolder | None) -> Any:
    """The class that ``config.json`` names; for a Transformer of sentence-transformers, the one that its modules read.

    ``AutoModel`` if transformers has none of the named classes, or none is named.
    """
    named = _named(config, folder)
    if sentence is None:
        return named or AutoModel
    if not sentence.headless:
        return getattr(transformers, _OF_TASKS.get(sentence.task, ""), named or AutoModel)
    bases = modeling_auto.MODEL_MAPPING_NAMES.get(str(config.get("model_type")), ())
    bases = (bases,) if isinstance(bases, str) else bases
    encoders = (getattr(transformers, f"{base.removesuffix('Model')}EncoderModel", None) for base in bases)
    encoder = next((encoder for encoder in encoders if encoder is not None), None)  # T5 is read without its decoder
    named_is_headless = named is not None and (named.__name__ in bases or named.__name__.endswith(("EncoderModel", "Encoder")))
    return encoder or (named if named_is_headless else AutoModel)


def _named(config: Mapping[str, Any], folder: Path) -> type[PreTrainedModel] | None:
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"architectures in {folder / CONFIG} is {names!r}, not a list of class names: correct it")
    for name in names:
        kind = getattr(transformers, str(name), None) or _unexported(str(name), config)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return None


def _unexported(name: str, config: Mapping[str, Any]) -> Any:
    """A class that lies in the module of the model type alone, such as an encoder."""
    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING_NAMES:
        return None
    module = model_type_to_module_name(family)
    try:
        return getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name, None)
    except ImportError:  # this family has no file of that name
        return None


def classes_with(folder: Path, keys: Iterable[str]) -> list[str]:
    """Names of the classes for the configuration in a folder that have all of these weights, those with the fewest first."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    wanted, found = set(keys), {}
    mappings = [value for name, value in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("_MAPPING")]
    for kind in {kind for mapping in mappings if type(config) in mapping for kind in _kinds(mapping[type(config)])}:
        with torch.device("meta"):  # without memory
            held = kind(config).state_dict()
        if wanted <= held.keys():
            found[kind.__name__] = len(held)
    return sorted(found, key=lambda name: (found[name], name))


def _kinds(mapped: Any) -> tuple[type[PreTrainedModel], ...]:
    return mapped if isinstance(mapped, tuple) else (mapped,)
