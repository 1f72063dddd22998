"""A finished model on any pictures: `load_model(run).predict(images)`, and the rows of `facemask predict`."""

import contextlib
import copy
import csv
import glob
import itertools
import json
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from timm.layers import PatchEmbed
from torch import Tensor, nn

from facemask.config import check, read_config
from facemask.data.images import MAX_PIXELS, SUFFIXES, BadImage, centre_crop, decode, from_pillow, resize_short
from facemask.devices import native_bf16
from facemask.errors import UserError, is_disk_full
from facemask.evaluate import load_classifier, load_run, read_json
from facemask.modeling.backbones import Backbone
from facemask.modeling.classifier import Classifier
from facemask.runs import predictions
from facemask.runs.calibration import softmax, temperatures
from facemask.runs.checkpoints import weights_sha256
from facemask.runs.record import read_record

BATCH = 32
THRESHOLD = 0.8
MARGIN = 0.05  # bf16 moves a calibrated probability by less, so that nearer decisions are made in fp32


@dataclass(frozen=True)
class Prediction:
    """What a model says about one picture; with a `problem` there is no label.

    probability: calibrated, of `label`; probabilities: of every class; heads: (label, calibrated probability) of each.
    """

    source: Any
    label: str | None = None
    probability: float | None = None
    unsure: bool = False
    probabilities: dict[str, float] = field(default_factory=dict)
    heads: dict[str, tuple[str, float]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Model:
    """A classifier with what belongs to its decisions: classes, the view it sees, and calibrated probabilities.

    heads: the trained heads and, with two, their mean; head: the one that decides unless another is named.
    temperatures: by head, fitted on the run's stored validation predictions; calibration: a sentence about that.
    threshold: of the probability below which a decision is unsure.
    half: the network in bf16, which `predict` asks first; where its answer is near another, fp32 decides.
    """

    source: Path
    config: dict[str, Any] | None
    classifier: Classifier
    weights_sha256: str
    crop_pct: float
    max_pixels: int
    temperatures: dict[str, float]
    calibrated: bool
    calibration: str
    half: Backbone | None
    threshold: float = THRESHOLD

    @property
    def classes(self) -> list[str]:
        return list(self.classifier.hparams["classes"])

    @property
    def heads(self) -> list[str]:
        return list(self.temperatures)

    @property
    def head(self) -> str:
        return self.classifier.reported_head

    @property
    def img_size(self) -> int:
        return int(self.classifier.hparams["model"]["img_size"])

    @property
    def module(self) -> nn.Module:
        """The bare timm network, which takes normalised images."""
        return self.classifier.backbone.network

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple((self.classifier.backbone.mean.flatten() / 255).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        return tuple((self.classifier.backbone.std.flatten() / 255).tolist())

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def view(self, picture: Any) -> np.ndarray:
        """What the model sees of a picture, as in evaluation: uint8 (img_size, img_size, 3).

        Args:
            picture: path, bytes of a file, PIL image, or uint8 array (H, W, 3) or (H, W).

        Raises:
            BadImage: it gives no picture.
        """
        if isinstance(picture, str | os.PathLike):
            picture = self._read(picture)
        if isinstance(picture, bytes):
            pixels = decode(picture, self.max_pixels)
        elif isinstance(picture, Image.Image):
            pixels = from_pillow(picture, self.max_pixels)
        else:
            pixels = np.asarray(picture)
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
                raise BadImage(f"an array of {pixels.dtype} {pixels.shape} is no picture: give uint8 (H, W, 3)")
            pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
        if 0 in pixels.shape:
            raise BadImage("no pixels")
        short_side = int(self.img_size / self.crop_pct)
        return centre_crop(resize_short(pixels, short_side, self.max_pixels), self.img_size)

    def _read(self, path: str | os.PathLike) -> bytes:
        try:
            # Opening a pipe that nobody writes to would wait for ever.
            with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise BadImage("no regular file")
                if facts.st_size > 8 * self.max_pixels:  # the most that 16-bit RGBA needs
                    raise BadImage(f"{facts.st_size} bytes, more than a picture of {self.max_pixels} pixels can have")
                return file.read()
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error

    @torch.inference_mode()
    def logits(self, pixels: Tensor | np.ndarray, *, bf16: bool = False) -> dict[str, Tensor]:
        """uint8 tensor (B, 3, S, S), or array of views (B, S, S, 3) -> float32 logits (B, C) on the CPU by head."""
        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        pixels = pixels.to(self.device)
        if bf16 and self.half is not None:
            images = ((pixels - self.half.mean) / self.half.std).bfloat16()
            found = self.classifier.head_logits(self.half.from_normalised(images))
        else:
            found = self.classifier(pixels)
        return {head: logits.cpu() for head, logits in found.items()}

    def probabilities(self, logits: dict[str, Any]) -> dict[str, np.ndarray]:
        """Logits (B, C) by head -> calibrated probabilities, float64 (B, C)."""
        return {head: softmax(np.asarray(values), self.temperatures[head]) for head, values in logits.items()}

    def predict(self, images: Any, **options: Any) -> list[Prediction]:
        """Predictions of one picture (see `view`) or of several, in order; what gives no picture has a `problem`.
        Options: those of `stream`."""
        one = isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 0) in (2, 3)
        return list(self.stream([images] if one else images, **options))

    def stream(
        self, images: Iterable[Any], *, head: str | None = None, threshold: float | None = None, batch_size: int = BATCH
    ) -> Iterator[Prediction]:
        """Predictions in order, as they are made. Pictures are decoded by all cores while the model computes, and at
        most three batches of views wait in memory, however many pictures there are.

        Raises:
            UserError: the model has no such head.
        """
        head = self.head if head is None else head
        if head not in self.heads:
            raise UserError(f"the model has no head {head}: choose one of {', '.join(self.heads)}")
        least = self.threshold if threshold is None else threshold
        batches = self.views(iter(images), batch_size)
        return (row for batch in batches for row in self._decide(*batch, head, least))

    def views(
        self, images: Iterator[Any], batch_size: int = BATCH
    ) -> Iterator[tuple[list[Any], list[str], np.ndarray]]:
        """Batches of what was given, of the problem of each ("" for none), and of the views of those without one, uint8
        (B, S, S, 3). All cores decode while a batch is worked on; at most three batches are in memory."""
        waiting: deque[tuple[Any, Future]] = deque()
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            while True:
                for image in itertools.islice(images, 3 * batch_size - len(waiting)):
                    waiting.append((image, pool.submit(self._view_or_problem, image)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                found = [future.result() for _, future in batch]
                problems = [result if isinstance(result, str) else "" for result in found]
                views = np.array([view for view in found if not isinstance(view, str)], np.uint8)
                yield [image for image, _ in batch], problems, views.reshape(-1, self.img_size, self.img_size, 3)
        finally:
            pool.shutdown(cancel_futures=True)

    def _view_or_problem(self, picture: Any) -> np.ndarray | str:
        try:
            return self.view(picture)
        except BadImage as problem:
            return problem.reason

    def _decide(
        self, images: list[Any], problems: list[str], views: np.ndarray, head: str, threshold: float
    ) -> Iterator[Prediction]:
        by_head = self._quick_probabilities(views, head, threshold) if len(views) else {}
        classes, rows = self.classes, itertools.count()
        for image, problem in zip(images, problems, strict=True):
            if problem:
                yield Prediction(image, problem=problem)
                continue
            row = next(rows)
            decisions = {name: (classes[p[row].argmax()], float(p[row].max())) for name, p in by_head.items()}
            label, probability = decisions[head]
            of_classes = dict(zip(classes, by_head[head][row].tolist(), strict=True))
            yield Prediction(image, label, probability, probability < threshold, of_classes, decisions)

    def _quick_probabilities(self, views: np.ndarray, head: str, threshold: float) -> dict[str, np.ndarray]:
        """`probabilities`, by bf16 where there is that and its answers are clear."""
        by_head = self.probabilities(self.logits(views, bf16=True))
        if self.half is not None:
            best = {name: np.sort(p, axis=1)[:, -2:] for name, p in by_head.items()}
            doubt = np.abs(best[head][:, 1] - threshold) < MARGIN
            doubt |= np.min([two[:, 1] - two[:, 0] for two in best.values()], axis=0) < 2 * MARGIN
            if doubt.any():
                for name, p in self.probabilities(self.logits(views[doubt])).items():
                    by_head[name][doubt] = p
        return by_head


# -- loading ----------------------------------------------------------------------------------------------------


def load_model(
    source: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Model:
    """The model of a run.

    Args:
        source: a run folder; a record, whose weights `checkpoint` names; or a checkpoint file.
        device: default: the GPU where there is one.
        precision: of `predict`: "fp32", or "auto": bf16 where that is faster, and fp32 again for each picture whose
            calibrated probabilities lie within 0.05 of another decision. Those of the others move in the third digit.

    Raises:
        UserError: no run, no checkpoint, one that is damaged, of another version, or not the record's.
    """
    source = Path(source)
    config, stored = None, None
    if (source / "record.json").is_file():
        record = read_record(source)
        if checkpoint is None:
            raise UserError(f"{source} is a record, which holds no weights: give its best.ckpt with --checkpoint PATH")
        classifier, config = load_classifier(Path(checkpoint)), record.config
        weights = weights_sha256(classifier.state_dict())
        run = next((name for name, facts in record.info["runs"].items() if facts["weights_sha256"] == weights), None)
        if run is None:
            raise UserError(f"{checkpoint} has none of the weights of the record {source}: it is of another run")
        stored = record.predictions(run)
    elif checkpoint is not None:
        raise UserError(f"{source} is no record: --checkpoint PATH goes with a record, which holds no weights")
    else:
        classifier = load_run(source)[1] if source.is_dir() else load_classifier(source)
        weights = weights_sha256(classifier.state_dict())
        run_dir = source if source.is_dir() else source.absolute().parent.parent
        if (run_dir / "config.yaml").is_file():
            config = read_config(run_dir / "config.yaml")
        said = run_dir / "predictions.parquet"
        if said.is_file() and read_json(run_dir / "summary.json").get("weights_sha256") == weights:
            stored = predictions.read_predictions(said)
    if config is not None:
        _check_unchanged(config, classifier, source)
    data = config["data"] if config else {}
    temperatures, calibrated, sentence = _calibrate(classifier, stored)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = classifier.to(device).requires_grad_(False)
    _fuse_attention(classifier, True)
    return Model(
        source=source,
        config=config,
        classifier=classifier,
        weights_sha256=weights,
        crop_pct=data.get("crop_pct", 0.875),
        max_pixels=data.get("max_pixels", MAX_PIXELS),
        temperatures=temperatures,
        calibrated=calibrated,
        calibration=sentence,
        half=_half(classifier) if precision == "auto" and native_bf16(device.type) else None,
    )


def _half(classifier: Classifier) -> Backbone | None:
    """The network in bf16; None for CNNs and hybrids, whose depthwise convolutions are slower so on CPUs. Attention is
    made of plain matrix products, which are faster in bf16 than the fused kernel, and slower in fp32."""
    network = classifier.backbone.network
    if not isinstance(getattr(network, "patch_embed", None), PatchEmbed):
        return None
    half = copy.deepcopy(classifier.backbone)
    half.network.bfloat16()
    _fuse_attention(half, torch.cuda.is_available())
    return half


def _fuse_attention(module: nn.Module, fused: bool) -> None:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused  # type: ignore[assignment]


def _check_unchanged(config: dict[str, Any], classifier: Classifier, source: Path) -> None:
    """Refuse a config that is not the one that the weights were trained with."""
    try:
        check(OmegaConf.create(config))
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise UserError(f"the config of {source} is not one of train.py (edited by hand?): {error}") from error
    trained, told = classifier.hparams["model"], config["model"]
    for key in sorted((trained.keys() | told.keys()) - {"pretrained", "checkpoint"}):
        if told.get(key) != trained.get(key):
            raise UserError(
                f"the config of {source} has model.{key}={told.get(key)} and its checkpoint was trained with "
                f"{trained.get(key)}: restore config.yaml, it was edited by hand"
            )


def _calibrate(classifier: Classifier, stored: tuple[pd.DataFrame, list[str]] | None) -> tuple[dict, bool, str]:
    """Temperatures by head from a run's stored predictions of its validation split, and a sentence about them."""
    heads = [*classifier.heads, *(["mean"] if len(classifier.heads) > 1 else [])]
    found = temperatures(*stored) if stored else {}
    if stored is None or not {*heads} <= found.keys():
        why = "the run keeps no validation predictions of these weights"
        return dict.fromkeys(heads, 1.0), False, f"probabilities are not calibrated: {why}"
    n, head = (stored[0]["split"] == "val").sum(), classifier.reported_head
    sentence = f"calibrated on {n:,} validation pictures, temperature {found[head]:.3g} ({head})"
    return {name: found[name] for name in heads}, True, sentence


# -- the command ------------------------------------------------------------------------------------------------


def expand(paths: Iterable[str], listed: bytes = b"") -> list[str]:
    """Names of files, each once, from files, folders (all pictures below them), globs, and "-" for a list.

    What names nothing stays in the result, so that it is reported.

    Args:
        listed: what "-" stands for: names with a line end or, as from `find -print0`, a zero byte after each.
    """
    found: list[str] = []
    for path in paths:
        if path == "-":
            names = listed.split(b"\0" if b"\0" in listed else b"\n")
            found += [os.fsdecode(name.removesuffix(b"\r")) for name in names if name.strip()]
            continue
        matches = [path]
        if glob.has_magic(path) and not Path(path).exists():
            matches = sorted(glob.glob(path, recursive=True)) or matches  # noqa: PTH207 - the pattern may be absolute
        for match in matches:
            found += (pictures_below(match) if Path(match).is_dir() else []) or [match]
    return list(dict.fromkeys(found))


def pictures_below(folder: str) -> list[str]:
    """Pictures below a folder by their suffix, in the order of names; hidden files and folders are left out."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = sorted(name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [str(Path(parent, name)) for name in pictures]
    return found


def predict_files(
    model: Model, files: Sequence[str], out: Path | None, kind: str, head: str | None, threshold: float, batch_size: int
) -> list[Prediction]:
    """Write a row for every file as soon as it is predicted, with a progress bar; returns those with a problem.

    Args:
        out: a new file; None: standard output.
        kind: "table", or "csv" or "jsonl" (JSON lines), which have the same columns.

    Raises:
        UserError: no such head, or `out` cannot be written.
    """
    rows = model.stream(files, head=head, threshold=threshold, batch_size=batch_size)
    try:
        target = contextlib.nullcontext(sys.stdout) if out is None else out.open("x", encoding="utf-8", newline="")
    except FileExistsError as error:
        raise UserError(f"--out {out} exists already and is not overwritten: choose another name") from error
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from error
    failed = []
    between_rows = out is None and sys.stdout.isatty()  # a bar would be
    bar = Progress(console=Console(stderr=True), transient=True, disable=between_rows)
    try:
        with target as file, bar:
            write = _table(file, model) if kind == "table" else _lines(file, model, kind)
            for row in bar.track(rows, total=len(files), description="predicting"):
                write(row)
                file.flush()  # a row that was written stays, however the program ends
                if row.problem:
                    failed.append(row)
    except OSError as error:
        if out is None or not is_disk_full(error):
            raise
        raise UserError(f"the disk is full and --out {out} is cut off: make room and choose another name") from error
    return failed


def _lines(file: TextIO, model: Model, kind: str) -> Callable[[Prediction], Any]:
    def cells(row: Prediction) -> dict[str, Any]:
        found = {  # a name may be no valid UTF-8
            "path": str(row.source).encode("utf-8", "backslashreplace").decode(),
            "label": row.label,
            "probability": row.probability,
            "unsure": None if row.problem else row.unsure,
            **{f"p/{name}": row.probabilities.get(name) for name in classes},
        }
        for head in heads:
            found[f"{head}/label"], found[f"{head}/probability"] = row.heads.get(head, (None, None))
        found["problem"] = row.problem or None
        return {name: round(cell, 6) if isinstance(cell, float) else cell for name, cell in found.items()}

    classes, heads = model.classes, model.classifier.heads
    if kind == "jsonl":
        return lambda row: file.write(json.dumps(cells(row), ensure_ascii=False) + "\n")
    table = csv.DictWriter(file, cells(Prediction("")), lineterminator="\n")
    table.writeheader()
    return lambda row: table.writerow(cells(row))


def _table(file: TextIO, model: Model) -> Callable[[Prediction], Any]:
    heads = model.classifier.heads if len(model.heads) > 1 else []
    width = max(map(len, model.classes)) + len(" 0.999")

    def write(decision: str, of_heads: Sequence[str], path: str) -> None:
        cells = [f"{decision:<{width + len(' unsure')}}", *(f"{cell:<{width}}" for cell in of_heads), path]
        file.write("  ".join(cells) + "\n")

    def line(row: Prediction) -> None:
        # A name may hold what would move the cursor.
        path = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(row.source))
        if row.problem:
            return write("no picture", ["–"] * len(heads), f"{path}: {row.problem}")
        decision = f"{row.label} {row.probability:.3f}{' unsure' if row.unsure else ''}"
        write(decision, ["{} {:.3f}".format(*row.heads[head]) for head in heads], path)

    write("decision", heads, "file")
    return line
