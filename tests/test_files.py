"""Files: whole or not at all, and never over what was there before."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.files import new_folder, packaged, sha256, whole


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with whole(file) as part:
            part.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text and os.listdir(file.parent) == ["file"]
    with pytest.raises(KeyboardInterrupt), whole(file) as part:
        part.write_text("thi")
        raise KeyboardInterrupt
    assert file.read_text() == "second" and os.listdir(file.parent) == ["file"]
    with pytest.raises(FileNotFoundError), whole(file):
        pass  # nothing was written
    assert file.read_text() == "second" and os.listdir(file.parent) == ["file"]


def by_torch(part: Path) -> None:
    with part.open("wb") as file:
        torch.save({"x": torch.zeros(10_000)}, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": by_torch,
    "safetensors": lambda part: save_file({"x": torch.zeros(10_000)}, part),
    "Pillow": lambda part: Image.effect_noise((99, 99), 50).save(part, "png"),
    "Python": lambda part: part.write_bytes(bytes(10_000)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_the_system_refuses_is_its_error(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    """As on a full disk, here by a limit to the size of files: whatever the writer says of it."""
    resource = pytest.importorskip("resource")
    file, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write_text("before")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError) as said, whole(file) as part:
            write(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (said.value.errno, said.value.filename) == (errno.EFBIG, str(file))
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_sentence_is_not_taken_for_what_was_behind_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a sentence"), whole(tmp_path / "file"):
        try:
            raise FileNotFoundError(2, "no such file")
        except OSError as error:
            raise UserError("a sentence") from error


def test_whoever_ends_last_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with whole(str(file)) as first:
        first.write_text("first")
        with whole(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
        assert first.suffix == second.suffix == ".part" and first != second
    assert file.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_a_new_folder_holds_no_results(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with new_folder(str(folder), ["*.png"]) as made:
        assert made == folder and not list(folder.iterdir())
    assert not folder.exists()  # nothing came of it
    with new_folder(str(folder), ["*.png"]):
        (folder / "notes.txt").touch()
    with new_folder(str(folder), ["*.png"]) as made:  # these are no results
        assert made == folder
        (folder / "00000.png").touch()
    with (
        pytest.raises(UserError, match="--out .*out holds results already; name another"),
        new_folder(str(folder), ["*.csv", "*.png"]),
    ):
        pass


def test_a_folder_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        new_folder(str(tmp_path), ["*.png"]),
        pytest.raises(UserError, match=f"--out {tmp_path} is being written to by another"),
        new_folder(str(tmp_path), ["*.png"]),
    ):
        pass
    with new_folder(str(tmp_path), ["*.png"]):
        pass


def test_no_parent_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (None, "a/b"):
        with pytest.raises(RuntimeError), new_folder(out, []):
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_of_ones_own_stays(tmp_path: Path) -> None:
    with new_folder(str(tmp_path), []):
        pass
    assert tmp_path.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in ("file", "file/below"):
        with (
            pytest.raises(UserError, match=f"--out .*{out} cannot be written to: .*; name anoth"),
            new_folder(str(tmp_path / out), []),
        ):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_someone_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for out in (tmp_path, tmp_path / "below"):
        with (
            pytest.raises(UserError, match="cannot be written to: Permission denied"),
            new_folder(str(out), []),
        ):
            pass


def test_folders_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    with ExitStack() as stack:
        found = [stack.enter_context(new_folder(None, ["*"])) for _ in range(3)]
    assert found == [Path(f"outputs/now{end}") for end in ("", "-2", "-3")]


@pytest.fixture
def nothing_found() -> Iterator[None]:
    """What was found before is looked for again."""
    packaged.cache_clear()
    yield
    packaged.cache_clear()


@pytest.mark.usefixtures("nothing_found")
def test_other_weights_in_a_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit('it was imported')")
    file = tmp_path / "some_weights" / "w.bin"
    file.write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    known, told = sha256(file), ("some-weights==1", "do without")
    assert packaged("some_weights", "w.bin", known, *told) == file
    for name, expected in (("w.bin", "0" * 64), ("other.bin", known)):
        with pytest.raises(UserError, match=f"{name} is not there or does not hold .*-weights==1"):
            packaged("some_weights", name, expected, *told)
    with pytest.raises(UserError, match="some-weights==1 is needed and not .*, or do without"):
        packaged("no_such_weights", "w.bin", known, *told)
