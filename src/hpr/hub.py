"""Save, load, and the hook by which plain ``from_pretrained`` rebuilds a shared model once hpr is imported.

The hook is a quantizer registered with transformers under the name ``hpr``: ``config.json`` names it and holds all that
loading needs. It attaches the sites before the weights are read, checks that the checkpoint has every factor, and then
leaves the model, so that nothing takes it for a quantised one. Without hpr, loading stops at the shape of the sites'
one-element ``weight``, and the report that transformers prints lists a key that reads "import hpr before loading".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hpr.anatomy import has_module, slice_at
from hpr.bank import BANK, FORMAT, METHOD, FactorBank, bank_of, factors_of
from hpr.errors import HprError
from hpr.experts import SharedExperts
from hpr.folders import CONFIG, copy_sentence_files, read_config, replace
from hpr.planning.terms import FactorShape, entry_from_dict
from hpr.sharing import attach
from hpr.sites import SharedSite, is_specification, specification

WEIGHTS = "model.safetensors"
_ALIGNMENT = 64  # bytes, as torch allocates on a processor


class HprConfig(QuantizationConfigMixin):
    """What ``config.json`` holds of a shared model (see ``hpr.sites.specification``)."""

    def __init__(
        self,
        sites: Mapping[str, list[dict[str, Any]]],
        factors: Mapping[str, list[Any]],
        aliases: Mapping[str, list[str]] | None = None,
        layers: Mapping[str, str] | None = None,
        quant_method: str = METHOD,
        format: int = FORMAT,
        hpr_version: str = "",
        **unknown: Any,
    ):
        if format != FORMAT:
            raise HprError(
                f"the checkpoint has format {format!r}, this hpr reads {FORMAT}: hpr {hpr_version} or later reads it"
            )
        if unknown:
            raise HprError(f"{CONFIG} has {sorted(unknown)[0]!r} in quantization_config, which hpr does not know: remove it")
        self.quant_method = quant_method  # type: ignore[assignment]  # an open set of names, typed as a closed one
        self.format = format
        self.hpr_version = hpr_version
        self.sites = dict(sites)
        self.factors = dict(factors)
        self.aliases = dict(aliases or {})
        self.layers = dict(layers or {})


class HprQuantizer(HfQuantizer):
    """Rebuilds the sites while transformers loads a checkpoint; it does not stay on the model."""

    quantization_config: HprConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        bank = rebuild(model, self.quantization_config)
        if bank is not None and checkpoint_files:
            _check_checkpoint(bank, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        bank = bank_of(model)
        self.remove_quantization_config(model)  # else half() raises, Trainer refuses and a passed state_dict is ignored
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        if bank is not None:
            _check_loaded(bank)
            model.config.quantization_config = specification(model)
            _settle(bank, [module for module in model.modules() if isinstance(module, SharedSite | SharedExperts)])
            _align(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know hpr; harmless when repeated."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, HprConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, HprQuantizer)


register()


def rebuild(model: nn.Module, config: HprConfig) -> FactorBank | None:
    """Attach the sites that a checkpoint describes, as far as this class has them: a head may be absent, or be another.

    Returns the bank, its factors not yet loaded, or None where the model has none of the sites. Raises ``HprError``
    where the description contradicts itself or the model.
    """
    try:
        terms = {path: entry_from_dict(path, {"operator": "", "terms": raw}).terms for path, raw in config.sites.items()}
        shapes = {name: FactorShape(*shape) for name, shape in config.factors.items()}
        terms = {path: listed for path, listed in terms.items() if _has(model, path)}
        aliases = {path: [alias for alias in config.aliases.get(path, ()) if _has(model, alias)] for path in terms}
        layers = {path: state for path, state in config.layers.items() if _has(model, path)}
    except (TypeError, KeyError, AttributeError) as error:
        raise HprError(f"{CONFIG} does not describe shared sites ({error}): save the model again with hpr") from error
    used = {name for listed in terms.values() for name in factors_of(listed)}
    if missing := sorted(used - set(shapes)):
        raise HprError(f"{CONFIG} has no shape for factor {missing[0]!r}: save the model again with hpr")
    if not terms and not layers:
        return None
    return attach(model, terms, {name: shape for name, shape in shapes.items() if name in used}, aliases, layers=layers)


def save(
    student: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    files: Mapping[str, str] | Callable[[Path], Mapping[str, str]] | None = None,
    source: Path | None = None,
) -> Path:
    """Write a model with all that belongs to it into ``folder``, at once: a crash leaves the old folder or none.

    ``files``: name → text (``plan.json``, ``README.md``), or a function that gives them once it sees the folder with the
    weights in it (to hash them). ``source``: the original's folder, from which the files of a
    sentence encoder (``modules.json``, pooling) are copied. A folder written by HPR before is replaced, what else lies in
    it stays; any other folder with content raises ``HprError``. Returns the folder.
    """
    target = check_folder(folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(student, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if source is not None:
            copy_sentence_files(Path(source), partial)
        for name, text in (files(partial) if callable(files) else files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Where ``save`` would write. Raises ``HprError`` for a folder with content that is not from HPR."""
    target = Path(folder).resolve()
    if target.exists() and not _is_output(target):
        raise HprError(f"{target} has content that is not from HPR: choose another output folder, or empty this one")
    return target


