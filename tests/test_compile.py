"""The compiled network: what is trained is the same to rounding, and goes on as it began."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CALLBACKS, ROOT, equal, fit, launch, read

from pipeline.callbacks import Compile


def callbacks(choice: str, **more: float) -> list[dict]:
    own = {"choice": choice, "trials": 1} | more
    return [*CALLBACKS, {"class_path": "pipeline.callbacks.Compile", "init_args": own}]


def chosen(checkpoint: dict[str, Any]) -> str:
    """What the callback keeps."""
    return next(v for k, v in checkpoint["callbacks"].items() if k.startswith("Compile"))["choice"]


def test_a_short_run_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    run = fit(tmp_path / "run", callbacks=callbacks("auto"), steps=2)
    assert chosen(read(run)) == "auto"


def test_what_cannot_be_compiled_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(forward: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("no compiler is found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    plain = fit(tmp_path / "plain", steps=3)
    run = fit(tmp_path / "run", callbacks=callbacks("auto", minutes=0), steps=3)
    assert "could not be compiled, and is trained as it is: no compiler" in capsys.readouterr().out
    assert equal(read(run)["state_dict"], read(plain)["state_dict"])
    assert launch(tmp_path / "told", callbacks=callbacks("compiled"), steps=2) == 2
    assert "could not be compiled: no compiler is found." in capsys.readouterr().err


def test_an_energy_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", None)
    energy = ["--model", str(ROOT / "conf/model/energies.yaml")]
    fit(tmp_path / "run", *energy, callbacks=callbacks("auto", minutes=0), steps=1)
    assert launch(tmp_path / "told", *energy, callbacks=callbacks("compiled"), steps=1) == 2
    assert "An energy, and a network in parts, is not compiled" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choice = 'yes'"):
        Compile("yes")


@pytest.mark.slow
def test_compiled_training_is_the_same_to_rounding_and_goes_on(tmp_path: Path) -> None:
    plain = read(fit(tmp_path / "plain", steps=4))
    whole = read(fit(tmp_path / "whole", callbacks=callbacks("compiled"), steps=4))
    for key, value in plain["state_dict"].items():
        # in four steps Muon moves a weight by 1e-3 or so, and rounding turns that by little
        assert torch.allclose(whole["state_dict"][key], value, atol=1e-4), key
    stop = {"class_path": "test_module.StopAt", "init_args": {"batch": 1, "signum": None}}
    half = tmp_path / "half"
    assert launch(half, callbacks=[*callbacks("compiled"), stop], steps=4) == 130
    fit(half, "--ckpt_path", str(half / "last.ckpt"), callbacks=callbacks("auto"), steps=4)
    assert chosen(read(half)) == "compiled"
    assert equal(read(half)["state_dict"], whole["state_dict"])
    tried = read(fit(tmp_path / "tried", callbacks=callbacks("auto", minutes=0), steps=2))
    assert chosen(tried) in ("compiled", "eager")
