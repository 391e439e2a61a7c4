"""Signals: the codec, chirps and what is heard in them, WAV files as a person has them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from test_data import Lengths
from tiny import ROOT

from pipeline.cli import main
from pipeline.codec import Signals
from pipeline.conditioning import Classes
from pipeline.data import Chirps, Sequences
from pipeline.data.sequences import LENGTH, RATE
from pipeline.errors import UserError
from pipeline.networks import DiT, UNet
from pipeline.noise import Noise

sys.path.insert(0, str(ROOT / "benchmarks"))
import sequences as benchmark

# --- codec ---


def test_every_sample_comes_back() -> None:
    codec = Signals(1, 65536, 8000)
    rows = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)[None, None]
    x = codec.encode(rows)
    assert x.dtype == torch.float32 and x.abs().max() <= 1 + 1 / 32767
    assert torch.equal(codec.decode(x), rows)
    # 0.49 of a step, of which float32 has 256 at full scale
    assert torch.equal(codec.decode(x + 0.49 / 32767), rows)
    outside = torch.tensor([-torch.inf, -1.2, 1.2, torch.inf])
    assert codec.decode(outside).tolist() == [-32768, -32768, 32767, 32767]


def test_signals_say_their_shape_and_sizes() -> None:
    codec = Signals(2, 64, 8000)
    assert codec.shape == (2, 64) and codec.plural == "signals" and not codec.pictures
    for network in (UNet(**codec.sizes), DiT(**codec.sizes)):
        assert network(torch.zeros(1, 2, 64), torch.zeros(1)).shape == (1, 2, 64)
    with pytest.raises(ValueError, match="rate 0 must be > 0"):
        Signals(1, 64, 0)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_for_each_signal_and_all_in_one_file(channels: int, tmp_path: Path) -> None:
    codec = Signals(channels, 50, 4000)
    rows = codec.decode(Noise("rows").normal(torch.zeros(5, channels, 50)) / 4)
    about = [{"prompt": "a tone", "seed": k} for k in range(5)]
    for first, last in ((0, 2), (2, 4), (4, 5)):
        codec.write(rows[first:last], first, tmp_path, about, {"steps": 3})
    together = np.load(tmp_path / "samples.npz")
    assert list(together) == [f"{k:05d}" for k in range(5)]
    for k, row in enumerate(rows.numpy()):
        assert about[k] == {"prompt": "a tone", "seed": k, "file": f"{k:05d}.wav"}
        rate, samples = wavfile.read(tmp_path / f"{k:05d}.wav")
        assert rate == 4000 and (samples.reshape(50, -1).T == row).all()
        assert (together[f"{k:05d}"] == row).all()


def test_a_sheet_shows_when_and_how_high() -> None:
    """A tone of a quarter of the rate in the second half of a signal."""
    codec, t = Signals(1, 1024, 4000), torch.arange(1024)
    tone = torch.sin(torch.pi / 2 * t) * (t >= 512) * 0.9
    sheet = codec.sheet(codec.decode(tone[None, None]), ["a tone"], 4)
    assert isinstance(sheet, Image.Image)
    shown = np.asarray(sheet.convert("L"))[8 : 8 + 128, 8 : 8 + 160]
    wave, spectrum = shown[:64] < 128, shown[64:]
    assert wave[8:56, 90:].mean() > 0.5 and wave[31:33, :70].all()  # a line where it is silent
    assert wave[:28, :70].sum() == wave[36:, :70].sum() == 0
    darkest = spectrum[:, 90:150].mean(1).argmin()
    assert abs(darkest - 32) <= 2 and spectrum[:, :70].min() > 200  # half of half the rate


# --- chirps ---


@pytest.fixture(scope="module")
def chirps() -> Chirps:
    return Chirps(None, per_combination=8)


def test_combinations_are_held_out_in_a_pattern(chirps: Chirps) -> None:
    seen, unseen = chirps.combinations("train"), chirps.combinations("unseen")
    assert len(seen) == 36 and len(unseen) == 12 and len({*seen, *unseen}) == 48
    assert chirps.combinations("val") == seen
    for i, j in ((0, 3), (1, 3), (2, 3), (0, 2)):  # every pair of words is seen
        assert len({(one[i], one[j]) for one in seen}) == len(
            {(o[i], o[j]) for o in seen + unseen}
        )
    assert Chirps(None, seed=1).combinations("unseen") != unseen
    with pytest.raises(UserError, match="no split 'test'"):
        chirps.source("test")


def test_what_is_said_is_heard(chirps: Chirps) -> None:
    for split, rows in (("train", 288), ("val", 36), ("unseen", 12)):
        x, values, *_ = chirps.source(split)
        assert x.shape == (rows, 1, LENGTH) and x.dtype == np.int16
        assert benchmark.read(x) == [benchmark.words(said) for said in values]
        assert (x == chirps.source(split).x).all()
    asked, rows = chirps.held_out(30)
    wanted = [benchmark.words(caption) for caption in asked]
    assert asked[0] == f"a {' '.join(wanted[0])} tone" and {*wanted} == {
        *chirps.combinations("unseen")
    }
    found = benchmark.adherence(rows.numpy(), wanted)
    assert set(found.values()) == {1.0}
    shuffled = benchmark.adherence(rows.numpy(), wanted[1:] + wanted[:1])
    assert shuffled["all"] < 0.3 and shuffled["read"] == 1


def test_the_samples_are_what_the_formula_says() -> None:
    """A steady tone is one line of its spectrum, at its pitch within the tenth of an octave."""
    data = Chirps(None, per_combination=1)
    x, values, *_ = data.source("train")
    for row, caption in zip(x[:, 0] / 32767, values, strict=True):
        if "long steady" in caption:
            line = abs(np.fft.rfft(row, 8 * LENGTH)).argmax() * RATE / (8 * LENGTH)
            pitch = {"deep": 150, "low": 300, "high": 600, "shrill": 1200}[caption.split()[4]]
            assert abs(np.log2(line / pitch)) < 0.11
            assert abs(abs(row).max() / (0.8 if "loud" in caption else 0.25) - 1) < 0.07


def test_the_detector_hears_nothing_in_what_is_no_tone(chirps: Chirps) -> None:
    x = chirps.source("unseen").x
    noise = np.random.default_rng(0).normal(0, 1, x.shape)
    faint = (x + 300 * noise).round().astype(np.int16)  # 1 % of full scale
    assert benchmark.read(faint) == benchmark.read(x)
    peak, t = abs(x).max(2, keepdims=True), np.arange(LENGTH) / RATE
    hum = peak * np.sin(2 * np.pi * 430 * t)
    for other in (
        (8000 * noise).clip(-32768, 32767).astype(np.int16),
        np.zeros_like(x),
        (x / 2 + hum / 2).astype(np.int16),  # two tones at once
    ):
        assert benchmark.read(other) == [None] * len(x)


@pytest.mark.slow
def test_two_samples_are_told_apart_where_they_differ() -> None:
    pytest.importorskip("sklearn")
    x = Chirps(None, per_combination=48).source("unseen").x  # 6 of each
    one, two = x[:36], x[36:]
    same = benchmark.told_apart(one, two, 40)
    noise = np.random.default_rng(0).normal(0, 0.05 * 32767, two.shape)
    other = benchmark.told_apart(one, (two / 2 + noise).astype(np.int16), 40)
    for kind in ("linear", "trees"):  # four standard deviations of 72 fair coins
        assert abs(same[kind] - 0.5) < 4 * same["±"] and other[kind] > 0.9


# --- WAV files ---


def wav(file: Path, samples: np.ndarray, rate: int = 8000) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(file, rate, samples)
    return file


def sequences(path: Path, cache: Path, **given: object) -> Sequences:
    told: dict = {"length": 64, "rate": 8000, "cache_dir": str(cache)} | given
    return Sequences(str(path), told.pop("conditioning", Lengths()), **told)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two class folders of ten sounds each, one of them long, one short."""
    rng = np.random.default_rng(0)
    for kind in ("bell", "drum"):
        for k in range(10):
            length = {("bell", 0): 100, ("drum", 1): 30}.get((kind, k), 64)
            samples = rng.integers(-9000, 9000, length).astype(np.int16)
            wav(tmp_path / "sounds" / kind / f"{k}.wav", samples)
    (tmp_path / "sounds" / "notes.txt").write_text("mine")
    return tmp_path / "sounds"


