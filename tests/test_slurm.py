"""A real SLURM on this machine: `make test-slurm` installs one from Debian."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import CALLBACKS, ROOT, command, equal, read, two

STEPS = 150
EAGER = [
    *(one for one in CALLBACKS if not one["class_path"].endswith("Last")),
    {"class_path": "pipeline.callbacks.Last", "init_args": {"minutes": 0.05, "agree": 5}},
]
NEEDED = ("slurmctld", "slurmd", "munged")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1 GraceTime=300
PartitionName=high Nodes={host} State=UP PriorityTier=2
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of this machine, in a folder."""
    if not all(map(shutil.which, NEEDED)) or os.getuid():
        pytest.skip("needs slurmd, slurmctld and munged, and root: make test-slurm")
    folder, host = tmp_path / "slurm", os.uname().nodename.partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    conf = CONF.format(folder=folder, host=host, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = {f"--{name}-file": f"{folder}/munge.{name}" for name in ("pid", "log", "seed")}
    munged = ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket"]
    munged += [f"--key-file={folder}/key", *(f"{k}={v}" for k, v in files.items())]
    started = []
    for line in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
        with (folder / f"{line[0]}.said").open("w") as said:
            started.append(subprocess.Popen(line, stdout=said, stderr=said))
        time.sleep(2)
    yield folder
    for process in reversed(started):
        process.terminate()
        process.wait(60)


def until(said: str, *line: str, seconds: int = 300) -> None:
    """Wait until a command says something."""
    end = time.monotonic() + seconds
    while said not in (found := subprocess.run(line, capture_output=True, text=True).stdout):
        assert time.monotonic() < end, f"{' '.join(line)}: {found}"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(
    slurm: Path, tmp_path: Path
) -> None:
    """Two tasks give way to a job of a partition that comes first, and go on after it."""
    run, whole = tmp_path / "job" / "run", tmp_path / "whole" / "run"
    assert two(whole, callbacks=EAGER, steps=STEPS).returncode == 0
    told = command(run, "--trainer.logger", "true", callbacks=EAGER, steps=STEPS)
    told = told[1 : told.index("--run")] + told[told.index("--run") + 2 :]
    batch = ["sbatch", "--nodes", "1", "--ntasks-per-node", "2"]
    env = os.environ | {"RUN": str(run), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    until("idle", "sinfo", "--noheader", "--format", "%t")
    line = [*batch, "--parsable", "--output", str(tmp_path / "log"), "docker/slurm.sbatch", *told]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    job = done.stdout.strip()
    until("step", "sh", "-c", f"grep step {tmp_path}/log")
    until("last.ckpt", "ls", str(run))
    urgent = ["--partition", "high", "--wrap", "sleep 1", "--output", str(tmp_path / "urgent")]
    subprocess.run([*batch, *urgent], check=True)
    until("PENDING", "squeue", "--noheader", "--job", job, "--format", "%T")
    until("COMPLETED", "scontrol", "show", "job", job)
    said = (tmp_path / "log").read_text()
    assert "Stopped at step" in said and f"Trained {STEPS} steps" in said
    for part in ("state_dict", "averages", "optimizer_states", "global_step"):
        assert equal(read(run)[part], read(whole)[part]), part
    assert len({file.name.rpartition("-")[2] for file in run.glob("wandb/offline-run-*")}) == 1
