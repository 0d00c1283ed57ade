"""The commands that write a model: share, unshare and export. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpr.cli.console import bars, lines, quiet, show
from hpr.cli.options import Device, Folder, Json, Model, Output


def share(
    model: Model = None,
    plan: Annotated[Path, typer.Option(metavar="FILE", help="What `hpr plan` wrote, edited or not.")] = Path("plan.json"),
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Fit in the metric of this profile; else plain least squares.")
    ] = None,
    output: Output = Path("out/compressed"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Carry out a plan: write the compressed model, which transformers loads after `import hpr`."""
    quiet()
    from hpr.checkpoints import save
    from hpr.checkpoints.open import open_model
    from hpr.evaluation import cost
    from hpr.nn import bank
    from hpr.pipeline.steps import share as share_module
    from hpr.plans.plan import Plan
    from hpr.profiling.profile import Profile
    from hpr.reporting import formatting

    save.check_folder(output)
    wanted = Plan.load(plan)
    known = Profile.load(profile) if profile else None
    loaded = open_model(model, device)
    save.check_output(loaded.model, output, loaded.tokenizer, loaded.folder)
    student = share_module(loaded, wanted, known)
    files = {"plan.json": plan.read_text(encoding="utf-8")}
    folder = save.save(student, output, loaded.tokenizer, files, loaded.folder)
    counted = {"parameters": bank.parameters(student), "bytes": cost.file_bytes(folder)}
    text = f"{formatting.exact(counted['parameters'])} parameters, {formatting.byte_count(counted['bytes'])} on disk"
    show({"output": str(folder), **counted}, as_json, lines(text, f"written: {output}"))


def unshare(folder: Folder, output: Output = Path("out/dense"), device: Device = None, as_json: Json = False) -> None:
    """Write a compressed model as a dense one, which transformers loads without hpr; it has the original's size again."""
    quiet()
    _write_dense(folder, output, device, as_json)


def export(
    model: Model = None,
    to: Annotated[
        Literal["onnx", "hf"],
        typer.Option(
            "--to",
            help="onnx: graphs for ONNX Runtime, coded weights as integers. hf: a dense checkpoint of transformers, as `hpr "
            "unshare` writes.",
        ),
    ] = "onnx",
    output: Output = Path("out/export"),
    gzip: Annotated[
        bool, typer.Option("--gzip", help="onnx: also write each file of weights as small as gzip can make it, for browsers.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a model in the format of another tool, and say how large it is there."""
    quiet()
    from hpr.errors import CheckpointError

    if to == "hf":
        if gzip or model is None:
            problem = "--gzip is for graphs" if gzip else "no folder is given"
            raise CheckpointError(
                f"{problem}, and --to hf writes a compressed model as a dense one: say `hpr export OUT --to hf`"
            )
        _write_dense(Path(model), output, device, as_json)
        return
    from hpr.checkpoints.open import open_model
    from hpr.export.onnx import FOLDER, QUANTIZED, export_onnx
    from hpr.reporting import formatting

    with bars():
        written = export_onnx(open_model(model, device), output, zipped=gzip)
    weights = sum(size for name, size in written.files.items() if name.startswith(f"{FOLDER}/") and not name.endswith(".gz"))
    sent = sum(size for name, size in written.files.items() if name.endswith(".gz"))
    text = f"{formatting.byte_count(weights)} of graphs" + (f", {formatting.byte_count(sent)} as gzip" if gzip else "")
    integers = any(QUANTIZED in name for name in written.files)
    other = "those of the same integers in torch" if integers else "the model's"
    text += f"; outputs differ by {written.difference:.1e} of the largest number from {other}"
    result = {"output": str(written.folder), "bytes": weights, "bytes_gzip": sent if gzip else None, "files": written.files}
    result |= {"tensor_bytes": written.tensors, "model_bytes": written.model, "difference": written.difference}
    show(result, as_json, lines(text, f"written: {output}"))


def _write_dense(folder: Path, output: Path, device: str | None, as_json: bool) -> None:
    from hpr.checkpoints import save
    from hpr.checkpoints.open import open_model
    from hpr.errors import CheckpointError
    from hpr.evaluation import cost
    from hpr.nn import bank, coded
    from hpr.reporting import formatting
    from hpr.sharing.unshare import unshare as unshare_module

    save.check_folder(output)
    loaded = open_model(folder, device)
    if bank.bank_of(loaded.model) is None and not coded.codes_of(loaded.model):
        raise CheckpointError(f"{folder} is dense already: give a folder that `hpr share` or `hpr compress` wrote")
    dense = unshare_module(loaded.model)
    save.check_output(dense, output, loaded.tokenizer, loaded.folder)
    written = save.save(dense, output, loaded.tokenizer, source=loaded.folder)
    counted = {"parameters": bank.parameters(dense), "bytes": cost.file_bytes(written), "bytes_before": cost.file_bytes(folder)}
    text = (
        f"{formatting.exact(counted['parameters'])} parameters, {formatting.byte_count(counted['bytes'])} on disk; compressed, "
        f"the model takes {formatting.byte_count(counted['bytes_before'])}"
    )
    show({"output": str(written), **counted}, as_json, lines(text, f"written: {output}"))
