"""What several test files share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tensors here are small: more threads wait for each other
os.environ["WANDB_MODE"] = "disabled"  # but where a test looks at what W&B was told

import pytest
import torch

from pipeline.conditioning import text
from pipeline.mcmc.targets import GaussianMixture


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single prompts are kept elsewhere than those that earlier code embedded."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(text, "cache_folder", lambda: folder)


@pytest.fixture
def mixture() -> GaussianMixture:
    """Three classes in the plane, of unequal weight and width, some of them near each other."""
    return GaussianMixture(
        torch.tensor([[-0.7, -0.3], [0.6, -0.4], [0.1, 0.8]], dtype=torch.float64),
        [0.15, 0.25, 0.1],
        [0.5, 0.3, 0.2],
    )
