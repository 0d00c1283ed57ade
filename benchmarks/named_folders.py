"""Folders that hpr wrote, opened by name by programs that never import hpr: lm-eval and mteb, one task of local data each.

lm-eval: bits per byte of stories. mteb: STS benchmark, test split. Needs an hpr that is installed with its entry point, `pip
install lm-eval mteb sentence-transformers`, and the shared data.

Run: python benchmarks/named_folders.py lm-eval out/writer [--examples 200]
     python benchmarks/named_folders.py mteb out/half
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from common.paths import shared

TASK = """
task: local_stories
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""


def lm_eval_score(folder: Path, examples: int) -> dict[str, Any]:
    """What lm-eval says of the model in a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    stories = (shared() / "data" / "tinystories" / "evaluation.txt").read_text(encoding="utf-8").split("\n")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "stories.jsonl"
        rows = [json.dumps({"text": story}) for story in stories if len(story) > 40][:examples]
        file.write_text("\n".join(rows), encoding="utf-8")
        (Path(place) / "local_stories.yaml").write_text(TASK.format(file=file), encoding="utf-8")
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "device": "cpu", "max_length": 256},
            tasks=["local_stories"],
            task_manager=TaskManager(include_path=place, include_defaults=False),
            bootstrap_iters=0,
        )
    return dict(found["results"]["local_stories"])


def mteb_score(folder: Path) -> dict[str, Any]:
    """What mteb says of the model in a folder."""
    import mteb
    from datasets import Dataset, DatasetDict
    from sentence_transformers import SentenceTransformer

    class LocalSTS(mteb.get_task("STSBenchmark").__class__):  # type: ignore[misc]
        """The same task, on the file of the shared data."""

        def load_data(self, *others: Any, **options: Any) -> None:
            with (shared() / "data" / "sts-b" / "stsb-en-test.csv").open(encoding="utf-8", newline="") as file:
                first, second, scores = zip(*csv.reader(file), strict=True)
            rows = {"sentence1": list(first), "sentence2": list(second), "score": [float(score) for score in scores]}
            self.dataset = DatasetDict({"test": Dataset.from_dict(rows)})
            self.data_loaded = True

    with tempfile.TemporaryDirectory() as place:
        model = SentenceTransformer(str(folder), device="cpu")
        cache = mteb.ResultCache(cache_path=place)
        result = mteb.evaluate(model, [LocalSTS()], cache=cache, encode_kwargs={"batch_size": 64})
        [scores] = result.task_results[0].scores["test"]
    return {key: round(value, 4) for key, value in scores.items() if isinstance(value, float)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("lm-eval", "mteb"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    options = parser.parse_args()
    seen = {"hpr before": "hpr" in sys.modules}
    score = lm_eval_score(options.folder, options.examples) if options.program == "lm-eval" else mteb_score(options.folder)
    print(json.dumps({"program": options.program, **seen, "hpr after": "hpr" in sys.modules, **score}))


if __name__ == "__main__":
    main()
