"""Write a model as graphs of ONNX, which need neither torch nor hpr.

Transformers' own exporter traces the model and fuses what ONNX Runtime has operators for; this package decides what is traced
(``graphs``), lets coded weights be multiplied as integers (``integer_sites``), and sees to it that each number is stored once
(``passes``).
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hpr.checkpoints.save import check_folder, mark
from hpr.checkpoints.sentence_folder import sentence_folder
from hpr.checkpoints.side_files import copy_side_files
from hpr.coding.codes import Codes
from hpr.data.loaded_model import LoadedModel
from hpr.errors import CheckpointError, HprError
from hpr.export.deflate import deflated
from hpr.export.graphs import Graph, graphs_of, open_axes, sample_batch, writes, writing_modules
from hpr.nn.bank import bank_of
from hpr.nn.coded import codes_of, other_codes_of
from hpr.nn.integers import keep_floats
from hpr.runtime.batch import first_examples
from hpr.runtime.files import partial_folder, replace, writing
from hpr.runtime.hooks import eval_mode, no_warnings
from hpr.runtime.progress import progress
from hpr.runtime.torch_errors import lacks_memory
from hpr.sharing.materialise import built, multiplies_less
from hpr.sharing.specification import is_specification

if TYPE_CHECKING:
    import onnx_ir as ir

FOLDER = "onnx"  # in the output folder, as runtimes of browsers look for graphs
QUANTIZED = "_quantized"  # behind a graph's name if its weights are integers
_PACKAGES = "writing ONNX needs the packages onnx, onnxscript and onnxruntime: pip install 'hpr[onnx]'"
_OTHER_SIZES = (3, 11)  # examples and positions: more of both than in the batch that is traced
_ONE_FILE = 1 << 30  # bytes; larger weights are in a file of their own, since a graph holds at most 2 GiB


@dataclass(frozen=True)
class Exported:
    """What was written. ``files``: name → bytes. ``tensors``: bytes of all tensors in the graphs, each once.

    ``model``: bytes that the numbers of the model take as they are exported. ``difference``: the largest one of any output from
    the model's, as a share of the largest number in it; of a coded model, from what the same integers give in torch, so it does
    not count that inputs are rounded to eight bits.
    """

    folder: Path
    files: dict[str, int]
    tensors: int
    model: int
    difference: float


def export_onnx(
    loaded: LoadedModel,
    folder: str | os.PathLike[str],
    batch: Mapping[str, Tensor] | None = None,
    zipped: bool = False,
) -> Exported:
    """Write ``onnx/model.onnx`` into a folder, or ``onnx/model_quantized.onnx`` for a coded model, with the tokenizer's files.

    Weights of a coded model are its integers, one byte each, and are multiplied as such. Shared factors are stored once, with
    their identity blocks. Models that write have their keys and values as inputs and outputs (``past_key_values.0.key``,
    ``present.0.key``); models with an encoder are three graphs with one file of weights. Inputs may have any number of examples
    and positions. ``batch``: inputs to trace with; by default random ones, as the configuration says. An input that it lacks (a
    mask) is none of the graph's. Graphs are compared with the model at two sizes; with a batch of yours, at its size and with
    its first example alone. ``zipped``: also write each file of weights as ``….gz``, which servers send to browsers as it is
    (``Content-Encoding: gzip``).

    Raises ``HprError`` for a model that cannot be traced, for a graph whose outputs differ from the model's, and for one that
    stores a number twice; ``CheckpointError`` for a folder that cannot be written.
    """
    _check_packages()
    target = check_folder(folder)
    if loaded.folder is not None and target == loaded.folder.resolve():
        raise CheckpointError(f"{target} is the folder of the model itself: choose another output folder")
    if not isinstance(loaded.model, PreTrainedModel):
        raise HprError(
            f"a {type(loaded.model).__name__} is no model of transformers, whose exporter traces it: export one of its"
        )
    model, codes = _prepared(loaded.model)
    with _quiet(), eval_mode(model), torch.no_grad():
        given = sample_batch(model, loaded.tokenizer) if batch is None else batch
        other = sample_batch(model, loaded.tokenizer, *_OTHER_SIZES) if batch is None else first_examples(batch, 1)
        graphs, others = graphs_of(model, given), graphs_of(model, other)
        with writing(target), partial_folder(target) as partial:
            written = _write_graphs(graphs, others, model, codes, partial / FOLDER, _outputs_read(loaded))
            for file in _files_in(partial / FOLDER) if zipped else ():
                file.with_name(f"{file.name}.gz").write_bytes(deflated(file.read_bytes()))
            _write_side_files(loaded, partial)
            files = {file.relative_to(partial).as_posix(): file.stat().st_size for file in _files_in(partial)}
            replace(target, partial)
    return Exported(target, files, *written)


def _check_packages() -> None:
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HprError(f"{_PACKAGES} ({error})") from error


def _outputs_read(loaded: LoadedModel) -> set[str] | None:
    """The outputs of a sentence encoder that its pooling reads; None for other models, of which all outputs are kept."""
    sentence = None if loaded.folder is None else sentence_folder(loaded.folder)
    if sentence is None or not sentence.headless or sentence.reads_pooler:
        return None
    return {"last_hidden_state"}


def _files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _prepared(model: PreTrainedModel) -> tuple[Any, dict[str, Codes]]:
    """A copy to trace, in float32 and without the marks of HPR, and the codes of tensors that it still has as floats."""
    from hpr.export.integer_sites import use_integers

    codes: dict[str, Codes] = {}
    copied: Any = copy.deepcopy(model) if bank_of(model) is None else built(model, multiplies_less)
    copied = copied.float().cpu().eval()
    if bank_of(model) is None and codes_of(model):
        keep_floats(copied)
        use_integers(copied, writing_modules(copied))
        found = {path: coded.codes() for path, coded in codes_of(model).items()}
        codes = {path: one for path, one in found.items() if isinstance(one, Codes)} | other_codes_of(model)
    if is_specification(getattr(copied.config, "quantization_config", None)):
        del copied.config.quantization_config
    return copied, codes


def _write_graphs(
    graphs: Sequence[Graph],
    others: Sequence[Graph],
    model: PreTrainedModel,
    codes: Mapping[str, Codes],
    folder: Path,
    read: set[str] | None,
) -> tuple[int, int, float]:
    """Write the graphs, and compare them with the model. Returns the bytes of tensors and of the model, and the difference.

    ``others``: the same graphs with inputs of other sizes, at which they are compared too: the tracer may have fixed a size.
    """
    from hpr.export.integer_sites import has_integers
    from hpr.export.parity import FLOATS, INTEGERS, difference
    from hpr.export.passes import to_bytes
    from hpr.export.weights_file import bytes_of, check_size, move_weights

    folder.mkdir(parents=True)
    ending = f"{QUANTIZED}.onnx" if has_integers(model) else ".onnx"
    programs = {}
    for number, graph in enumerate(graphs):
        progress("graphs", number, len(graphs))
        programs[graph.name] = _traced(graph)
    progress("graphs", len(graphs), len(graphs))
    named = {name: _tidied(program, codes, read) for name, program in programs.items()}
    held = bytes_of(model, codes)
    tensors = check_size(programs, held)
    if len(graphs) > 1 or tensors > _ONE_FILE:
        move_weights(programs, folder / f"weights{ending}_data")
    for name, program in programs.items():
        (folder / f"{name}{ending}").write_bytes(to_bytes(program))
    limit = INTEGERS if has_integers(model) else FLOATS
    gaps = [
        difference(folder / f"{one.name}{ending}", one.module, one.inputs, named[one.name], limit) for one in (*graphs, *others)
    ]
    return tensors, held, max(gaps)


def _traced(graph: Graph) -> ir.Model:
    """One graph, fused for ONNX Runtime on processors."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, dynamic_shapes=open_axes(graph), ort_fusions="cpu")
    try:
        with redirect_stderr(io.StringIO()):  # torch prints the graph of a trace that fails
            exported = OnnxExporter().export(cast(PreTrainedModel, graph.module), copy.deepcopy(graph.inputs), config)
    except Exception as error:  # torch.export raises whatever the forward pass does with its symbols
        if lacks_memory(error):
            raise
        text = " ".join(str(error).split())
        raise HprError(
            f"{type(graph.module).__name__} cannot be traced as a graph ({type(error).__name__}: {text:.200}): export it with "
            f"--to hf, or give a model of another class"
        ) from error
    program: ir.Model = exported.program
    return program


def _tidied(program: ir.Model, codes: Mapping[str, Codes], read: set[str] | None) -> dict[str, str]:
    """Store each number of a graph once, and name its inputs and outputs; returns new name → name in the model's arguments."""
    from hpr.export import passes

    passes.forget_origin(program)
    passes.drop_outputs(program, read)
    passes.store_once(program)
    passes.store_codes(program, codes)
    names = passes.give_known_names(program)
    passes.name_axes(program)
    return names


def _write_side_files(loaded: LoadedModel, folder: Path) -> None:
    """The tokenizer, the configuration and what else belongs to the model, but nothing of HPR."""
    model: Any = loaded.model
    config = copy.deepcopy(model.config)
    if is_specification(getattr(config, "quantization_config", None)):
        del config.quantization_config
    config.save_pretrained(folder)
    if writes(model) and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    if loaded.folder is not None:
        copy_side_files(loaded.folder, folder, loaded.tokenizer)
    mark(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch and transformers print about their own insides while a graph is traced."""
    with no_warnings(), redirect_stdout(io.StringIO()):
        yield
