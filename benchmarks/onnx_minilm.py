"""MiniLM in ONNX Runtime: the original in float32, int8 and int4, and compressed folders exported with their integers.

One row each: megabytes on disk, over the wire (as one gzip stream) and resident in a process that loaded the graph and ran it;
STS-B (test), the same of the model in torch, and the time at three shapes beside that of the original in int8, taking turns on
one thread (the least of all rounds, since machines are busy at times). Needs `pip install 'hpr[onnx]'`.

Run: OMP_NUM_THREADS=1 python benchmarks/onnx_minilm.py out/4MB out/8MB [--rounds 20] [--no-scores]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common import graphs, tasks
from common.paths import shared
from common.tables import markdown, say
from hpr.bench import quantised
from hpr.bench.loading import session
from hpr.checkpoints.open import open_model
from hpr.export.deflate import deflated
from hpr.export.onnx import export_onnx

SHAPES = ((1, 16, 4.0), (1, 128, 1.0), (32, 128, 0.15))  # examples, positions, share of the rounds
PEER = "original, int8"


def main() -> None:
    """Print one JSON line for each graph and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what hpr compress wrote")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each graph at 1 x 128")
    parser.add_argument("--no-scores", action="store_true", help="only bytes and times")
    given = parser.parse_args()
    pairs = tasks.sts_pairs(shared() / "data" / "sts-b" / "stsb-en-test.csv")
    original = open_model(None, "cpu")
    models = {str(folder.name): open_model(folder, "cpu") for folder in given.folders}
    with TemporaryDirectory() as place:
        work = Path(place)
        dense = export_onnx(original, work / "dense").folder / "onnx" / "model.onnx"
        files = {"original, float32": dense, PEER: work / "int8.onnx", "original, int4": work / "int4.onnx"}
        quantised.int8(dense, files[PEER])
        quantised.int4(dense, files["original, int4"])
        for name, loaded in models.items():
            folder = export_onnx(loaded, work / name).folder / "onnx"
            files[name] = next(folder.glob("model*.onnx"))
        rows = {}
        for name, file in files.items():
            row = {"graph": name, "disk": file.stat().st_size / 1e6, "wire": len(deflated(file.read_bytes())) / 1e6}
            row |= {key: value / 1e6 if key == "resident" else value for key, value in graphs.taken(file, work).items()}
            if not given.no_scores:
                row["sts-b"] = tasks.sts_correlation(graphs.embedder(session(str(file), 1), original.tokenizer), pairs)
                loaded = models.get(name, original)
                if "int" not in name:
                    row["sts-b in torch"] = tasks.sts_correlation(tasks.embedder(loaded.model, original.tokenizer), pairs)
            rows[name] = say(**row)
        sessions = {name: session(str(file), 1) for name, file in files.items()}
        for examples, positions, share in SHAPES:
            ids = np.random.default_rng(0).integers(1000, 20000, (examples, positions))
            feeds = {
                name: graphs.feed_of(one, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
                for name, one in sessions.items()
            }
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for _ in range(max(4, round(share * given.rounds))):
                for name, one in sessions.items():
                    start = time.perf_counter()
                    one.run(["last_hidden_state"], feeds[name])
                    times[name].append(1000 * (time.perf_counter() - start))
            peer = min(times[PEER])
            for name, found in times.items():
                shape = f"{examples}x{positions}"
                rows[name] |= {f"ms {shape}": statistics.median(found), f"least {shape}": min(found), shape: min(found) / peer}
            say(shape=[examples, positions], load=os.getloadavg()[0], least={name: min(found) for name, found in times.items()})
    columns = {"graph": "", "disk": ".2f", "wire": ".2f", "resident": ".0f", "sts-b": ".4f", "sts-b in torch": ".4f"}
    print(markdown(list(rows.values()), columns | {f"{examples}x{positions}": ".2f" for examples, positions, _ in SHAPES}))


if __name__ == "__main__":
    main()
