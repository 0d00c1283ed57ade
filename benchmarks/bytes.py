"""Quality at a number of bytes, no training: coded rounding beside other methods on the same profile and text.

Every peer stands at the bytes of its own file, norms and biases in 16 bits:

- "nearest" and "GPTQ" round groups of 64 numbers with a 16-bit scale and a 16-bit offset each, at a fixed width; the same
  codes are packed by ANS with one table for each weight, and by zstd. "GPTQ, tables too" also rounds tables against the
  moments of their gradients;
- "one side" is coded rounding with the input moments alone (GPTQ with entropy coding, as WaterSIC, arXiv 2603.04956, has it);
- "NNC", "HQQ", "torchao", "auto-round" and "onnxruntime" run those packages, if they are installed (``--packages``);
- "static" is a table of one vector for each token and no network.

"ours" and "one side" correct biases and choose their damping on calibration data that was not profiled, unless ``--unchosen``
says to keep the first damping that ``hpr`` tries, which takes a third of the time. A row of ours is
"lost" if a peer of equal or fewer bytes has less divergence.

Run: python benchmarks/bytes.py minilm [--text six] [--packages] > rows.jsonl    (or kwt1)
     python benchmarks/bytes_picture.py rows.jsonl docs/bytes.svg
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.byte_ground import Ground, marked, minilm, speech
from common.quantised import packages
from common.quantised.coded import one_sided, saved_bytes
from common.quantised.static import static, token_outputs
from common.quantised.student import Peer
from common.quantised.uniform import Moments, input_moments, table_moments, uniform
from common.tables import markdown, say
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.divergence import embeddings
from hpr.rounding.plan import plan_bytes

Made = tuple[str, str, Callable[[], Peer]]  # method, setting, and what makes it
QPS = (-32, -26, -20, -15)  # of NNC: from 14 to 3 MB of MiniLM
STATIC = (256, 128, 64)  # dimensions


def uniforms(on: Ground) -> Iterator[Made]:
    """Fixed widths, each to nearest and by GPTQ."""
    inputs = cache(partial(input_moments, on.model, on.calibration))
    ways: dict[str, Callable[[], Moments]] = {
        "nearest": dict,
        "GPTQ": inputs,
        "GPTQ, tables too": lambda: {**inputs(), **table_moments(on.profile)},
    }
    for name, moments in ways.items():
        for bits in on.widths:
            yield name, f"{bits} bits", lambda bits=bits, moments=moments: uniform(on.model, bits, moments())


def packaged(on: Ground) -> Iterator[Made]:
    """The packages of others; the last ones need a model of text."""
    yield from (("HQQ", f"{bits} bits", partial(packages.hqq, on.model, bits)) for bits in on.widths)
    yield from (("torchao", f"{bits} bits", partial(packages.torchao, on.model, bits)) for bits in on.widths)
    yield from (("NNC", f"qp {qp}", partial(packages.nnc, on.model, qp)) for qp in QPS)
    if on.loaded is not None:
        for bits in (bits for bits in on.widths if bits < 8):
            yield (
                "auto-round",
                f"{bits} bits",
                partial(packages.auto_round, on.model, on.loaded.tokenizer, on.calibration, bits),
            )
        yield "onnxruntime", "int8", partial(packages.onnx_int8, on.model)
        yield from (("onnxruntime", f"4 bits, {block}", partial(packages.onnx_4bits, on.model, block)) for block in (32, 128))


def statics(on: Ground) -> Iterator[Made]:
    """Static tables of a sentence encoder."""
    if on.loaded is None:
        return
    loaded = on.loaded
    shares = next(site.left for name, site in on.profile.sites.items() if name.endswith("word_embeddings"))

    @cache
    def read() -> tuple[Tensor, Tensor]:
        ordered = torch.cat([embeddings(on.model, [batch], on.goal) for batch in on.calibration])
        return token_outputs(on.model, loaded.tokenizer, on.goal), ordered

    def made(width: int) -> Peer:
        outputs, wanted = read()
        return static(outputs, shares / shares.sum(), width, (on.calibration, wanted))

    yield from (("static", f"{width} dimensions", partial(made, width)) for width in STATIC)


def coded(on: Ground, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Coded rounding with one side and with both, a row for each size in megabytes."""
    measure = None if given.unchosen else on.measure
    for name, profile in (("ours", on.profile), ("one side", one_sided(on.profile))):
        for megabytes in (given.megabytes or on.megabytes) if name.startswith(given.only) else ():
            made = plan_bytes(on.model, profile, f"{megabytes}MB", int(megabytes * 1e6), measure)
            assert made.plan.rounding is not None
            facts = {"planned": made.bytes / 1e6, "predicted": made.plan.damage, "damping": made.plan.rounding.input_damping}
            yield {"method": name, "megabytes": saved_bytes(made.student) / 1e6, **on.score(made.student), **facts}


def rows_of(made: Made, on: Ground) -> Iterator[dict[str, Any]]:
    """A row for each way of packing a peer, or one that says why it did not run."""
    method, setting, make = made
    try:
        peer = make()
    except ImportError as error:
        yield {"method": method, "setting": setting, "skipped": str(error)}
        return
    scores = on.score(peer.student)
    for packing, size in peer.bytes.items():
        label = method if packing in ("fixed", "own") else f"{method}, {packing}"
        yield {"method": label, "setting": setting, "megabytes": size / 1e6, **scores}


def main() -> None:
    """Print one JSON line per row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "kwt1"))
    parser.add_argument("--megabytes", type=float, nargs="+", help="instead of the sizes of the table")
    parser.add_argument("--text", choices=("docstrings", "six"), default="docstrings", help="what MiniLM is calibrated on")
    parser.add_argument("--profile", type=Path, help="a file that keeps MiniLM's profile from run to run")
    parser.add_argument("--packages", action="store_true", help="run other projects' packages as well")
    parser.add_argument("--unchosen", action="store_true", help="do not choose dampings by measurement")
    parser.add_argument("--no-task", action="store_true", help="score MiniLM by divergence alone, not on STS-B: half the time")
    parser.add_argument("--only", nargs="+", default=[""], metavar="METHOD", help="methods whose names begin so")
    given = parser.parse_args()
    given.only = tuple(given.only)
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    on = speech() if given.model == "kwt1" else minilm(given.text, given.profile, not given.no_task)
    rows = [say(method="original", megabytes=disk_bytes(on.model) / 1e6, **on.score(on.model))]
    peers = [*uniforms(on), *statics(on), *(packaged(on) if given.packages else ())]
    made = (row for peer in peers if peer[0].startswith(given.only) for row in rows_of(peer, on))
    for row in chain(coded(on, given), made):
        rows.append(say(**row, calibrated=given.text))
    rows = marked(row for row in rows if "skipped" not in row)
    columns = {"method": "", "setting": "", "megabytes": ".3f", "divergence": ".5f", "six kinds": ".5f", "predicted": ".5f"}
    columns |= {"STS-B": ".4f", "accuracy": ".1f", "damping": "", "lost": ""}
    print(markdown(rows, {key: form for key, form in columns.items() if any(row.get(key) for row in rows)}))


if __name__ == "__main__":
    main()
