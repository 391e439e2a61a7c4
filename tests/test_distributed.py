"""Processes that work together, and one that works alone."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import distributed

from pipeline.data import Hub, pictures
from pipeline.distributed import (
    each,
    first,
    gather,
    in_turn,
    join,
    on_machine,
    place,
    share,
    total,
)
from pipeline.errors import UserError


def refuse() -> None:
    raise ValueError("no such thing")


def test_alone() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert place() == (0, 1) and share(None) == share(object()) == (0, 1)
    assert first(lambda: 7) == in_turn(lambda: 7) == 7
    assert each(lambda: 7) == [7] and on_machine() == (0, [0])
    assert gather(x) is x and total(x) is x
    for make in (first, in_turn, each):
        with pytest.raises(ValueError, match="no such thing"):
            make(refuse)


def test_a_trainer_says_the_share() -> None:
    """Which is not the place: under tensor parallelism fewer hold a whole model."""
    shares = {"rank": 2, "num_replicas": 4}
    assert share(SimpleNamespace(distributed_sampler_kwargs=shares)) == (2, 4)
    assert share(SimpleNamespace(distributed_sampler_kwargs=None)) == (0, 1)


def test_without_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("auto") as device:
        assert device == ("cuda" if torch.cuda.is_available() else "cpu")
        assert place() == (0, 1)
    with join("cuda:1") as device:
        assert device == "cuda:1"


def full() -> None:
    raise OSError(28, "no space on the disk")


def decoded(folder: Path) -> list[Any]:
    """What `Hub` decodes of seven pictures here, and what it says of a folder with a broken one.

    How many pictures this process has decoded itself is the first.
    """
    own: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = pictures.decode
        patch.setattr(pictures, "decode", lambda *args: own.append(1) or decode(*args))
        data = Hub(str(folder / "seven"), None, size=8, cache_dir=str(folder / "cache"))
        data.prepare_data()
        data.setup()
    broken = Hub(str(folder / "broken"), None, size=8, cache_dir=str(folder / "cache"))
    with pytest.raises(UserError) as caught:
        broken.setup()
    rows = [torch.tensor(data.rows(split).x[:, :, 0, 0]) for split in data.splits]
    return [len(own), *rows, str(caught.value)]


COUNTS = [(3, 0), (0, 3), (2, 1), (0, 0)]


def process(rank: int, port: int, folder: str) -> None:
    """One of two, started as torchrun does."""
    told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (told | {"MASTER_ADDR": "127.0.0.1"}).items():
            environment.setenv(name, str(value))
        with join("cpu") as device:
            found: dict[str, Any] = {"place": place(), "device": device}
            rows = torch.arange(6).view(3, 2)
            found["gather"] = [gather(rows[: sum(n)].split(list(n))[rank]) for n in COUNTS]
            found["first"] = first(lambda: ["made by", rank])
            for make in (refuse, lambda: refuse() if rank == 0 else None):
                with pytest.raises(RuntimeError, match="ValueError.*no such thing"):
                    first(make)
            found["each"] = each(lambda: ["made by", rank]), on_machine()
            with pytest.raises(OSError, match="disk"):  # as the system said it, in both
                each(lambda: full() if rank == 0 else None)
            x = torch.tensor([1.0, rank])
            found["total"] = total(x), x
            file = Path(folder) / "written"
            found["in_turn"] = in_turn(lambda: file.exists() or file.touch())
            with pytest.raises(ValueError, match="no such thing"):
                in_turn(refuse)
            found["decoded"] = decoded(Path(folder))
            torch.save(found, Path(folder) / f"{rank}.pt")
    assert not distributed.is_initialized()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("seven", "broken"):
        (tmp_path / name).mkdir()
        for k in range(7):
            Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "broken" / "5.png").write_bytes(b"no picture")
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    rows = torch.arange(6).view(3, 2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["place"] == (rank, 2) and found["device"] == "cpu"
        for counts, gathered in zip(COUNTS, found["gather"], strict=True):
            assert torch.equal(gathered, rows[: sum(counts)])
        assert found["first"] == ["made by", 0]
        assert all(x.tolist() == [2.0, 1.0] for x in found["total"])
        assert found["each"] == ([["made by", 0], ["made by", 1]], (rank, [0, 1]))
        count, train, val, said = found["decoded"]
        assert count == 3 + rank and len(train) == 6  # the half of six, and one of one
        assert sorted([*train[:, 0].tolist(), *val[:, 0].tolist()]) == list(range(7))
        assert "1 of 6 pictures" in said and f"({tmp_path}/broken/5.png: no image" in said
        assert not list((tmp_path / "cache").glob("**/*.part"))
        assert found["in_turn"] == (True if rank else None)  # the other found what one wrote
