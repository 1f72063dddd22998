"""What the figures printed on the two public model cards imply; `python -m facemask.runs.cards` writes it down.

Rules of the printer (transformers: ``speed_metrics``, ``metrics_format``, ``Trainer.floating_point_ops``):

- run times are cut to hundredths of a second; the epoch is rounded to 2 decimals, rates to 3, accuracy to 4;
- ``total_flos`` is v >> 30 of v = 6 x pixel values per image x parameters x images seen;
- ``train_samples_per_second`` is (images of an epoch x planned epochs) / run time, whether or not training stopped
  before its plan; ``train_steps_per_second`` likewise.

So every printed figure is an interval, and what lies behind it are integers: they are searched for exhaustively.
"""

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

from facemask.files import write_text
from facemask.runs.page import render

FOLDER = Path("experiments/cards")
EPOCHS, BATCHES, RESOLUTIONS = range(1, 101), range(1, 1025), (224, 384)
SIZES = {"Ti": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
KINDS = {(1, 1): "ViT-{}/{}", (2, 1): "DeiT-{}/{} with one head", (2, 2): "DeiT-{}/{} with two heads"}
DECIMALS = {"epoch": 2, "accuracy": 4, "second": 3}

Interval = tuple[Fraction, Fraction]


def parameters(size: str, patch: int, resolution: int, prefix: int, heads: int, classes: int = 2) -> int:
    """Parameters of a plain vision transformer; ``prefix`` tokens: 1 in a ViT, 2 in a DeiT with its second token."""
    width, depth = SIZES[size]
    block = 12 * width**2 + 13 * width  # qkv 3, projection 1, MLP 8 matrices; 9 biases, two norms
    tokens = (resolution // patch) ** 2 + prefix
    embedding = 3 * patch**2 * width + width + prefix * width + tokens * width
    return embedding + depth * block + 2 * width + heads * (width + 1) * classes


FAMILY = {
    (resolution, parameters(size, patch, resolution, *kind)): name.format(size, patch)
    for size, patch, resolution, (kind, name) in itertools.product(SIZES, (8, 14, 16, 32), RESOLUTIONS, KINDS.items())
}


class Evaluation(NamedTuple):
    """One integer solution of a card's evaluation figures."""

    images: int
    batch: int
    batches: int
    errors: int


class Training(NamedTuple):
    """One integer solution of a card's training figures; ``model`` is "" where no model of FAMILY fits."""

    train_images: int
    planned_epochs: int
    batch: int
    steps: int
    images_seen: int
    resolution: int
    parameters: int
    model: str


def printed_interval(name: str, text: str) -> Interval:
    """All values that are printed as ``text``, ends included."""
    if name.endswith("runtime"):
        hours, minutes, seconds = text.split(":")
        low = 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
        return low, low + Fraction(1, 100)
    if name == "total_flos":
        low = Fraction(int(text.removesuffix("GF")) << 30)
        return low, low + (1 << 30) - 1
    half = Fraction(1, 2 * 10 ** DECIMALS[name.rpartition("_")[2]])
    return Fraction(text) - half, Fraction(text) + half


def _integers(*intervals: Interval) -> range:
    """The integers inside the product of positive intervals."""
    low, high = Fraction(1), Fraction(1)
    for interval in intervals:
        low, high = low * interval[0], high * interval[1]
    return range(ceil(low), floor(high) + 1)


def _intervals(card: Mapping[str, str]) -> dict[str, Interval]:
    return {name: printed_interval(name, text) for name, text in card.items() if not name.endswith("loss")}


def evaluation(card: Mapping[str, str]) -> list[Evaluation]:
    """All solutions of a card's evaluation figures."""
    shown = _intervals(card)
    images = _integers(shown["eval_samples_per_second"], shown["eval_runtime"])
    batches = _integers(shown["eval_steps_per_second"], shown["eval_runtime"])
    low, high = shown["eval_accuracy"]
    return [
        Evaluation(n, batch, ceil(n / batch), n - correct)
        for n, batch in itertools.product(images, BATCHES)
        if ceil(n / batch) in batches
        for correct in _integers((low * n, high * n))
    ]


def training(card: Mapping[str, str]) -> Iterator[Training]:
    """All solutions, with any number of parameters, for EPOCHS planned, BATCHES and RESOLUTIONS."""
    shown = _intervals(card)
    planned_images = _integers(shown["train_samples_per_second"], shown["train_runtime"])
    planned_steps = _integers(shown["train_steps_per_second"], shown["train_runtime"])
    low, high = shown["total_flos"]
    for images, epochs in itertools.product(planned_images, EPOCHS):
        n = images // epochs
        for batch in BATCHES if n * epochs == images else ():
            per_epoch = ceil(n / batch)
            if per_epoch * epochs not in planned_steps:
                continue
            for steps, resolution in itertools.product(
                _integers(shown["epoch"], (Fraction(per_epoch), Fraction(per_epoch))), RESOLUTIONS
            ):
                seen = steps // per_epoch * n + steps % per_epoch * batch
                each = 6 * 3 * resolution**2 * seen
                for count in _integers((low / each, high / each)):
                    model = FAMILY.get((resolution, count), "")
                    yield Training(n, epochs, batch, steps, seen, resolution, count, model)


def comparison(wrong: tuple[int, int], images: int) -> dict[str, Any]:
    """Do two error counts of ``images`` images differ? Unpaired; and what a paired test could at most have said."""
    from scipy.stats import fisher_exact
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

    table = [[k, images - k] for k in wrong]
    difference = confint_proportions_2indep(wrong[0], images, wrong[1], images, method="newcomb")
    gap = abs(wrong[0] - wrong[1])
    both = (gap, min(images, sum(wrong)))  # fewest and most pictures on which just one of them errs
    return {
        "wilson": [proportion_confint(images - k, images, method="wilson") for k in wrong],
        "clopper_pearson": [proportion_confint(images - k, images, method="beta") for k in wrong],
        "fisher": float(fisher_exact(table).pvalue),
        "difference": tuple(float(x) for x in difference),
        "paired": [float(mcnemar([[0, (d + gap) // 2], [(d - gap) // 2, 0]], exact=True).pvalue) for d in both],
    }


def readme(printed: Mapping[str, Mapping[str, str]]) -> str:
    """The derivation in Markdown. Raises ValueError where figures have no explanation, or more than one."""
    shown = []
    for name, card in printed.items():
        (test,) = evaluation(card)
        found = list(training(card))
        (run,) = [t for t in found if t.model]
        more = {
            "per_epoch": ceil(run.train_images / run.batch),
            "pixel_values": 3 * run.resolution**2,
            "rate": float(run.images_seen / printed_interval("train_runtime", card["train_runtime"])[0]),
        }
        shown.append((name, card, run._asdict() | more, [t for t in found if not t.model], test._asdict()))
    first, second = (entry[4] for entry in shown)
    return render(
        "cards.md.j2",
        cards=shown,
        epochs=EPOCHS[-1],
        batches=BATCHES[-1],
        family=len(FAMILY),
        sizes=", ".join(SIZES),
        both=comparison((first["errors"], second["errors"]), first["images"]),
        percent=lambda pair: f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f}",
    )


def main() -> None:
    """Write the README beside the printed figures."""
    import yaml

    printed = yaml.safe_load((FOLDER / "printed.yaml").read_text(encoding="utf-8"))
    write_text(FOLDER / "README.md", readme(printed))


if __name__ == "__main__":
    main()
