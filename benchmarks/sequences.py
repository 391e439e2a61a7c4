"""Drawn signals against true ones: can a classifier tell them apart, and do they sound as asked?

Signals are drawn for what was held out of training, and a classifier is taught to tell them from
true ones by their spectra: an accuracy of 0.5, cross-validated, is the best there is, and the
*floor* is what the same classifier makes of true signals against other true ones. On the built-in
chirps, loudness, duration, direction and pitch are also read back from the samples by a detector
that is not the model; beside it stand the same signals against shuffled prompts.

    python benchmarks/sequences.py --checkpoint runs/chirps/TIME --number 240
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import hilbert, stft

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.data import Chirps, DataModule
from pipeline.data.sequences import EDGE, NAMED, RATE

Words = tuple[str, ...]  # a loudness, a duration, a direction, a pitch

FOLDS = 5
BANDS = 24  # of the mean spectrum
MOMENTS = 24  # of the loudness in the course of time, the quietest first


def read(rows: np.ndarray) -> list[Words | None]:
    """What each int16 signal (N, 1, 1024) sounds like, or None: no single tone of ours.

    The analytic signal gives amplitude and phase. A tone is where the amplitude, smoothed, is more
    than half of its largest; elsewhere is to be silence. A polynomial in time is to explain the
    phase there, and its slope is the frequency.
    """
    return [_read(row[0].astype(np.float64) / 32767) for row in rows]


def _read(x: np.ndarray) -> Words | None:
    z = hilbert(x)
    amplitude = np.convolve(abs(z), np.ones(20) / 20, "same")
    inside = np.flatnonzero(amplitude > amplitude.max() / 2)
    if amplitude.max() < 0.05 or inside[-1] - inside[0] + 1 > 1.05 * len(inside):
        return None  # silence, or several tones
    first, last, margin = inside[0], inside[-1], round(2 * EDGE * RATE)
    rest = np.r_[amplitude[: max(first - margin, 0)], amplitude[last + margin :]]
    if len(rest) and rest.max() > amplitude.max() / 4:
        return None
    t = np.linspace(-1, 1, last - first + 1)
    phase = np.unwrap(np.angle(z[first : last + 1]))
    law = np.polynomial.Polynomial.fit(t, phase, 5)
    if np.sqrt(((law(t) - phase) ** 2).mean()) > 0.5:
        return None  # no tone
    slope = law.deriv()(np.array([-0.9, 0.0, 0.9])) / (math.pi * (last - first) / RATE)  # Hz
    if slope.min() <= 0:
        return None
    long = len(inside) / RATE + EDGE
    rise = math.log2(slope[2] / slope[0]) / 0.9 * long / (long - EDGE)
    loud = math.log2(np.median(amplitude[inside]))
    heard = {"loudness": loud, "duration": math.log2(long), "pitch": math.log2(slope[1])}
    within = {"loudness": 0.6, "duration": 0.6, "direction": 0.4, "pitch": 0.4}
    found = [nearest(key, (heard | {"direction": rise})[key], within[key]) for key in NAMED]
    return None if None in found else tuple(found)  # type: ignore[return-value]


def nearest(key: str, octaves: float, within: float) -> str | None:
    """The name of the nearest value, where it is within so many octaves."""
    values = NAMED[key].items()
    true = {name: value if key == "direction" else math.log2(value) for name, value in values}
    away = {name: abs(octaves - value) for name, value in true.items()}
    best = min(away, key=away.__getitem__)
    return best if away[best] < within else None


def words(caption: str) -> Words:
    """What a caption says."""
    return tuple(caption.split()[1:5])


def adherence(rows: np.ndarray, wanted: Sequence[Words]) -> dict[str, float]:
    """The part of signals whose attribute is as asked, and of those with all of them."""
    pairs = list(zip(read(rows), wanted, strict=True))
    right = np.array([[found and found[k] == want[k] for k in range(4)] for found, want in pairs])
    right = right.astype(bool)
    said = dict(zip(NAMED, right.mean(0).tolist(), strict=True))
    heard = [found is not None for found, _ in pairs]
    return said | {"all": float(right.all(1).mean()), "read": float(np.mean(heard))}


def features(rows: np.ndarray, decibels: float) -> np.ndarray:
    """Spectra in decibels, what is more below full scale being so many: of the whole signal in
    bands, and the loudness of short pieces, sorted. With shape (N, channels × (BANDS + MOMENTS +
    2)).
    """
    x = rows / 32767
    size = min(2 ** round(math.log2(x.shape[-1]) / 2 + 1), x.shape[-1])
    power = abs(stft(x, nperseg=size, axis=-1)[2]) ** 2  # (N, C, frequencies, times)
    least = 10 ** (-decibels / 10)

    def loud(p: np.ndarray, count: int) -> np.ndarray:
        parts = np.array_split(p, min(count, p.shape[-1]), axis=-1)
        return 10 * np.log10(np.stack([part.mean(-1) for part in parts], -1).clip(least))

    bands = loud(power.mean(-1), BANDS)
    pieces = loud(np.sort(power.sum(2), axis=-1), MOMENTS)
    peak = 10 * np.log10((np.stack([abs(x).max(-1), x.std(-1)], -1) ** 2).clip(least))
    return np.concatenate((bands, pieces, peak), -1).reshape(len(x), -1)


def told_apart(a: np.ndarray, b: np.ndarray, decibels: float) -> dict[str, float]:
    """The accuracy of two classifiers on rows that they were not taught, and its uncertainty."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = features(np.concatenate((a, b)), decibels)
    y = np.r_[np.zeros(len(a)), np.ones(len(b))]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    trees = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    return {
        "linear": cross_val_score(linear, x, y, cv=folds).mean(),
        "trees": cross_val_score(trees, x, y, cv=folds).mean(),
        "±": math.sqrt(0.25 / len(y)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--number", type=int, default=240, help="signals (default: 240)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=None, help="guidance (default: the run's)")
    parser.add_argument("--decibels", type=float, default=40, help="below that all is silence")
    parser.add_argument("--out", help="where the drawn signals are kept (.npz)")
    args = parser.parse_args()

    import torch

    from pipeline.checkpoint import Checkpoint
    from pipeline.generator import Generator
    from pipeline.guidance import ClassifierFree

    generator = Generator.from_checkpoint(args.checkpoint)
    if args.scale is not None:
        generator.guidance = ClassifierFree(args.scale)
    data = Checkpoint(args.checkpoint).data(DataModule)
    asked, truth = data.held_out(2 * args.number)
    true, number = truth.numpy(), min(args.number, len(truth) // 2)
    others = list(map(str, asked[number : 2 * number]))
    asked, first, second = asked[:number], true[:number], true[number : 2 * number]
    drawn = torch.cat(list(generator(asked, range(args.seed, args.seed + number)))).cpu().numpy()
    if args.out:
        np.savez(args.out, drawn=drawn, asked=asked)
    both = list(map(str, asked)), others
    print(json.dumps(report(data, *both, drawn, first, second, args.decibels)))


def report(
    data: DataModule,
    asked: list[str],
    others: list[str],
    drawn: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    decibels: float,
) -> dict[str, Any]:
    """Drawn against true, and true against other true ones: all, and class by class."""
    found: dict[str, Any] = {"number": len(asked), "decibels": decibels}
    groups = {"all": np.arange(len(asked))}
    kinds, of_second = (
        [one.split()[3] if isinstance(data, Chirps) else one for one in said]
        for said in (asked, others)
    )
    for kind in sorted(set(kinds)):
        places = np.flatnonzero([one == kind for one in kinds])
        if FOLDS <= len(places) < len(asked):
            groups[kind] = places
    for name, places in groups.items():
        own = {
            "drawn": drawn[places],
            "floor": second if name == "all" else second[[k == name for k in of_second]],
        }
        found[name] = {k: told_apart(v, first[places], decibels) for k, v in own.items()}
    if isinstance(data, Chirps):
        wanted = [words(one) for one in asked]
        mixed = np.random.default_rng(1).permutation(len(asked))
        found["adherence"] = {
            "drawn": adherence(drawn, wanted),
            "shuffled": adherence(drawn, [wanted[k] for k in mixed]),
            "true": adherence(first, wanted),
        }
    return found


if __name__ == "__main__":
    main()
