"""Models that left the house: what is loaded is what was trained, and nothing else is loaded."""

import json
import math
import os
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import CALLBACKS, ROOT, contents, fit, sentence

from pipeline.checkpoint import Checkpoint
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import Autoguidance
from pipeline.samplers import Heun

FILES = {"README.md", "config.json", "model.safetensors"}


class Own(Heun):
    """A sampler of one's own."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("exported") / "run", steps=3)


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    Generator.from_checkpoint(run).save_pretrained(run.parent / "model")
    return run.parent / "model"


def test_the_score_is_the_same_to_the_last_bit(run: Path, folder: Path) -> None:
    ours, theirs = Generator.from_checkpoint(run), Generator.from_pretrained(folder)
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 0.5, 0.9])
    prompts = ["a small red circle", "a large blue square", ""]
    scores = [g.denoiser.score(x, t, g.embed(prompts)) for g in (ours, theirs)]
    assert torch.equal(*scores)
    assert scores[0].abs().max() > 0
    trained = Generator.from_checkpoint(run, average="trained").denoiser
    assert not torch.equal(trained.score(x, t, ours.embed(prompts)), scores[0])


def test_it_draws_the_same(run: Path, folder: Path, tmp_path: Path) -> None:
    for where, told in (("a", ["--checkpoint", str(run)]), ("b", ["--model", str(folder)])):
        out = str(tmp_path / where)
        assert main(["generate", "a red circle", *told, "--number", "2", "--out", out]) == 0
    ours, theirs = (Image.open(tmp_path / where / "00001.png").tobytes() for where in "ab")
    assert ours == theirs


def test_of_the_machine_nothing_is_told(run: Path, folder: Path) -> None:
    assert set(contents(folder)) == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] is None
    assert config["fingerprint"] == Checkpoint(run).about["fingerprint"]
    for name in ("config.json", "README.md"):
        assert str(run.parent) not in (folder / name).read_text()


def test_the_door_writes_a_card_and_a_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    result = tmp_path / "result.json"
    told = ["--number", "6", "--steps", "2", "--scale", "1", "--out", str(result)]
    assert main(["evaluate", "--checkpoint", str(run), *told]) == 0
    about = ["--license", "cc-by-4.0", "--data", "drawings | ours, CC0"]
    door = ["export", "--checkpoint", str(run), "--out", str(out), "--evaluation", str(result)]
    assert main([*door, *about]) == 0
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc-by-4.0"\n')
    for said in (
        "sheet.png",
        "drawings \\| ours, CC0",
        "after 3 steps",
        "drawn by Heun (steps 2",
        "true pictures",
        "floor:",
    ):
        assert said in card
    Image.open(out / "sheet.png").verify()
    before = contents(out)
    assert main([*door, *about]) == 2  # a model is there
    assert contents(out) == before
    door[4] = str(tmp_path / "other")
    changed = json.loads(result.read_text()) | {"sha256": "0" * 64}
    result.write_text(json.dumps(changed))
    assert "is of another model, or of another step" in sentence(door, capsys)
    assert not (tmp_path / "other").exists()


def test_a_run_is_no_place_for_a_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    said = sentence(["export", "--checkpoint", str(run), "--out", str(run)], capsys)
    assert "holds results already" in said and contents(run) == before


def test_of_a_full_disk_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    generator = Generator.from_pretrained(folder)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("pipeline.exported.sha256", full)
        generator.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    generator.save_pretrained(tmp_path / "model")


def test_arguments_may_stand_beside_the_class(folder: Path, tmp_path: Path) -> None:
    sampler = {"class_path": "pipeline.samplers.Heun", "steps": 3}
    found = Generator.from_pretrained(changed(folder, tmp_path / "model", sampler=sampler))
    assert found.sampler.steps == 3
    sampler["stepps"] = 3
    with pytest.raises(UserError, match="stepps is not an argument of Heun"):
        Generator.from_pretrained(changed(folder, tmp_path / "other", sampler=sampler))


def changed(folder: Path, to: Path, **said: Any) -> Path:
    """The same model, whose configuration says something else."""
    to.mkdir()
    for name, data in contents(folder).items():
        (to / name).write_bytes(data)
    config = json.loads((to / "config.json").read_text()) | said
    (to / "config.json").write_text(json.dumps(config))
    return to


SIDES = {"channels": 3, "height": 0, "width": 32}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"weights": "0" * 64}, "is not the file that config.json was written with"),
        ({"format": "diffusers"}, "is not of a model of ours"),
        ({"version": 99}, "version 99 and this program reads version 1"),
        ({"denoiser": {"class_path": "os.system"}}, "not in a trusted package"),
        ({"fingerprint": "0" * 64}, "was trained with another TextEncoder"),
        ({"codec": {"class_path": "pipeline.samplers.Heun"}}, "which is no Codec"),
        (
            {"conditioning": None, "fingerprint": None},
            "takes u_dim = 384, and codec and .* give 0",
        ),
        ({"prompts": "abc"}, "something else than it should for its prompts"),
        ({"prompts": [1]}, "something else than it should for its prompts"),
        ({"fingerprint": 5}, "something else than it should for its fingerprint"),
        (
            {"codec": {"class_path": "pipeline.codec.Pixels", "init_args": SIDES}},
            "A picture of 0×32 cannot be; its sides are from 1 to 65536",
        ),
    ],
)
def test_another_model_is_refused(
    said: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        Generator.from_pretrained(changed(folder, tmp_path / "model", **said))


def test_a_run_is_no_exported_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"Argument --model: {run} is a run, and is named by --checkpoint"
    assert said in sentence(["generate", "a circle", "--model", str(run)], capsys)
    said = "Argument --model: The model './none' is not a folder; give a folder that"
    assert said in sentence(["generate", "a circle", "--model", "./none"], capsys)


def test_weights_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, data in {"empty": b"", "short": b"\x10", "text": b"nothing of the kind"}.items():
        to = changed(folder, tmp_path / name, weights=sha256(data).hexdigest())
        (to / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="is no file of safetensors: .*; export it again"):
            Generator.from_pretrained(to)
    (to / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Generator.from_pretrained(to)


def test_what_cannot_draw_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    door = ["export", "--checkpoint", str(run), "--out", str(out)]
    for device in ("foo", "meta"):
        assert f"--device {device} cannot hold" in sentence([*door, "--device", device], capsys)
    licence = ["--license", "mit\nevil: yes"]
    assert "The licence is 'mit\\nevil: yes'" in sentence([*door, *licence], capsys)
    broken = torch.load(run / "last.ckpt", weights_only=True)
    for weights in (broken["state_dict"], *broken["averages"].values()):
        for w in weights.values():
            w.fill_(math.nan)
    torch.save(broken, tmp_path / "nan.ckpt")
    told = ["export", "--checkpoint", str(tmp_path / "nan.ckpt"), "--out", str(out)]
    assert "not finite" in sentence(told, capsys)
    assert not out.exists()
    for name, said in (("", "names no folder"), ("a" * 300, "cannot be a folder")):
        assert said in sentence([*door[:-1], name], capsys)


def test_a_home_folder_is_written_to_and_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Generator.from_pretrained(folder).save_pretrained("~/mine")
    assert {*contents(tmp_path / "mine")} == {*contents(folder)} - {"sheet.png"}
    assert Generator.from_pretrained("~/mine").prompts == Generator.from_pretrained(folder).prompts
    drawn = ["generate", "a circle", "--model", str(folder), "--number", "1", "--steps", "2"]
    assert main([*drawn, "--out=~/drawn"]) == 0 and (tmp_path / "drawn/00000.png").is_file()


def test_a_folder_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks config.json and model.safetensors"):
        Generator.from_pretrained(tmp_path)
    torn = changed(folder, tmp_path / "torn")
    (torn / "config.json").write_text('{"format": ')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Generator.from_pretrained(torn)
    with (torn / "model.safetensors").open("ab") as file:
        file.write(b"0")
    (torn / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="model.safetensors is not the file"):
        Generator.from_pretrained(torn)


def test_another_model_as_guidance_is_not_exported(run: Path, tmp_path: Path) -> None:
    from pipeline.building import build
    from pipeline.denoisers import Denoiser

    generator = Generator.from_checkpoint(run)
    node = {"class_path": "pipeline.guidance.Autoguidance", "init_args": {"denoiser": str(run)}}
    openers = {Denoiser: lambda file: Checkpoint(file).denoiser()}
    generator.guidance = build(node, Autoguidance, openers=openers)
    with pytest.raises(UserError, match="guided by another one"):
        generator.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_not_exported_at_the_end_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with a class of one's own is exported, one that is guided by another is not; the
    run ends well.
    """
    export = [*CALLBACKS, {"class_path": "pipeline.callbacks.Export"}]
    sampler = "{class_path: test_exported.Own, steps: 2}"
    own = fit(tmp_path / "own", "--model.sampler", sampler, callbacks=export)
    config = json.loads((own / "model/config.json").read_text())
    assert config["sampler"]["class_path"] == "test_exported.Own"
    guided = ["--model.guidance", str(ROOT / "conf/guidance/autoguidance.yaml")]
    guided += ["--model.guidance.denoiser", str(run)]
    fit(tmp_path / "guided", *guided, callbacks=export)
    assert "warning: The model was not exported" in capsys.readouterr().out
    assert not (tmp_path / "guided/model").exists()


