"""What a run writes down about itself."""

import csv
import json
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from PIL import Image
from tiny import CALLBACKS, ROOT, command, fit
from torch import nn
from torch.nn import functional as F

from pipeline import tracking
from pipeline.callbacks import Watch
from pipeline.callbacks.progress import busy_cores
from pipeline.callbacks.watch import Operations
from pipeline.errors import UserError
from pipeline.generator import Generator


def records(file: Path) -> Iterator[Any]:
    """The records of an offline W&B run: a 7-byte header, then LevelDB log blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: the block is filled up
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking") / "run"
    own = ["--trainer.logger", "null", "--data.cache_dir", str(folder.parent / "cache")]
    means = {"class_path": "pipeline.evaluation.features.Own"}
    means |= {"init_args": {"module": {"class_path": "test_evaluate.Means"}, "dim": 48}}
    scored = {"number": 6, "micro_batch": 6, "share": 1e6, "features": means}
    evaluation = {"class_path": "pipeline.callbacks.Evaluation", "init_args": scored}
    export = {"class_path": "pipeline.callbacks.Export"}
    door = ["-m", "pipeline", *command(folder, *own, callbacks=[evaluation, *CALLBACKS, export])]
    done = apart(door, folder.parent)  # only when its process has ended is W&B's file whole
    assert done.returncode == 0, done.stderr
    return folder


def apart(args: list[str], home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where W&B has not made up its mind yet.

    W&B leaves variables behind for the processes that follow: among them the address of a service
    that does not end with them, and so keeps the last of their records to itself.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    paths = {"HOME": str(home), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env = kept | paths | variables
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


def test_csv_holds_losses_and_throughput(run: Path) -> None:
    (file,) = run.glob("csv/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    names = {name for row in rows for name, value in row.items() if value}
    bands = {f"val/band_{k}" for k in range(4)}
    costs = {"time/forward", "time/backward", "time/optimizer", "memory/peak_gib", "train/tflops"}
    assert {"train/loss", "train/examples_per_s", "val/loss", "step"} | bands | costs <= names
    assert all(float(row["train/examples_per_s"] or 1) > 0 for row in rows)
    told = [row for row in rows if row["time/data"]]
    assert all(0 <= float(row["time/data"]) <= 1 for row in told)
    # 2e-3, after a rise over 2 steps and down half a cosine over 6
    expected = [2e-3 * min((k + 1) / 2, 1) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert [float(row["train/lr"]) for row in told] == pytest.approx(expected, rel=1e-5)


def test_operations_are_counted_in_the_first_step() -> None:
    said: dict[str, float] = {}
    layer = nn.Linear(4, 5)
    module: Any = SimpleNamespace(
        device=torch.device("cpu"),
        written=lambda step: step == 2,
        denoiser=SimpleNamespace(precision=None),
        log=said.__setitem__,
    )
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    trainer: Any = SimpleNamespace(global_step=0, optimizers=[optimizer], sanity_checking=False)
    watch, batch = Watch(), (torch.ones(8, 4),)
    watch.on_train_start(trainer, module)
    for k in range(2):
        watch.on_train_batch_start(trainer, module, batch, k)
        watch.on_validation_start(trainer, module)  # such as a resumed run makes up for
        layer(*batch)
        watch.on_validation_end(trainer, module)
        loss = layer(*batch).sum()
        watch.on_before_backward(trainer, module, loss)
        loss.backward()
        watch.on_after_backward(trainer, module)
        trainer.global_step += 1
        watch.on_train_batch_end(trainer, module, None, batch, k)
        assert bool(said) == (k == 1)
    # 2 · 8 · 4 · 5 for the product, and as many for the gradient of the weights
    assert watch.operations == 640
    assert said["train/tflops"] * 1e12 == pytest.approx(80 * said["train/examples_per_s"])


@pytest.mark.parametrize(("others", "said"), [(0.3, False), (1.1, True)])
def test_other_work_on_the_machine_is_said(
    others: float, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.callbacks.progress.busy_cores", lambda: (others, 2))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    fit(tmp_path / "run", steps=1)
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().err) == said


def test_busy_cores_are_seen() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others, cores = busy_cores(0.5)
    finally:
        busy.kill()
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not say")
    assert 0.3 < others <= cores + 0.1  # about 1, or more where tests run beside


def test_counting_changes_no_bit() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 16, 8, 8), torch.randn(16, 16, 3, 3, requires_grad=True)

    def gradient() -> torch.Tensor:
        h = F.silu(F.group_norm(F.conv2d(x, w, padding=1), 4))
        return torch.autograd.grad(h.softmax(dim=1).square().sum(), w)[0]

    plain = gradient()
    with Operations() as counter:
        counted = gradient()
    assert torch.equal(plain, counted)
    assert counter.number == 2 * 2 * 4 * 64 * 16 * 16 * 9


def test_config_can_be_run_again(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["denoiser"]["class_path"] == "pipeline.denoisers.Clean"
    assert config["data"]["init_args"]["batch_size"] == 8


def told(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The config of an offline run, the last that was logged under each name, and the run's id."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config, history, identity = {}, {}, ""
    for record in records(file):
        identity = record.run.run_id or identity
        for item in record.run.config.update if record.HasField("run") else record.config.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            history[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config, history, identity


def test_wandb_offline_holds_all_that_the_run_is_made_of(run: Path) -> None:
    config, _, identity = told(run)
    assert config["command"].startswith("python -m pipeline fit -c ")
    whole = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: config[key] for key in whole} == whole
    assert identity == (run / "wandb-id").read_text()


def test_wandb_offline_holds_every_curve_of_the_csv(run: Path) -> None:
    _, history, _ = told(run)
    (file,) = run.glob("csv/metrics.csv")
    last: dict[str, float] = {}
    for row in csv.DictReader(file.open()):
        last |= {name: float(value) for name, value in row.items() if value}
    curves = set(last) - {"epoch", "step"}
    named = {"train/loss", "train/lr", "train/gradient", "train/skipped", "val/loss"}
    named |= {"time/data", "time/forward", "time/backward", "time/optimizer", "memory/peak_gib"}
    assert named | {f"val/band_{k}" for k in range(4)} | {"eval/frechet_48"} <= curves
    assert {name: history[name] for name in curves} == pytest.approx(
        {name: last[name] for name in curves}, rel=1e-6
    )


def test_wandb_offline_holds_pictures_as_a_sheet_and_one_by_one(run: Path) -> None:
    _, history, _ = told(run)
    (files,) = run.glob("wandb/offline-run-*/files")
    (sheet,) = history["samples/filenames"]
    with Image.open(files / sheet) as whole:
        assert whole.width == 2 * (128 + 8) + 8
    captions, names = history["samples/each/captions"], history["samples/each/filenames"]
    assert len(set(captions)) == 2 and all(text.startswith("a ") for text in captions)
    drawn = []
    for name in names:
        with Image.open(files / name) as one:  # enlarged, and its margin
            assert one.size == (128 + 16, 128 + 16)
            drawn.append(one.tobytes())
    assert drawn[0] != drawn[1]


def test_wandb_offline_holds_the_table_of_scores(run: Path) -> None:
    _, history, _ = told(run)
    (files,) = run.glob("wandb/offline-run-*/files")
    table = json.loads((files / history["evaluation/path"]).read_text())
    assert table["columns"] == ["score", "drawn", "true pictures", "prompts shuffled"]
    rows = {row[0]: row[1:] for row in table["data"]}
    assert {"frechet", "kernel", "precision", "recall", "colour", "mean", "all"} <= set(rows)
    drawn, true, _ = rows["frechet"]
    assert drawn == pytest.approx(history["eval/frechet_48"], rel=1e-6)
    assert true == pytest.approx(history["eval/frechet_48_floor"], rel=1e-6)
    assert rows["mean"][0] == pytest.approx(history["eval/accuracy"], rel=1e-6)


def test_wandb_offline_holds_the_exported_model(run: Path) -> None:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    all_of_them = [r.request.log_artifact.artifact for r in records(file)]
    all_of_them += [r.artifact for r in records(file)]
    (artifact,) = [one for one in all_of_them if one.type == "model"]
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == {"README.md", "config.json", "model.safetensors"}
    _, _, identity = told(run)
    assert artifact.name == f"model-{identity}"
    drawn = [Generator.from_pretrained(run / "model"), Generator.from_checkpoint(run)]
    ours, theirs = (next(generator(["a red circle"], [0])) for generator in drawn)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["CSVLogger", "TensorBoardLogger"])
def test_a_named_logger_writes_beside_ours(name: str, tmp_path: Path) -> None:
    if name == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    place = {"save_dir": str(tmp_path), "name": "own", "version": ""}
    node = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": place}
    run = fit(tmp_path / "run", "--trainer.logger", json.dumps(node))
    ours = [float(row["train/loss"]) for row in rows(run / "csv") if row["train/loss"]]
    if name == "CSVLogger":
        own = [float(row["train/loss"]) for row in rows(tmp_path / "own") if row["train/loss"]]
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "own")).Reload()
        own = [one.value for one in events.Scalars("train/loss")]
    assert len(own) == 6 and own == pytest.approx(ours, rel=1e-6)
    about = yaml.safe_load((tmp_path / "own/hparams.yaml").read_text())
    assert about["data"]["class_path"] == "pipeline.data.Shapes" and "command" in about


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


SWEEP = """
import json, sys
from types import SimpleNamespace
import wandb
from wandb.wandb_agent import Agent

