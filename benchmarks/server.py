"""Load-test examples/server on loopback: requests a second, errors, time to load and resident memory of two workers.

The servers of the original and of a compressed model run at the same time and are asked in turns, so that a busy machine slows
both. Memory is that of the worker processes, once they have loaded: ``rss`` counts what they share once for each, ``pss``
divides it among them, and ``bare`` is a worker that has imported the same packages and loaded nothing.

OMP_NUM_THREADS=1 python benchmarks/server.py out/half
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil

import hpr
from common.tables import say
from hpr.data.docstrings import docstrings

EXAMPLE = Path(__file__).parent.parent / "examples" / "server"
PATIENCE = 180  # seconds until a server must answer
BARE = "import hpr, serve, transformers, sentence_transformers, time; from transformers import BertModel; time.sleep(1000)"


@dataclass
class Server:
    """A running server with the figures so far. ``pids``: those of its workers."""

    process: subprocess.Popen
    address: str
    started: float
    loaded: float = 0.0
    pids: set[int] = field(default_factory=set)
    rates: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    errors: int = 0


def start(folder: Path, workers: int, fast: bool) -> Server:
    """Start a server and wait until all its workers answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--factory", "--port", str(port), "--workers", str(workers)]
    settings = {"HPR_MODEL": str(folder.resolve()), "HPR_FAST": "1" if fast else "0"}
    settings |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    begun = time.monotonic()
    process = subprocess.Popen([*command, "--log-level", "warning"], cwd=EXAMPLE, env=os.environ | settings)
    server = Server(process, f"http://127.0.0.1:{port}", begun)
    while len(server.pids) < workers:
        if process.poll() is not None or time.monotonic() - begun > PATIENCE:
            stop(server)
            raise SystemExit(f"the server of {folder} did not start: it ended with {process.returncode}")
        try:
            server.pids.add(httpx2.get(f"{server.address}/health", timeout=10).json()["process"])
        except httpx2.TransportError:
            time.sleep(0.05)
    server.loaded = time.monotonic() - begun
    return server


def stop(server: Server) -> None:
    """End a server and its workers."""
    server.process.terminate()
    server.process.wait()


def ask(server: Server, texts: list[str], client: httpx2.Client) -> float | None:
    """The milliseconds of one request; None if it fails."""
    begun = time.perf_counter()
    try:
        answer = client.post(f"{server.address}/embed", json={"texts": texts})
    except httpx2.HTTPError:
        return None
    right = answer.status_code == 200 and len(answer.json()["embeddings"]) == len(texts)
    return 1000 * (time.perf_counter() - begun) if right else None


def round_of(server: Server, requests: list[list[str]], threads: int) -> None:
    """Send requests from several threads, and note how fast they are answered."""
    with httpx2.Client(timeout=60) as client, ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        taken = list(pool.map(lambda texts: ask(server, texts, client), requests))
        server.rates.append(len(requests) / (time.perf_counter() - begun))
    server.errors += taken.count(None)
    server.milliseconds += [value for value in taken if value is not None]


def memory(pids: set[int]) -> dict[str, float]:
    """The resident megabytes of processes together."""
    full = [psutil.Process(pid).memory_full_info() for pid in pids]
    return {name: round(sum(getattr(one, name) for one in full) / 1e6, 1) for name in ("rss", "pss", "uss")}


def bare(workers: int) -> dict[str, float]:
    """The memory of as many processes that import what the server imports."""
    processes = [subprocess.Popen([sys.executable, "-c", BARE], cwd=EXAMPLE) for _ in range(workers)]
    try:
        sizes, steady = [0], 0
        while steady < 5:  # until nothing more is imported
            time.sleep(0.5)
            if any(process.poll() is not None for process in processes):
                raise SystemExit("a process that imports what the server imports has ended: see its error above")
            sizes.append(sum(psutil.Process(process.pid).memory_info().rss for process in processes))
            steady = steady + 1 if sizes[-1] == sizes[-2] else 0
        return memory({process.pid for process in processes})
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Print one JSON line for each server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hpr compress wrote from all-MiniLM-L6-v2")
    parser.add_argument("--fast", action="store_true", help="serve the materialised copy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=8, help="requests at a time")
    parser.add_argument("--requests", type=int, default=200, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    original = hpr.open_model(None, "cpu").folder
    texts, draw = docstrings("heldout"), random.Random(0)
    requests = [draw.sample(texts, draw.randint(1, 4)) for _ in range(options.requests)]
    say(server="bare", **memory_named("loaded", bare(options.workers)), load=os.getloadavg()[0])
    servers: dict[str, Server] = {}
    loads: dict[str, list[float]] = {"original": [], "compressed": []}
    try:
        for _ in range(options.rounds):  # to load takes turns, too
            for name, folder in (("original", original), ("compressed", options.folder)):
                if name in servers:
                    stop(servers.pop(name))
                servers[name] = start(folder, options.workers, options.fast and name == "compressed")
                loads[name].append(servers[name].loaded)
        loaded = {name: memory(server.pids) for name, server in servers.items()}
        for _ in range(options.rounds):
            for server in servers.values():
                round_of(server, requests, options.threads)
        for name, server in servers.items():
            say(
                server=name,
                load_seconds=round(statistics.median(loads[name]), 2),
                requests=len(requests) * options.rounds,
                errors=server.errors,
                requests_a_second=round(statistics.median(server.rates), 1),
                median_ms=round(statistics.median(server.milliseconds), 1),
                **memory_named("loaded", loaded[name]),
                **memory_named("after", memory(server.pids)),
            )
    finally:
        for server in servers.values():
            stop(server)


def memory_named(when: str, sizes: dict[str, float]) -> dict[str, float]:
    return {f"{when}_{name}_mb": size for name, size in sizes.items()}


if __name__ == "__main__":
    main()