def test_a_prompt_alone_is_told_in_a_sentence(folder: Path) -> None:
    generator = Generator.from_pretrained(folder)
    for values, seeds in (("a cat", range(5)), (["a cat"], [1, 2])):
        with pytest.raises(UserError, match='such as \\["a cat"\\], and a seed for each'):
            next(generator(values, seeds))


@pytest.mark.parametrize("file", ["nothing.json", "no_result.json"])
def test_what_is_no_result_is_refused(
    file: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_result.json").write_text("[1]")
    given = ["--out", str(tmp_path / "model"), "--evaluation", str(tmp_path / file)]
    assert main(["export", "--checkpoint", str(run), *given]) == 2
    assert "cannot be read as a result" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# The hub, on this machine ------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload and a download ask for."""

    files: dict[str, bytes] = {}
    asked: list[str] = []
    commit = "c" * 40

    def log_message(self, *what: Any) -> None:
        pass

    def answer(self, data: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"{self.path} {self.headers.get('authorization')}")
        said: Any = {"url": f"http://{self.headers['Host']}/owner/name"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            said = {"files": [{"path": n, "uploadMode": "regular"} for n in names]}
            said["files"] = [file | {"shouldIgnore": False} for file in said["files"]]
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            said["commitUrl"] = f"http://{self.headers['Host']}/owner/name/commit/{self.commit}"
            said |= {"commitOid": self.commit, "pullRequestUrl": None}
        self.answer(json.dumps(said).encode())

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name in self.files:
            about = {"ETag": f'"{sha256(self.files[name]).hexdigest()}"'}
            about["X_Repo_Commit"] = self.commit
            return self.answer(self.files[name], "application/octet-stream", **about)
        if "/tree/" in self.path:
            tree = [{"path": n, "size": len(data), "oid": "0"} for n, data in self.files.items()]
            return self.answer(json.dumps([{"type": "file"} | one for one in tree]).encode())
        siblings = [{"rfilename": name} for name in self.files]
        said = {"id": "owner/name", "sha": self.commit, "siblings": siblings, "private": True}
        self.answer(json.dumps(said | {"tags": [], "downloads": 0}).encode())

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_it_goes_to_the_hub_and_comes_back(hub: str, folder: Path, tmp_path: Path) -> None:
    (folder / "secret.txt").write_text("not to be uploaded")
    code = (
        "import sys\n"
        "from pipeline.exported import push\n"
        "from pipeline.generator import Generator\n"
        "print(push(sys.argv[1], 'owner/name', token='hf_1234'))\n"
        "found = Generator.from_pretrained('owner/name')\n"
        "found.save_pretrained(sys.argv[2])\n"
        "print(found.push_to_hub('owner/name', token='hf_1234'))\n"
    )
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    env["HF_HUB_DISABLE_XET"] = "1"
    back = tmp_path / "back"
    call = [sys.executable, "-c", code, str(folder), str(back)]
    done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    (folder / "secret.txt").unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{hub}/owner/name"] * 2
    assert set(Hub.files) == FILES
    assert all(said.endswith("Bearer hf_1234") for said in Hub.asked)
    assert (back / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]


def test_a_hub_that_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    call = ["export", "--checkpoint", str(folder), "--out", str(tmp_path / "m"), "--push", "o/n"]
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    call = [sys.executable, "-m", "pipeline", *call]
    done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "could not be uploaded as 'o/n'" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "m" / "config.json").is_file()  # what was made is kept
