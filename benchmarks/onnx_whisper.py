"""Whisper tiny.en in ONNX Runtime: the original in float32 and int8, and compressed folders exported with their integers.

One row each: megabytes on disk, word error rate on evaluation clips beside that of the model in torch, and the time of the
graphs for a second of speech, beside that of the original in int8. Greedy, one clip at a time, one thread. Needs
`pip install 'hpr[onnx]' soundfile jiwer`.

Run: OMP_NUM_THREADS=1 python benchmarks/onnx_whisper.py out/whisper [--clips 121]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers
from torch import Tensor

from common.paths import shared
from common.speech import normalizer, read_clips, transcripts, word_errors
from common.tables import markdown, say
from hpr.bench.loading import session
from hpr.bench.quantised import int8
from hpr.checkpoints.open import open_model
from hpr.export.onnx import export_onnx

PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")
LONGEST = 120  # tokens of a transcript


class Graphs:
    """The three graphs of a model, and what it writes greedily."""

    def __init__(self, folder: Path, ending: str):
        self.encoder, self.first, self.later = (session(str(folder / f"{part}{ending}"), 1) for part in PARTS)

    def write(self, features: Tensor, settings: Any) -> list[int]:
        """Token numbers for one clip, (1, bands, frames)."""
        [states] = self.encoder.run(None, {"input_features": features.numpy()})
        tokens = [settings.decoder_start_token_id, settings.no_timestamps_token_id]
        held, results = {}, self._run(self.first, tokens, states, {})
        for _ in range(LONGEST):
            held |= {name.replace("present", "past_key_values"): value for name, value in results.items() if name != "logits"}
            scores = results["logits"][0, -1]
            scores[[*settings.suppress_tokens, *(settings.begin_suppress_tokens if len(tokens) == 2 else ())]] = -np.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] == settings.eos_token_id:
                break
            results = self._run(self.later, tokens[-1:], states, held)
        return tokens

    @staticmethod
    def _run(graph: Any, tokens: list[int], states: np.ndarray, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = {"input_ids": np.array([tokens]), "encoder_hidden_states": states, **held}
        results = graph.run(None, {one.name: feed[one.name] for one in graph.get_inputs()})
        return dict(zip([one.name for one in graph.get_outputs()], results, strict=True))


def main() -> None:
    """Print one JSON line for each model and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="coded folders of this Whisper")
    parser.add_argument("--clips", type=int, help="at most this many evaluation clips")
    given = parser.parse_args()
    source, data = shared() / "models" / "whisper-tiny-en", shared() / "data" / "speech-en"
    processor = transformers.WhisperProcessor.from_pretrained(source)
    normalize, clips = normalizer(source), read_clips(data, "evaluation", processor.feature_extractor, given.clips)
    models = {"original, float32": open_model(source, "cpu")} | {one.name: open_model(one, "cpu") for one in given.folders}
    settings: Any = models["original, float32"].model.generation_config
    seconds, rows = sum(clips.seconds), []
    with TemporaryDirectory() as place:
        found: dict[str, Graphs] = {}
        for name, loaded in models.items():
            folder = export_onnx(loaded, Path(place) / name.partition(",")[0]).folder / "onnx"
            ending = ".onnx" if name.startswith("original") else "_quantized.onnx"
            found[name] = Graphs(folder, ending)
            row = {"graph": name, "disk": sum(file.stat().st_size for file in folder.iterdir()) / 1e6}
            texts = transcripts(loaded.model.float(), processor.tokenizer, clips.split(8))
            rows.append(row | {"errors in torch": word_errors(texts, clips.texts, normalize)})
            if name.startswith("original"):
                for part in PARTS:
                    int8(folder / f"{part}.onnx", Path(place) / f"{part}.int8.onnx")
                found["original, int8"] = Graphs(Path(place), ".int8.onnx")
                size = sum((Path(place) / f"{part}.int8.onnx").stat().st_size for part in PARTS)
                rows.append({"graph": "original, int8", "disk": size / 1e6})
        written: dict[str, list[str]] = {name: [] for name in found}
        times = dict.fromkeys(found, 0.0)
        for features in clips.split(1):
            for name, one in found.items():
                start = time.thread_time()  # of this thread, which computes everything: other work does not count
                tokens = one.write(features, settings)
                times[name] += time.thread_time() - start
                written[name].append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    for row in rows:
        name = row["graph"]
        row["errors"] = word_errors(written[name], clips.texts, normalize)
        row |= {"seconds a second": times[name] / seconds, "beside int8": times[name] / times["original, int8"]}
        say(**row)
    columns = {
        "graph": "",
        "disk": ".1f",
        "errors": ".2f",
        "errors in torch": ".2f",
        "seconds a second": ".3f",
        "beside int8": ".2f",
    }
    print(markdown(rows, columns))


if __name__ == "__main__":
    main()
