"""Lightning data modules: a table of pictures, its splits, and loaders of exactly those pictures.

A new source of pictures is one subclass of `ImageData` with two methods, `load_table` and `read`.
"""

import hashlib
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from facemask.data import faces, splits, synthetic
from facemask.data.cache import PixelCache, open_cache
from facemask.data.images import centre_crop
from facemask.data.manifest import scan_folder
from facemask.data.transforms import Augmentation, apply_mix
from facemask.errors import UserError

Batch = dict[str, Any]


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class TrainViews(Dataset):
    """Augmented views of the training split, addressed by (epoch, row).

    An item is a dictionary of `pixels` uint8 (3, H, W), `target` float32 (C,) (a distribution over classes, mixed
    where the view is) and `row`.
    """

    def __init__(
        self,
        pixels: PixelCache,
        rows: np.ndarray,
        paths: Sequence[str],
        labels: np.ndarray,
        num_classes: int,
        augmentation: Augmentation,
        partners: Sequence[np.ndarray],
    ) -> None:
        self.pixels = pixels
        self.rows = rows
        self.paths = paths
        self.labels = labels
        self.num_classes = num_classes
        self.augmentation = augmentation
        self.partners = partners

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, index: int, epoch: int) -> np.ndarray:
        """The view of one training picture in one epoch, before any mixing: uint8 (H, W, 3)."""
        return self.augmentation.view(self.pixels[self.rows[index]], self.paths[index], epoch)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        view = self.view(index, epoch)
        target = np.zeros(self.num_classes, dtype=np.float32)
        mix = self.augmentation.mix(self.paths[index], epoch, self.partners[index])
        if mix is None:
            target[self.labels[index]] = 1
        else:
            view = apply_mix(view, self.view(mix.partner, epoch), mix)
            target[self.labels[index]] += mix.lam
            target[self.labels[mix.partner]] += 1 - mix.lam
        return {"pixels": to_tensor(view), "target": torch.from_numpy(target), "row": index}


class EvalViews(Dataset):
    """Evaluation views (centre crop at working size) of some rows of the table.

    An item is a dictionary of `pixels` uint8 (3, H, W) and `label` (class index).
    """

    def __init__(self, pixels: PixelCache, rows: np.ndarray, labels: np.ndarray, img_size: int) -> None:
        self.pixels = pixels
        self.rows = rows
        self.labels = labels
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        pixels = centre_crop(self.pixels[self.rows[index]], self.img_size)
        return {"pixels": to_tensor(pixels), "label": int(self.labels[index])}


