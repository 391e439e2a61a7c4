"""An hour at full speed: do the memory of the process and the time of a step stay flat?

Runs an experiment for `--minutes`, with its own checkpoints, and a validation and a sheet
every 200 steps; reads the memory of its process every five seconds, and the time of a step from
what the run itself logged. Prints how both went on after the first tenth, and plots them.

    python benchmarks/soak.py [--minutes 60] [--plot docs/soak.png] [-- more options of fit]
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
PAUSE = 5.0  # seconds between two looks


def held(pid: int) -> tuple[float, float]:
    """The memory that a process holds now, in MiB, and the processor's seconds that it took."""
    said = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages, ticks = int(said[21]), int(said[11]) + int(said[12])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK")


def watched(command: list[str], file: Path) -> np.ndarray:
    """Runs it: (n, 4), minutes since its start, MiB, processor's seconds, and the step by then."""
    seen, start = [], time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        lines = file.read_text().splitlines() if file.exists() else []
        last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True)) if lines else {}
        step = int(last.get("step") or 0)
        seen.append(((time.perf_counter() - start) / 60, *held(process.pid), step))
        time.sleep(PAUSE)
    if process.returncode:
        sys.exit(f"The run ended with code {process.returncode}.")
    return np.array(seen[:-1])


def logged(file: Path, rows: int) -> np.ndarray:
    """(n, 2), the step and the milliseconds a step since the record before, of a run's CSV."""
    with file.open(newline="") as opened:
        lines = [line for line in csv.DictReader(opened) if line.get("train/examples_per_s")]
    return np.array(
        [(int(line["step"]), 1e3 * rows / float(line["train/examples_per_s"])) for line in lines]
    )


def told(name: str, unit: str, x: np.ndarray, y: np.ndarray) -> str:
    """Median of the first and the last quarter after the first tenth, and a line through it."""
    kept = x >= x[0] + 0.1 * (x[-1] - x[0])
    x, y = x[kept], y[kept]
    quarter = len(y) // 4
    first, last = np.median(y[:quarter]), np.median(y[-quarter:])
    slope = np.polyfit(x, y, 1)[0] * (x[-1] - x[0])
    return (
        f"{name}: first quarter {first:.1f} {unit}, last {last:.1f} ({last / first - 1:+.2%}); "
        f"a line through all rises by {slope:+.1f}; greatest {y.max():.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="conf/experiment/shapes.yaml")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", type=int, default=32, help="of a global batch (default 32)")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("fit", nargs="*", help="more options of fit")
    args = parser.parse_args()
    seconds = round(60 * args.minutes)
    limit = f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        command = [sys.executable, "-m", "pipeline", "fit", "-c", args.config, "--run", run]
        command += ["--trainer.max_steps", "-1", "--trainer.max_time", limit]
        command += ["--trainer.val_check_interval", "200", *args.fit]
        file = Path(run, "csv", "metrics.csv")
        memory = watched(command, file)
        steps = logged(file, args.rows)
    print(f"{steps[-1, 0]:.0f} steps in {memory[-1, 0]:.1f} minutes")
    print(told("memory", "MiB", memory[:, 0], memory[:, 1]))
    print(told("step, by the clock", "ms", steps[:, 0], steps[:, 1]))
    every = memory[:: round(60 / PAUSE)]  # a minute: validation, sheets and checkpoints too
    taken, count = np.diff(every[:, 2]), np.diff(every[:, 3])
    known = count > 0
    ms = 1e3 * taken[known] / count[known]
    print(told("step and all else, processor's time", "ms", every[1:][known, 3], ms))
    if args.plot:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(memory[:, 0], memory[:, 1], color="black", linewidth=0.8)
        left.set(xlabel="minutes", ylabel="memory of the process, MiB", ylim=(0, None))
        right.plot(steps[:, 0], steps[:, 1], color="grey", linewidth=0.8, label="by the clock")
        label = "processor's time, all else too"
        right.plot(every[1:][known, 3], ms, color="black", linewidth=0.8, label=label)
        right.set(xlabel="step", ylabel="time of a step, ms", ylim=(0, None))
        right.legend(fontsize=8)
        figure.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
