"""What the README says in Python runs as it stands there."""

import re
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from tiny import ROOT, fit

from pipeline.generator import Generator


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.from_checkpoint(fit(tmp_path / "run", steps=3))
    generator.save_pretrained(tmp_path / "circles")
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer
    monkeypatch.setattr(pl, "Trainer", lambda **how: trainer(**how | {"max_steps": 2}))
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## From Python") : text.index("## The lecture")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    said: dict[str, Any] = {}
    for block in blocks:
        exec(block, said)  # each goes on where the one before ended
    assert Image.open("circles.png").width > 4 * 32
    assert said["rows"].shape == (16, 2) and Path("diabetes.ckpt").is_file()
    # x of k-diffusion is x_t / α, so that the score of its law is (D − x) / σ²
    denoiser, u = generator.denoiser, said["u"]
    x, sigma = torch.randn(4, 3, 32, 32), torch.full((4,), 0.7)
    t = denoiser.schedule.time(sigma)
    alpha = denoiser.schedule(t)[0].view(-1, 1, 1, 1)
    score = alpha * denoiser.score(alpha * x, t, u)
    assert torch.allclose((said["edm"](x, sigma) - x) / 0.49, score, atol=1e-4)


def test_a_prompt_without_its_name_draws_nothing() -> None:
    make = ["make", "--no-print-directory", "generate", "a dog"]
    told = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and not told.stdout
    assert "there is no target a dog" in told.stderr and 'PROMPT="a dog"' in told.stderr