class EpochSampler(Sampler):
    """Keys (epoch, row) of a shuffled epoch; rank r of w takes every w-th, so that the global batch of a step holds
    the same pictures whatever the number of ranks. Lightning calls `set_epoch`."""

    def __init__(self, num_rows: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        shared = order[: len(self) * self.world_size]  # equal shares, or a rank would wait for ever
        return iter([(self.epoch, int(index)) for index in shared[self.rank :: self.world_size]])


class FirstEpoch(SequentialSampler):
    """Epoch 0 of a sampler again and again, for `trainer.overfit_batches`; Lightning would replace anything that is no
    `SequentialSampler`."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.keys = list(sampler)
        super().__init__(self.keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # OpenCV would start threads of its own in every worker


class ImageData(pl.LightningDataModule):
    """Splits, pixels and loaders over a table of pictures.

    Args:
        augmentation: makes the training views.
        img_size: side of a view in pixels.
        batch_size: pictures of one step over all ranks together.
        num_workers: loader processes per rank; 0 loads in the training process.
        crop_pct: the short side is resized to floor(img_size / crop_pct), as in timm, before the centre crop.
        fraction, fold, folds, label_noise, split_seed, split_ratios: see `facemask.data.splits`.
        cache_dir: decoded pixels are kept here.
        default_img_size: read by conf/model/_base.yaml alone.

    After `prepare`: `table` (one row per picture used), `classes` (sorted), `fingerprint` (of all of it) and
    `test_fingerprint` (of the test split, whatever is trained on), `left_out` (path -> reason), `unnamed` (pictures
    that a split file does not name).
    """

    drawn = False  # drawn pictures may leave the machine, photographs of people may not
    unnamed = 0
    max_pixels = 64_000_000
    on_bad_file = "error"

    def __init__(
        self,
        *,
        augmentation: Augmentation,
        img_size: int,
        batch_size: int = 64,
        num_workers: int = 0,
        crop_pct: float = 0.875,
        fraction: float = 1.0,
        fold: int | None = None,
        folds: int = 5,
        label_noise: float = 0.0,
        split_seed: int = 0,
        split_ratios: tuple[float, float, float] = (0.7, 0.1, 0.2),
        cache_dir: str | Path = ".cache/facemask",
        default_img_size: int | None = None,
    ) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.img_size = img_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.working_size = int(img_size / crop_pct)
        self.fraction = fraction
        self.fold = fold
        self.folds = folds
        self.label_noise = label_noise
        self.split_seed = split_seed
        train, val, test = split_ratios
        self.split_ratios = (train, val, test)
        self.cache_dir = Path(cache_dir)
        self.crossfit = 1
        self._prepared: tuple[str, ...] = ()

    @abstractmethod
    def load_table(self) -> pd.DataFrame:
        """One row per picture: path, label, sha256, group, width, height, bytes, format, problem; and split where
        the source brings its own."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The encoded picture at a path of the table."""

    # -- the table ----------------------------------------------------------------------------------------------

    def prepare(self, needed: Sequence[str] = ()) -> None:
        """Read the table, split it and decode the pictures of train, val and the needed splits; others stay undecoded.

        Raises:
            UserError: no pictures, no usable split, or undecodable pictures with on_bad_file=error.
        """
        wanted = tuple(sorted({"train", "val", *needed}))
        if self._prepared == wanted:
            return
        table = self.load_table()
        classes = sorted(table["label"].unique())
        table = self._without_bad(table, dict(zip(table["path"], table["problem"], strict=True)))
        table = self._with_splits(table)
        # Unneeded splits stay in the table (and in the fingerprint) but their pictures are not decoded.
        used = table[table["split"].isin(wanted)]
        cache = open_cache(used, self.read, self.working_size, self.max_pixels, self.cache_dir)
        table = self._without_bad(table, cache.problems)
        cache_row = {path: row for row, path in enumerate(used["path"])}
        self.table = table.sort_values("path", ignore_index=True)
        self.pixels = cache
        self.cache_rows = np.array([cache_row.get(path, -1) for path in self.table["path"]])
        self.classes = classes
        self._check_splits(wanted)
        self.fingerprint = splits.fingerprint(self.table)
        self.test_fingerprint = splits.fingerprint(self.table[self.table["split"] == "test"])
        self._prepared = wanted
        self._noisy = self._noisy_labels()

    def _without_bad(self, table: pd.DataFrame, problems: dict[str, str]) -> pd.DataFrame:
        problems = {path: problem for path, problem in problems.items() if problem}
        self.left_out: dict[str, str] = {**getattr(self, "left_out", {}), **problems}
        if problems and self.on_bad_file == "error":
            names = "; ".join(f"{path} ({problem})" for path, problem in sorted(problems.items())[:20])
            more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(
                f"{len(problems)} picture(s) cannot be used: {names}{more}; "
                "mend or remove them, or leave them out with data.on_bad_file=skip"
            )
        return table[~table["path"].isin(list(problems))]

    def _with_splits(self, table: pd.DataFrame) -> pd.DataFrame:
        if self.fold is not None:
            table = table.assign(split=splits.fold_split(table, self.fold, self.folds, self.split_seed))
        elif "split" not in table:
            table = table.assign(split=splits.make_split(table, self.split_seed, self.split_ratios))
        if self.fraction < 1:
            table = splits.take_fraction(table, self.fraction, self.split_seed)
        return table

    def _check_splits(self, wanted: Sequence[str]) -> None:
        if empty := sorted(set(wanted) - set(self.table["split"])):
            raise UserError(
                f"no picture is left in {' and '.join(empty)}: add pictures, choose another split, or leave it out of "
                "evaluate.splits"
            )
        if lost := sorted(set(self.classes) - set(self.table["label"][self.table["split"] == "train"])):
            raise UserError(
                f"no usable picture of {', '.join(lost)} is left in train: add pictures, or remove the class's folder"
            )

    def _noisy_labels(self) -> pd.Series:
        if self.label_noise == 0:
            return self.table["label"]
        return splits.flip_labels(self.table, self.label_noise, self.split_seed, self.classes)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split in `table`."""
        return np.flatnonzero(self.table["split"] == split)

    def labels(self, rows: np.ndarray, noisy: bool = False) -> np.ndarray:
        """Class indices (N,) of rows; `noisy` gives the training targets under label noise."""
        column = self._noisy if noisy else self.table["label"]
        return np.searchsorted(self.classes, column.to_numpy()[rows].astype(str))

    def crossfit_folds(self) -> np.ndarray:
        """Cross-fitting fold (N,) of every training picture; all 0 without cross-fitting."""
        train = self.table.iloc[self.rows("train")]
        if self.crossfit == 1:
            return np.zeros(len(train), dtype=np.int64)
        return splits.assign_folds(train, self.crossfit, self.split_seed).to_numpy()

    # -- loaders ------------------------------------------------------------------------------------------------

    def picture(self, path: str) -> np.ndarray:
        """The evaluation view of a picture by its path: uint8 (H, W, 3)."""
        row = pd.Index(self.table["path"]).get_loc(path)
        return centre_crop(self.pixels[self.cache_rows[row]], self.img_size)

    def train_views(self, noisy: bool = True) -> TrainViews:
        """The augmented views of the training split; `noisy`: with label noise, where there is any."""
        rows = self.rows("train")
        folds = self.crossfit_folds()
        # A partner comes from the same cross-fitting fold: the teacher of a mixed view has seen neither picture.
        members = [np.flatnonzero(folds == fold) for fold in range(self.crossfit)]
        return TrainViews(
            self.pixels,
            self.cache_rows[rows],
            self.table["path"].to_numpy()[rows].tolist(),
            self.labels(rows, noisy=noisy),
            len(self.classes),
            self.augmentation,
            [members[fold] for fold in folds],
        )

    def eval_loader(self, split: str, batch_size: int, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Evaluation views of a split in the table's order; rank r of w gets every w-th picture, none twice."""
        if split not in self._prepared:
            raise ValueError(f"the pictures of {split} are not decoded: name it in prepare()")
        rows = self.rows(split)[rank::world_size]
        views = EvalViews(self.pixels, self.cache_rows[rows], self.labels(rows), self.img_size)
        return DataLoader(views, batch_size, **self._workers())

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": _quiet_worker,
            "pin_memory": torch.cuda.is_available(),
        }

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def prepare_data(self) -> None:
        self.prepare(self._prepared)

    def setup(self, stage: str | None = None) -> None:
        self.prepare(self._prepared)

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank()
        if self.batch_size % world_size:
            raise UserError(
                f"data.batch_size={self.batch_size} is shared by {world_size} processes: "
                f"choose a multiple of {world_size}"
            )
        views = self.train_views()
        epochs = EpochSampler(len(views), self.augmentation.seed, rank, world_size)
        share = self.batch_size // world_size
        sampler = FirstEpoch(epochs) if getattr(self.trainer, "overfit_batches", 0) > 0 else epochs
        # A smaller last batch would be a noisier step; a set smaller than one batch is used whole.
        return DataLoader(views, share, sampler=sampler, drop_last=len(sampler) >= share, **self._workers())

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader("val", self.batch_size, *self._rank())


