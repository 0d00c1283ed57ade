"""The hook by which plain ``from_pretrained`` rebuilds a shared model once hpr is imported.

The hook is a quantizer registered with transformers under the name ``hpr``: ``config.json`` names it and holds all that
loading needs. It attaches the sites before the weights are read, checks that the checkpoint has every factor, and then
leaves the model, so that nothing takes it for a quantised one. Without hpr, loading stops at a name in the configuration,
which says what to install (see ``sharing.specification``). Loaders that pass that by fail on the shape of the sites'
one-element ``weight``. Programs that do not import hpr themselves get it by ``hpr_autoload``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, fusion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hpr.anatomy.lookup import has_module, slice_at
from hpr.checkpoints.aligned import ALIGNMENT
from hpr.checkpoints.decode import Decode, Decoded, DecodeExperts, DecodePack, DecodeWeight, decodes
from hpr.checkpoints.devices import check_devices, tie_on_disk
from hpr.checkpoints.save import check_checkpoint, check_hashes, has_own_names, shapes_in
from hpr.coding.tables import ans
from hpr.errors import CheckpointError
from hpr.nn.bank import FORMAT, METHOD, FactorBank, bank_of
from hpr.nn.coded import attach_codes
from hpr.nn.folded import attach_folded, folded_in
from hpr.nn.site import BankReader
from hpr.plans.terms import FactorShape, factors_of, terms_from_list
from hpr.runtime.files import CONFIG
from hpr.sharing.attach import attach
from hpr.sharing.specification import NEEDS_HPR, forget_specification, is_specification, note_specification


class HprConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a shared model (see ``sharing.specification``)."""

    def __init__(
        self,
        sites: Mapping[str, list[dict[str, Any]]],
        factors: Mapping[str, list[Any]],
        aliases: Mapping[str, list[str]] | None = None,
        layers: Mapping[str, str] | None = None,
        coded: Mapping[str, Any] | None = None,
        folded: Mapping[str, int] | None = None,
        objective: str | None = None,
        quant_method: str = METHOD,
        format: int = FORMAT,
        hpr_version: str = "",
        **unknown: Any,
    ):
        if format != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {format!r}, this hpr reads {FORMAT}: hpr {hpr_version} or later reads it"
            )
        if unknown:
            raise CheckpointError(
                f"{CONFIG} has {sorted(unknown)[0]!r} in quantization_config, which hpr does not know: remove it"
            )
        given = {"sites": sites, "factors": factors, "aliases": aliases or {}, "layers": layers or {}, "coded": coded or {}}
        given["folded"] = folded or {}
        for key, value in given.items():
            if not isinstance(value, Mapping):
                raise CheckpointError(
                    f"{key} in quantization_config of {CONFIG} is {value!r:.80}, not a mapping: save the model again with hpr"
                )
        if not isinstance(objective, str | None):
            raise CheckpointError(
                f"objective in quantization_config of {CONFIG} is {objective!r:.80}, not a name: save the model again with hpr"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an open set of names, typed as a closed one
        self.format = format
        self.hpr_version = hpr_version
        self.sites = dict(sites)
        self.factors = dict(factors)
        self.aliases = dict(aliases or {})
        self.layers = dict(layers or {})
        self.coded = dict(coded or {})
        self.folded = dict(folded or {})
        self.objective = objective


class HprQuantizer(HfQuantizer):
    """Rebuilds the sites while transformers loads a checkpoint; it does not stay on the model."""

    quantization_config: HprConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **options: Any):
        super().__init__(quantization_config, **options)
        self.decoded = Decoded()
        self.own_names = False  # whether the files have the names of the model's modules

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.coded:
            ans()  # raises if the decoder is not installed
            check_hashes(checkpoint_files or (), self.quantization_config.coded.get("hashes", {}))
        attach_folded(model, self.quantization_config.folded)
        bank = rebuild(model, self.quantization_config)
        if bank is not None:  # until the weights are loaded
            model.initialize_weights = functools.partial(_initialise, model)  # type: ignore[method-assign]
        if bank is not None and checkpoint_files and not self.quantization_config.coded:  # coded files have hashes
            check_checkpoint(bank, checkpoint_files)
        if checkpoint_files and has_own_names(model):  # but what transformers itself saves has the names of older files
            coded = bool(self.quantization_config.coded)
            self.own_names = coded or shapes_in(checkpoint_files).keys() <= model.state_dict().keys()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        bank = bank_of(model)
        vars(model).pop("initialize_weights", None)
        self.remove_quantization_config(model)  # else half() raises, Trainer refuses and a passed state_dict is ignored
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        if bank is not None:
            _check_loaded(bank)
            check_devices(getattr(model, "hf_device_map", {}))
            note_specification(model)
            _settle(bank, _readers(model))
            _align(model)
        if self.quantization_config.folded:
            check_folded(model)
            note_specification(model)
        if described := self.quantization_config.coded:
            if bank is None:
                forget_specification(model)  # its weights are plain now, and a plain save writes them
            if described["pack"] is not None and not self.decoded.unpacked:
                raise CheckpointError(
                    f"the weights of this {type(model).__name__} lie packed in {described['pack']}, which it has not: load the "
                    f"class that was saved"
                )
            attach_codes(model, self.decoded.coded, self.quantization_config.objective, self.decoded.others)
            tie_on_disk(model)
            _align(model)
        conversions = getattr(model, "_weight_conversions", None) or []
        others = [conversion for conversion in conversions if not decodes(conversion)]
        # a plain save reverses them; None stands for those of the class
        model._weight_conversions = None if self.own_names else others  # type: ignore[assignment]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Files in the model's own names need none of the conversions of its class, which may change such names once more."""
        if self.own_names:
            return self.get_weight_conversions()
        return super().update_weight_conversions(weight_conversions, model)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """A coded weight becomes a plain one while it is loaded."""
        described = self.quantization_config.coded
        if not described:
            return []
        keys: dict[str, Decode] = {f"{path}.weight": DecodeWeight(self.decoded) for path in described["sites"]}
        keys |= {parameter: DecodeExperts(self.decoded) for parameter in described.get("experts", ())}
        if described["pack"] is not None:
            keys[described["pack"]] = DecodePack(self.decoded)
        return [WeightConverter(rf"(?<![^.]){re.escape(key)}$", key, [decode]) for key, decode in keys.items()]

    def get_new_dtype(self, converter: Any, param: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
        """Streams stay bytes: transformers casts everything else before it converts."""
        return None if isinstance(converter, WeightConverter) and converter.operations else dtype

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


_merge = AutoHfQuantizer.merge_quantization_configs


def _merged(described: Any, given: Any) -> Any:
    """As in transformers, which would say only that the two configurations are of different classes."""
    if is_specification(described) and given is not None and not is_specification(given):
        raise CheckpointError(
            f"this checkpoint was compressed by hpr, so a {type(given).__name__} cannot be applied while it is loaded: load it "
            f"without quantization_config, and quantise hpr.fold(model); or save hpr.unshare(model), and load that with it"
        )
    return _merge(described, given)


def register() -> None:
    """Make transformers know hpr; harmless when repeated."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, HprConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, HprQuantizer)
    fusion_mapping._FUSION_REGISTRY.setdefault(NEEDS_HPR, None)  # type: ignore[arg-type]  # it is never switched on
    AutoHfQuantizer.merge_quantization_configs = staticmethod(_merged)  # type: ignore[method-assign,assignment]


register()


def rebuild(model: nn.Module, config: HprConfig) -> FactorBank | None:
    """Attach the sites that a checkpoint describes, as far as this class has them: a head may be absent, or be another.

    Returns the bank, its factors not yet loaded, or None if the model has none of the sites. Raises ``CheckpointError``
    where the description contradicts itself or the model.
    """
    try:
        terms = {path: terms_from_list(path, raw) for path, raw in config.sites.items()}
        shapes = {name: FactorShape(*shape) for name, shape in config.factors.items()}
        terms = {path: listed for path, listed in terms.items() if _has(model, path)}
        aliases = {path: [alias for alias in config.aliases.get(path, ()) if _has(model, alias)] for path in terms}
        layers = {path: state for path, state in config.layers.items() if _has(model, path)}
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG} does not describe shared sites ({error}): save the model again with hpr") from error
    used = {name for listed in terms.values() for name in factors_of(listed)}
    if missing := sorted(used - set(shapes)):
        raise CheckpointError(f"{CONFIG} has no shape for factor {missing[0]!r}: save the model again with hpr")
    if not terms and not layers:
        return None
    bank = attach(model, terms, {name: shape for name, shape in shapes.items() if name in used}, aliases, layers=layers)
    bank.objective = config.objective
    return bank


def _initialise(model: PreTrainedModel) -> None:
    """What transformers runs for missing weights, while placeholders have the shapes of the weights that they stand for.

    Some classes fill the table of a child by its shape (Whisper). The stand-ins count as loaded and have no numbers.
    """
    kept = [(reader, name, reader._buffers[name]) for reader in _readers(model) for name in reader.placeholders]
    for reader, name, _ in kept:
        if (weight := reader.template._parameters.get(name)) is not None:
            shaped: Any = weight.detach()
            shaped._is_hf_initialized = True
            reader._buffers[name] = shaped
    try:
        type(model).initialize_weights(model)
    finally:
        for reader, name, placeholder in kept:
            reader._buffers[name] = placeholder


def _readers(model: nn.Module) -> list[BankReader]:
    return [module for module in model.modules() if isinstance(module, BankReader)]


def _has(model: nn.Module, path: str) -> bool:
    return slice_at(model, path) is not None or has_module(model, path)


def _check_loaded(bank: FactorBank) -> None:
    """The same for checkpoints that are no safetensors files: transformers marks what it has loaded."""
    for name, tensor in bank.factors.state_dict(keep_vars=True).items():
        if not tensor.is_meta and not getattr(
            tensor, "_is_hf_initialized", False
        ):  # offloaded ones are read when they are used
            raise CheckpointError(f"factor {name} was not in the weights given: pass all that save_pretrained wrote")


def check_folded(model: nn.Module) -> None:
    """Raise where a weight of a folded Linear was not in the files: transformers would only warn."""
    for path, module in folded_in(model).items():
        for name, tensor in module.named_parameters():
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(f"{path}.{name} was not in the weights: {CONFIG} and weights are not from one save")


def _settle(bank: FactorBank, readers: Sequence[BankReader]) -> None:
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
        bank.stored(name).to(dtype)


def _align(model: nn.Module) -> None:
    """Move weights that a file is mapped to at odd addresses to addresses aligned like torch's own.

    Kernels and their rounding differ by alignment: the model would not compute bit for bit what it did when it was saved. Most
    weights in files that ``hpr.save`` wrote are aligned there (see ``checkpoints.aligned``), and stay mapped.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
