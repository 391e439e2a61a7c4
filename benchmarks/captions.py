"""What many distinct captions cost: time, memory and disk, a kill in the middle, the next start.

Each phase is a process of its own, so that its peak of memory is its own. The encoder is one layer
with random weights, of MiniLM's width: what is measured is all that is not the encoder.

    python benchmarks/captions.py [--number 200000]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

WORDS = "red green blue small large round old new wooden bright"
BATCH, BATCHES = 256, 200


def caption(k: int) -> str:
    """Of 2 to 12 words, another one for each k."""
    words = WORDS.split()
    return " ".join([words[(k + 3 * i) % 10] for i in range(1 + k % 11)] + [str(k)])


def phase(encoder: str, cache: str, number: int) -> None:
    """Open the table, or make it, and gather batches from it; print what that took."""
    import torch

    from pipeline.conditioning import TextEncoder, embed_distinct

    most = [0.0]
    threading.Thread(target=watch, args=(most,), daemon=True).start()
    time.sleep(0.5)
    idle, start = most[0], time.perf_counter()
    conditioning = TextEncoder(encoder)
    table, index = embed_distinct(conditioning, [caption(k) for k in range(number)], cache)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    order = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        table[index[torch.randint(number, (BATCH,), generator=order)]]
    gather = (time.perf_counter() - start) / BATCHES
    print(
        json.dumps(
            {"opened": opened, "peak": most[0] - idle, "gather": gather, "dense": table.nbytes}
        )
    )


def watch(most: list[float]) -> None:
    """The most MiB that this process has of its own; pages of a memory map are the system's."""
    while True:
        for said in Path("/proc/self/status").read_text().splitlines():
            if said.startswith("RssAnon"):
                most[0] = max(most[0], int(said.split()[1]) / 1024)
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=200_000, help="of captions (200000)")
    parser.add_argument("--phase", nargs=2, metavar=("ENCODER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        return phase(*args.phase, args.number)
    from encoders import SIZE, tiny_encoder

    SIZE.update(hidden_size=384, num_hidden_layers=1)

    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny_encoder("bert", Path(folder) / "encoder")
        cache = Path(folder) / "cache"
        own = [sys.executable, __file__, "--number", str(args.number)]
        line = [*own, "--phase", str(encoder), str(cache)]
        shards = -(-args.number // 1024)

        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while len(list(cache.glob("*/*.safetensors"))) < shards // 2 and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = len(list(cache.glob("*/*.safetensors")))
        print(f"killed with {kept} of {shards} shards kept")
        for name in ("the same again", "the start after it"):
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            said = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {said['opened']:.1f} s, {said['peak']:.0f} MiB more than idle; a batch "
                f"of {BATCH}: {1000 * said['gather']:.2f} ms"
            )
        disk = sum(file.stat().st_size for file in cache.glob("*/*")) / 2**20
        print(f"on the disk {disk:.0f} MiB; padded to the longest {said['dense'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
