"""What the page of `demo` costs beyond its model, and what fifty quick requests come to.

One drawing is asked for as anybody may, by HTTP, and timed to its first picture in the making and
to its files; beside it the same drawing without the page. Then all requests at once, by as many
threads: the last answer beside as many drawings one after the other.

    python benchmarks/page.py --checkpoint runs/shapes/TIME
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.building import replace
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree

ROUNDS = 5


def asked(url: str, request: list[Any]) -> tuple[float, float]:
    """Seconds to the first picture in the making, and to the files."""
    start, body = time.perf_counter(), json.dumps({"data": request}).encode()
    call = urllib.request.Request(f"{url}gradio_api/call/draw", body)
    call.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(call, timeout=60) as told:
        event = json.load(told)["event_id"]
    first = None
    with urllib.request.urlopen(f"{url}gradio_api/call/draw/{event}", timeout=600) as told:
        for line in map(bytes.decode, told):
            if first is None and line.startswith('data: [[{"image"'):
                first = time.perf_counter() - start
            if line.startswith("event: error"):
                raise RuntimeError(told.read().decode())
            if line.startswith("event: complete"):
                done = time.perf_counter() - start
                return done if first is None else first, done
    raise RuntimeError("The server ended the answer early.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--prompt", default="a small red circle at the top left")
    parser.add_argument("--requests", type=int, default=50)
    args = parser.parse_args()
    line = [sys.executable, "-m", "pipeline", "demo", "--port", "0"]
    line += ["--checkpoint", args.checkpoint]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if found is None:
            sys.exit("The page did not open; see above.")
        compare(found[0], args)
    finally:
        server.terminate()
        server.wait()


def compare(url: str, args: argparse.Namespace) -> None:
    own: Any = Generator.from_checkpoint(args.checkpoint)
    own.guidance = replace(own.guidance or ClassifierFree(), scale=2.0)
    request = [args.prompt, "", "as started", own.sampler.steps, 2.0, 0, 1]
    alone, first, whole = [], [], []
    for seed in range(ROUNDS + 1):  # the first of each warms up
        start = time.perf_counter()
        list(own([args.prompt], [seed]))
        alone.append(time.perf_counter() - start)
        request[5] = seed
        for times, took in zip((first, whole), asked(url, request), strict=True):
            times.append(took)
    model, first, whole = (statistics.median(times[1:]) for times in (alone, first, whole))
    print(f"model alone {model:.2f} s; page: first look {first:.2f} s, files {whole:.2f} s")
    aim("seconds of the page beyond the model", whole - model, 2)
    requests = [[*request[:5], seed, 1] for seed in range(args.requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(args.requests) as people:
        answers = list(people.map(lambda one: asked(url, one), requests))
    took = time.perf_counter() - start
    print(f"{len(answers)} requests at once: all answered in {took:.1f} s")
    aim("its time over that of the drawings alone", took / (args.requests * model), 1.5)


if __name__ == "__main__":
    main()