run_id, told = sys.argv[1], json.loads(sys.argv[2])
stub = SimpleNamespace(_in_jupyter=False, _function=None, _forward_signals=False)
stub._run_processes, stub._sweep_command = {}, told["command"]
args = {key: {"value": value} for key, value in told["point"].items()}
Agent._command_run(stub, {"run_id": run_id, "program": None, "args": args})
sys.exit(stub._run_processes[run_id].wait())
"""


@pytest.mark.slow
def test_a_point_of_the_sweep_runs_as_wandb_starts_it(tmp_path: Path) -> None:
    """By its own code, which is given the point that a server would choose."""
    sweep = yaml.safe_load((ROOT / "conf/sweep.yaml").read_text())
    point = {}
    for key, chosen in sweep["parameters"].items():
        point[key] = chosen["value"] if "value" in chosen else chosen.get("values", [0.003])[0]
    assert point["trainer.max_steps"] >= point["trainer.val_check_interval"]
    point |= {"trainer.max_steps": 3, "trainer.val_check_interval": 3}
    *start, args = sweep["command"]
    small = command(tmp_path / "run", "--trainer.logger", "null")[3:]
    said = json.dumps({"command": [*start, *small, args], "point": point})
    where = {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s"}
    where["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = apart(["-c", SWEEP, "abc12345", said], tmp_path, **where)
    assert done.returncode == 0, done.stderr
    config, history, identity = told(tmp_path / "run")
    for key, value in point.items():
        found = config[key.split(".")[0]]
        for name in key.split(".")[1:]:
            found = found.get("init_args", found)[name]
        assert found == value
    assert sweep["metric"]["name"] in history
    assert identity == "abc12345" == (tmp_path / "run/wandb-id").read_text()


ASK = "import wandb; print(wandb.setup().settings.base_url)"
KNOWN = "from pipeline.tracking import _logged_in; print(_logged_in())"


def said(code: str, home: Path, **variables: str) -> str:
    """The last word that these lines print."""
    done = apart(["-c", code], home, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_whoever_wandb_knows_is_logged_in(tmp_path: Path) -> None:
    """`wandb login` writes its server's name into netrc: whichever that is, W&B is asked."""
    server = urlsplit(said(ASK, tmp_path)).hostname
    assert said(KNOWN, tmp_path) == "False"
    assert said(KNOWN, tmp_path, WANDB_API_KEY="k" * 40) == "True"
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine {server} login user password {'0' * 40}\n")
    netrc.chmod(0o600)
    assert said(KNOWN, tmp_path) == "True"
    elsewhere = {"WANDB_BASE_URL": "https://elsewhere.org"}
    assert said(KNOWN, tmp_path, **elsewhere) == "False"