def test_class_folders(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sequences(sounds, tmp_path / "cache", caption="label", conditioning=Classes())
    data.prepare_data()
    said = capsys.readouterr().err
    assert (
        "20 WAV or npy files in" in said and "left out: 1 not WAV or npy files (notes.txt)" in said
    )
    assert "1 are cut at data.length 64" in said or "1 are filled up to it" in said
    assert data.sizes() == {"u_dim": 2, "planes": 0, "channels": 1, "dims": 1}
    rows = data.rows("train")
    assert rows.x.shape == (19, 1, 64) and rows.x.dtype == np.int16
    names = [*(f"bell/{k}" for k in range(10)), *(f"drum/{k}" for k in range(10))]
    held = int(np.random.default_rng(0).permutation(20)[0])
    del names[held]
    for name, x, label in zip(names, rows.x[:, 0], rows.values or [], strict=True):
        samples = wavfile.read(sounds / f"{name}.wav")[1][:64]
        assert (x[: len(samples)] == samples).all() and not x[len(samples) :].any()
        assert label == name[:4]
    again = sequences(sounds, tmp_path / "cache", caption="label")
    assert isinstance(again.rows("train").x, np.memmap)
    assert "cut" not in capsys.readouterr().err  # nothing is decoded anew
    shorter = sequences(sounds, tmp_path / "cache", caption="label", length=32)
    assert shorter.rows("train").x.shape == (19, 1, 32)


def test_captions_of_metadata(tmp_path: Path) -> None:
    for k in range(4):
        wav(tmp_path / f"s/{k}.wav", np.full(64, k, np.int16))
    lines = [f'{{"file_name": "{k}.wav", "caption": "sound {k}"}}\n' for k in range(4)]
    (tmp_path / "s/metadata.jsonl").write_text("".join(lines))
    rows = sequences(tmp_path / "s", tmp_path / "cache").rows("train")
    assert [f"sound {row[0, 0]}" for row in rows.x] == rows.values
    (tmp_path / "s/metadata.jsonl").write_text('{"file_name": "9.wav", "caption": "no"}')
    with pytest.raises(UserError, match="names '9.wav', which is no WAV or npy file in"):
        sequences(tmp_path / "s", tmp_path / "cache").rows("train")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([0, 128, 255], np.uint8), [-32768, 0, 32512]),
        (np.array([-32768, 1, 32767], np.int16), [-32768, 1, 32767]),
        (np.array([-(2**31), 2**16, 2**31 - 1], np.int32), [-32768, 1, 32767]),
        (np.array([-1.0, 0.5, 2.0], np.float32), [-32767, 16384, 32767]),
        (np.array([[100, 300], [-4, -2]], np.int16), [200, -3, 0]),  # stereo
    ],
    ids=["8 bits", "16 bits", "32 bits", "floats", "stereo"],
)
def test_kinds_of_samples(samples: np.ndarray, expected: list[int], tmp_path: Path) -> None:
    file = wav(tmp_path / "s/a.wav", samples)
    data = sequences(tmp_path / "s", tmp_path / "cache", length=3)
    assert data.read({"path": str(file)}).tolist() == [expected]
    if samples.ndim == 2:
        both = sequences(tmp_path / "s", tmp_path / "cache", length=2, channels=2)
        assert both.read({"path": str(file)}).tolist() == samples.T.tolist()