def _is_output(folder: Path) -> bool:
    """Whether a folder is empty or an output of HPR: a shared model, or a plan beside a model."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    if not (folder / CONFIG).is_file():
        return False
    config = read_config(folder)
    return is_specification(config.get("quantization_config")) or (folder / "plan.json").is_file()


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save`` wrote into a freshly built plain module of the same architecture, in place, and return it.

    Transformers models are loaded by ``from_pretrained``. Raises ``HprError`` where a file is missing or damaged, or a
    parameter is missing, superfluous or of another shape.
    """
    path = Path(folder)
    config = read_config(path).get("quantization_config")
    if not is_specification(config) and config is not None:
        raise HprError(f"{path / CONFIG} describes another quantisation: load it with the tool that wrote it")
    bank = rebuild(model, HprConfig(**config)) if config is not None else None
    _check_checkpoint(bank, [str(path / WEIGHTS)])
    try:
        load_model(model, path / WEIGHTS, strict=True)
    except RuntimeError as error:
        raise HprError(f"{path / WEIGHTS} does not fit this {type(model).__name__}: {error}; build it as it was") from error
    return model


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has(model: nn.Module, path: str) -> bool:
    return slice_at(model, path) is not None or has_module(model, path)


def _check_checkpoint(bank: FactorBank | None, files: Iterable[str]) -> None:
    """Raise where a file is damaged, or a factor is missing or of another shape: transformers would only warn."""
    found: dict[str, tuple[int, ...]] = {}
    names = [name for name in files if name.endswith(".safetensors")]
    for name in names:
        try:
            with safe_open(name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    found[key[key.find(f"{BANK}.") :]] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise HprError(f"{name} is damaged ({error}): copy or download it again") from error
    if not names or bank is None:
        return
    for name, tensor in bank.factors.state_dict().items():
        shape = found.get(f"{BANK}.factors.{name}")
        if shape != tuple(tensor.shape):
            what = "is missing" if shape is None else f"has shape {shape}"
            raise HprError(
                f"factor {name} {what} in {', '.join(names)}, {CONFIG} asks for {tuple(tensor.shape)}: "
                f"the two files are not from one save; save or download them again"
            )


def _check_loaded(bank: FactorBank) -> None:
    """The same for checkpoints that are no safetensors files: transformers marks what it has loaded."""
    for name, tensor in bank.factors.state_dict(keep_vars=True).items():
        if not getattr(tensor, "_is_hf_initialized", False):
            raise HprError(f"factor {name} was not in the weights given: pass all that save_pretrained wrote")


def _settle(bank: FactorBank, readers: Sequence[SharedSite | SharedExperts]) -> None:
    """Give each factor the dtype in which transformers loaded its sites (T5 keeps ``wo`` in float32), and clear placeholders.

    Transformers goes by names, and those of factors may contain ``wo`` by chance.
    """
    dtypes: dict[str, torch.dtype] = {}
    for reader in readers:
        for placeholder in reader.placeholders:
            found = reader.get_buffer(placeholder)
            for name in factors_of(term for terms in reader.terms_by_path.values() for term in terms):
                dtypes[name] = torch.promote_types(dtypes.get(name, found.dtype), found.dtype)
            reader._buffers[placeholder] = torch.zeros_like(found)
    for name, dtype in dtypes.items():
        bank[name].to(dtype)


def _align(model: nn.Module) -> None:
    """Move weights that lie where the file happens to hold them to addresses such as torch gives.

    Kernels differ by alignment, and their rounding with them: a model would not compute bit for bit what it did when saved.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _write_model(student: nn.Module, folder: Path) -> None:
    if isinstance(student, PreTrainedModel):
        student.save_pretrained(folder)
        _readable(folder)
        return
    config = {} if bank_of(student) is None else {"quantization_config": specification(student)}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_model(student, str(folder / WEIGHTS))  # tied parameters once
    _readable(folder)


def _readable(folder: Path) -> None:
    """Weights with the rights of any new file: safetensors writes them for their owner alone."""
    mode = (folder / CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