def test_asking_who_is_logged_in_waits_for_no_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes a call and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert said(KNOWN, tmp_path, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=url) == "True"
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            silent.accept()


UNREACHABLE = """
from pathlib import Path
from pipeline import tracking
tracking.PATIENCE = 3
print(len(tracking.loggers(Path("run"), "project", {"command": "x"})))
"""


@pytest.mark.slow
def test_where_the_server_does_not_answer_the_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    nobody = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = apart(["-c", UNREACHABLE], tmp_path, **nobody)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stderr and list(tmp_path.glob("run/wandb/offline-run-*"))


def test_resumed_run_keeps_its_identity(tmp_path: Path) -> None:
    first = tracking._identity(tmp_path)
    assert tracking._identity(tmp_path) == first and len(first) >= 8
    (tmp_path / "wandb-id").write_bytes(b"")  # of a disk that was full
    assert len(tracking._identity(tmp_path)) >= 8


@pytest.mark.parametrize("name", ["a/b:c", b"\xff"])
def test_an_id_that_wandb_refuses_is_one_sentence(
    name: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb-id").write_bytes(name if isinstance(name, bytes) else name.encode())
    with pytest.raises(UserError, match="does not take the run .*wandb-id.*WANDB_MODE=disabled"):
        tracking.loggers(tmp_path, "project" if name == "a/b:c" else "p/q", {})