class FolderData(ImageData):
    """Any folder of pictures with one sub-folder per class.

    Args:
        root: the folder.
        split: CSV with path,label,split; None makes a seeded split.
        on_bad_file: "error" or "skip".
        max_pixels: pictures above this are refused undecoded.
    """

    def __init__(
        self,
        *,
        root: str | None,
        split: str | None = None,
        on_bad_file: str = "error",
        max_pixels: int = 64_000_000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = Path(root) if root else None
        self.split = Path(split) if split else None
        self.on_bad_file = on_bad_file
        self.max_pixels = max_pixels

    def load_table(self) -> pd.DataFrame:
        table = scan_folder(self.root)
        if self.split is None or self.fold is not None:
            return table
        named, self.unnamed = splits.read_split(self.split, table)
        table = table.assign(split=named)
        return table[table["split"].notna()]

    def read(self, path: str) -> bytes:
        assert self.root is not None
        return (self.root / path).read_bytes()


class SyntheticData(ImageData):
    """Faces drawn by the project itself.

    Args:
        num_images: pictures in all three splits together.
        states: 2 or 5 classes, see `facemask.data.synthetic`.
        draw_seed: another seed draws other faces.
    """

    drawn = True

    def __init__(self, *, num_images: int, states: int = 2, draw_seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.num_images = num_images
        self.states = states
        self.draw_seed = draw_seed

    @property
    def root(self) -> Path:
        code = b"".join(Path(str(module.__file__)).read_bytes() for module in (faces, synthetic))
        version = hashlib.sha256(code).hexdigest()[:12]  # other drawing code draws other faces
        name = f"{self.num_images}_{self.states}_{self.draw_seed}_{version}"
        return self.cache_dir / "synthetic" / name / "faces"

    def load_table(self) -> pd.DataFrame:
        folder = self.root.parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
                try:
                    synthetic.write_folder(scratch / "faces", self.num_images, self.draw_seed, self.states)
                    scratch.replace(folder)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        return scan_folder(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()