def test_arrays_of_npy_files(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 12).reshape(2, 6).astype(np.float32)
    kinds = {"float": x, "whole": (x * 32767).round().astype(np.int16), "half": x[0]}
    for name, array in kinds.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", array)
        data = sequences(
            tmp_path / name, tmp_path / "cache", length=8, channels=min(array.ndim, 2)
        )
        read = data.read({"path": str(tmp_path / name / "a.npy")})
        expected = np.atleast_2d(kinds["whole"] if array.ndim == 2 else kinds["whole"][0])
        assert (read == np.pad(expected, ((0, 0), (0, 2)))).all() and read.dtype == np.int16
    for bad, said in (
        (x[:, :, None], r"an array \(2, 6, 1\) of float32; expected"),
        (x.astype(np.int64), "of int64; expected"),
        (2 * x, "numbers outside of -1 to 1"),
        (x * np.nan, "numbers outside of -1 to 1, or none"),
        (np.array(["a", None], object), "allow_pickle"),
    ):
        np.save(tmp_path / "float" / "a.npy", bad, allow_pickle=True)
        with pytest.raises(ValueError, match=said):  # which stops the run with the file's name
            data.read({"path": str(tmp_path / "float" / "a.npy")})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"rate": 16000},
            r"19 of 19 signals .*8000 samples a second: set data.rate to it",
        ),
        ({"channels": 2}, r"19 of 19 signals .*1 channels where data.channels is 2"),
    ],
)
def test_what_does_not_fit_is_said(
    change: dict, sentence: str, sounds: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        sequences(sounds, tmp_path / "cache", caption="label", **change).rows("train")


def test_bad_files_and_folders_are_said(sounds: Path, tmp_path: Path) -> None:
    (sounds / "bell" / "0.wav").write_bytes(b"RIFFnone")
    (sounds / "bell" / "5.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of \d+ signals .* cannot be read, .*bell/0.wav: "):
        sequences(sounds, tmp_path / "cache", caption="label").rows("train")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "empty", "holds no WAV or npy files and no parquet files; give"),
        (tmp_path / "none", "is not there"),
        (sounds / "bell" / "1.wav", "give parquet files, a folder"),
    ):
        with pytest.raises(UserError, match=said):
            sequences(path, tmp_path / "cache").rows("train")


