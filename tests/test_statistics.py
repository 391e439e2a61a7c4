"""Statistics: exact whatever the batches, the offset, the precision, the processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.distributed import gather
from pipeline.errors import UserError
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.statistics import Statistics, by_class
from pipeline.noise import Noise

DIM = 5


def features(n: int, offset: float = 0.0) -> Tensor:
    """Correlated features with unlike means."""
    mix = Noise("mix").normal(torch.empty(DIM, DIM, dtype=torch.float64))
    x = Noise("features").normal(torch.empty(n, DIM, dtype=torch.float64))
    return x @ mix + torch.arange(DIM) + offset


def gathered(x: Tensor, sizes: list[int]) -> Statistics:
    statistics = Statistics(DIM)
    for some in x.split(sizes):
        statistics.update(some)
    return statistics


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [1, 0, 60, 7, 32], [50, 50]])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_mean_and_covariance(sizes: list[int], offset: float) -> None:
    x = features(100, offset)
    found = gathered(x, sizes)
    assert found.n == 100
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-14, atol=1e-12)
    # float64 holds a feature of 1e6 to 1e-10; Σ f fᵀ − n m mᵀ would be wrong by 1e-4 or so
    torch.testing.assert_close(found.covariance, x.T.cov(), rtol=1e-9, atol=1e-9)


def test_the_textbook_formula_would_not_do() -> None:
    """That the test above can tell."""
    x = features(100, 1e6)
    textbook = (x.T @ x - 100 * x.mean(0).outer(x.mean(0))) / 99
    assert (textbook - x.T.cov()).abs().max() > 1e-6


def test_low_precision_is_not_kept() -> None:
    x = features(64).bfloat16()
    found = Statistics(DIM).update(x)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.covariance, x.double().T.cov(), rtol=1e-12, atol=1e-12)


def test_features_from_inference_mode() -> None:
    with torch.inference_mode():
        x = features(8).clone()
    found = Statistics(DIM).update(x)
    torch.testing.assert_close(found.covariance, x.T.cov())


def test_what_cannot_be_gathered() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 5\)"):
        Statistics(DIM).update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="there are 1"):
        _ = Statistics(DIM).update(torch.zeros(1, DIM)).covariance


SHARES = [(37, 0), (30, 7), (0, 37), (18, 19)]


def process(rank: int, port: int, folder: str) -> None:
    """One of two processes: its share of the features, the statistics and features of both."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results: list[Any] = []
    for share in SHARES:
        x = features(37, 100.0).split(list(share))[rank]
        whole = Statistics(DIM).update(x).reduce()
        results.append((whole.n, whole.mean, whole.scatter, gather(x)))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    x = features(37, 100.0)
    one = Statistics(DIM).update(x)
    for rank in range(2):
        for n, mean, scatter, rows in torch.load(tmp_path / f"{rank}.pt"):
            assert n == 37 and torch.equal(rows, x)
            torch.testing.assert_close(mean, one.mean, rtol=1e-14, atol=1e-12)
            torch.testing.assert_close(scatter, one.scatter, rtol=1e-10, atol=1e-10)


def test_alone_reduce_is_a_copy() -> None:
    one = Statistics(DIM).update(features(9))
    whole = one.reduce()
    torch.testing.assert_close(whole.covariance, one.covariance)
    whole.update(features(9))
    assert one.n == 9 and not torch.equal(whole.scatter, one.scatter)


def test_by_class() -> None:
    x = features(7)
    found = by_class(x, ["a", "b", "a", "a", "b", "b", "a"])
    assert list(found) == ["a", "b"] and (found["a"].n, found["b"].n) == (4, 3)
    torch.testing.assert_close(found["b"].covariance, x[[1, 4, 5]].T.cov())
    with pytest.raises(ValueError, match="7 features and 2 labels"):
        by_class(x, ["a", "b"])


ABOUT = {"data": "d1", "split": "train", "pictures": "9 of 9", "fingerprint": "f1"}


def reference() -> Reference:
    x = features(9)
    return Reference(Statistics(DIM).update(x), x[:4].float(), torch.arange(4), ABOUT)


def test_a_reference_comes_back(tmp_path: Path) -> None:
    made = reference()
    made.save(tmp_path / "new" / "r.safetensors")
    found = Reference.load(tmp_path / "new" / "r.safetensors", {"data": "d1", "split": "train"})
    assert found.about == ABOUT and found.statistics.n == 9
    assert torch.equal(found.statistics.mean, made.statistics.mean)
    assert torch.equal(found.statistics.covariance, made.statistics.covariance)
    assert torch.equal(found.features, made.features) and torch.equal(found.rows, made.rows)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["r.safetensors"]


def test_a_stale_or_foreign_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    reference().save(path)
    for key in ABOUT:
        with pytest.raises(UserError, match=f"is about {key} .* and 'other' is asked for"):
            Reference.load(path, ABOUT | {key: "other"})
    (tmp_path / "short").write_bytes(path.read_bytes()[:-8])
    (tmp_path / "words").write_text("not tensors")
    save_file({"table": torch.zeros(2)}, tmp_path / "table", metadata=ABOUT)
    for name in ("short", "words", "table"):
        with pytest.raises(UserError, match="cannot be read as a reference"):
            Reference.load(tmp_path / name, ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        reference().save(tmp_path / "file" / "r.safetensors")
