"""The benchmarks at toy size: each runs to its end, and says whether its aim is met."""

import re
import subprocess
import sys

import pytest
from tiny import ROOT

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("program", "aims"),
    [
        ("train.py --rounds 1 --batch 2", 1),
        ("train.py --rounds 1 --batch 2 --dtype bfloat16", 1),
        ("sampling.py --rounds 1 --size 32", 6),
        pytest.param("step.py --blocks 1 --steps 2", 1, marks=slow),
        pytest.param("data.py --rounds 1 --pictures 100", 2, marks=slow),
        pytest.param("mcmc.py --draws 20 --warmup 20 --blocks 1 --length 10", 0, marks=slow),
        pytest.param("world.py", 0, marks=slow),
    ],
)
def test_it_runs(program: str, aims: int) -> None:
    """With the peers there may be more aims than without."""
    call = [sys.executable, *f"benchmarks/{program}".split()]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^aim: .*: (?:met|missed).$", done.stdout, re.M)) >= aims