# --- from end to end ---


def test_fit_generate_and_what_is_refused(
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    run, network = tmp_path / "run", "--model.denoiser.network"
    args = ["-c", str(ROOT / "conf/experiment/sequences.yaml"), "--run", str(run)]
    args += ["--data.path", str(sounds), "--data.caption", "label", "--data.rate", "8000"]
    args += ["--data.conditioning", "null", "--data.length", "64", "--data.batch_size", "4"]
    args += ["--data.cache_dir", str(tmp_path / "cache"), f"{network}.widths", "[32, 32]"]
    args += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    args += ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    args += [f"{network}.attention", "[]"]
    args += ["--model.sampler.steps", "2", "--model.guidance", "null"]
    assert main(["fit", *args]) == 0
    assert (run / "sheets" / "step-000002.png").exists()
    out = tmp_path / "out"
    assert main(["generate", "--checkpoint", str(run), "--number", "3", "--out", str(out)]) == 0
    made = {file.name for file in out.iterdir()}
    assert made == {"sheet.png", "manifest.json", "samples.npz"} | {
        f"0000{k}.wav" for k in range(3)
    }
    assert "3 signals, with sheet.png and manifest.json, are in" in capsys.readouterr().out
    rate, samples = wavfile.read(out / "00000.wav")
    assert rate == 8000 and samples.shape == (64,) and samples.dtype == np.int16
    assert main(["generate", "--checkpoint", str(run), "--out", str(out)]) == 2  # not over these
    assert main(["evaluate", "--checkpoint", str(run), "--number", "8"]) == 2
    assert "signals of 64 numbers, and evaluate measures pictures" in capsys.readouterr().err
