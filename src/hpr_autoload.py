"""Lets transformers load checkpoints of hpr in programs that never import hpr.

Torch calls ``watch`` when it is imported, because the package names it as an entry point of the group ``torch.backends``.
Transformers learns of hpr when it is imported, and hpr itself is imported when a checkpoint asks for it. This file lies
outside the package, since importing anything inside it costs more than a program that uses torch alone may notice.

``HPR_AUTOLOAD=0`` turns this off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all such entry points of torch.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

_MODULE = "transformers.quantizers.auto"


def watch() -> None:
    """Teach transformers about hpr, now or as soon as it is imported."""
    if os.environ.get("HPR_AUTOLOAD") == "0":
        return
    if _MODULE in sys.modules:
        _teach(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module as the other finders do, and adds a step after its execution."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_teach(module: Any) -> None:
                execute(module)
                _teach(module)

            spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec


def _teach(auto: Any) -> None:
    """Let the two functions that first see the ``quantization_config`` of a checkpoint import hpr, which registers itself."""
    for owner, name in ((auto.AutoHfQuantizer, "supports_quant_method"), (auto.AutoQuantizationConfig, "from_dict")):
        setattr(owner, name, staticmethod(_importing(getattr(owner, name))))


def _importing(known: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def asked(quantization_config_dict: Any) -> Any:
        described = quantization_config_dict
        method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
        if method == "hpr":
            import_module("hpr")
        return known(described)

    return asked
