"""Loads one contestant; run as a program, does so in a process of its own and prints seconds and resident bytes as JSON.

The file imports nothing of HPR at its head, so that a process for ONNX Runtime holds neither torch nor HPR.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

INT8, AS_IT_IS, COPY = "int8", "as it is", "copy for inference"


def torch_model(name: str | None, how: str, threads: int) -> Any:
    """A model in evaluation mode on the processor: as it is, with Linears in int8, or the copy of ``hpr.materialise``."""
    import torch
    from torch import nn

    import hpr
    from hpr.checkpoints.open import open_model

    torch.set_num_threads(threads)
    model = open_model(name, "cpu").model.eval()
    if how == INT8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that torchao will take this over
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return hpr.materialise(model).eval() if how == COPY else model


def session(file: str, threads: int) -> Any:
    """A session of ONNX Runtime whose threads do not spin while other contestants run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def resident() -> int:
    """The bytes of this process in memory now; where the system does not tell, the most since its start."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Load the contestant that the first argument describes, call it once, and print the figures."""
    wanted = json.loads(sys.argv[1])
    import numpy as np

    feed = dict(np.load(wanted["feed"], allow_pickle=False))
    if wanted["runtime"] == "torch":
        import torch

        import hpr  # noqa: F401
    else:
        import onnxruntime  # noqa: F401
    before, start = resident(), time.perf_counter()
    if wanted["runtime"] == "torch":
        model = torch_model(wanted["source"], wanted["how"], wanted["threads"])
        loaded = time.perf_counter()
        with torch.inference_mode():
            model(**{name: torch.from_numpy(value) for name, value in feed.items()})
    else:
        opened = session(wanted["source"], wanted["threads"])
        loaded = time.perf_counter()
        opened.run(None, feed)
    figures = {"load_s": loaded - start, "first_call_s": time.perf_counter() - loaded}
    print(json.dumps(figures | {"imported_bytes": before, "resident_bytes": resident()}))


if __name__ == "__main__":
    main()
