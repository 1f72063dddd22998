"""Lightning data modules: a table of pictures, its splits, and loaders of exactly those pictures.

A new source of pictures is one subclass of `ImageData` with two methods, `load_table` and `read`.
"""

import ctypes
import gc
import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from facemask.data import counterfactual, duplicates, faces, splits, synthetic
from facemask.data.cache import Files, Pixels, open_cache, writing
from facemask.data.images import centre_crop, decode
from facemask.data.manifest import load_manifest, scan_folder, store_of
from facemask.data.store import thumbnails
from facemask.data.transforms import Augmentation, Mix, apply_mix, epoch_order
from facemask.errors import UserError
from facemask.files import build_folder

Batch = dict[str, Any]
NO_LABEL = -1  # of a picture that only fills a batch
# What Arrow's own allocator frees stays with the process; what the system's frees can be given back.
pa.set_memory_pool(pa.system_memory_pool())


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (3, H, W)."""
    planes = np.empty((3, *pixels.shape[:2]), dtype=np.uint8)
    cv2.split(pixels, list(planes))  # faster than a transposed copy
    return torch.from_numpy(planes)


@dataclass(eq=False)
class TrainViews(Dataset):
    """Augmented views of the training split, addressed by (epoch, row).

    An item is a dictionary of `pixels` uint8 (3, H, W), `target` float32 (C,) (a distribution over classes, mixed
    where the view is), `row` and `epoch`.

    Args:
        pixels: pictures of the whole table.
        rows: the training pictures' rows in `pixels` (N,).
        paths: their paths.
        labels: class indices (N,).
        num_classes: C.
        augmentation: makes the views.
        folds: cross-fitting fold (N,); a view is mixed with one of the same fold.
        faces: (N, 4) faces that may be painted, as `facemask.data.counterfactual.find_faces` gives them; NaN for other
            pictures. None: paint nothing.
        masked: class index of pictures whose nose and mouth are painted over.
    """

    pixels: Pixels
    rows: np.ndarray
    paths: Any
    labels: np.ndarray
    num_classes: int
    augmentation: Augmentation
    folds: np.ndarray
    faces: np.ndarray | None = None
    masked: int = NO_LABEL

    def __post_init__(self) -> None:
        self._partners = -1, self.folds  # of the epoch read last

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """The training pictures in the order of an epoch (N,)."""
        return epoch_order(self.folds, self.augmentation.seed, epoch)[0]

    def mix(self, index: int, epoch: int) -> Mix | None:
        """How the view of one training picture in one epoch is mixed."""
        if self._partners[0] != epoch:
            self._partners = epoch, epoch_order(self.folds, self.augmentation.seed, epoch)[1]
        return self.augmentation.mix(self.paths[index], epoch, int(self._partners[1][index]))

    def view(self, index: int, epoch: int) -> np.ndarray:
        """The view of one training picture in one epoch, before any mixing: uint8 (H, W, 3)."""
        pixels = self.pixels[self.rows[index]]
        if (painting := self._painting(index, epoch)) is not None:
            assert self.faces is not None
            pixels = counterfactual.paint(pixels, self.faces[index], *painting)
        return self.augmentation.view(pixels, self.paths[index], epoch)

    def label(self, index: int, epoch: int) -> int:
        """The class of that view."""
        painting = self._painting(index, epoch)
        return self.masked if painting is not None and painting[0] else int(self.labels[index])

    def _painting(self, index: int, epoch: int) -> tuple[bool, np.random.Generator] | None:
        if self.faces is None or np.isnan(self.faces[index, 0]):
            return None
        return self.augmentation.painting(self.paths[index], epoch)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Batch]:
        """The items of a batch; a view that is also another's partner is made once."""
        view = cache(self.view)
        return [self._item(index, epoch, view) for epoch, index in keys]

    def _item(self, index: int, epoch: int, view: Callable[[int, int], np.ndarray]) -> Batch:
        pixels = view(index, epoch)
        target = np.zeros(self.num_classes, dtype=np.float32)
        mix = self.mix(index, epoch)
        if mix is None:
            target[self.label(index, epoch)] = 1
        else:
            pixels = apply_mix(pixels, view(mix.partner, epoch), mix)
            target[self.label(index, epoch)] += mix.lam
            target[self.label(mix.partner, epoch)] += 1 - mix.lam
        pixels = self.augmentation.resize(pixels, epoch)
        return {"pixels": to_tensor(pixels), "target": torch.from_numpy(target), "row": index, "epoch": epoch}


@dataclass(eq=False)
class EvalViews(Dataset):
    """Evaluation views (centre crop at working size) of some rows of the table.

    An item is a dictionary of `pixels` uint8 (3, H, W) and `label` (class index).
    """

    pixels: Pixels
    rows: np.ndarray
    labels: np.ndarray
    img_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        pixels = centre_crop(self.pixels[self.rows[index]], self.img_size)
        return {"pixels": to_tensor(pixels), "label": int(self.labels[index])}


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Keys (epoch, row) of a shuffled epoch; rank r of w takes every w-th, so that the global batch of a step holds
    the same pictures whatever the number of ranks. Lightning calls `set_epoch`. `resume_at` is (epoch, keys of it that
    are not given again)."""

    views: TrainViews
    rank: int = 0
    world_size: int = 1
    resume_at: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.epoch = self.resume_at[0]

    def set_epoch(self, epoch: int) -> None:
        # Lightning starts the loader processes of a resumed run before it has read the epoch, and says 0.
        self.epoch = max(epoch, self.resume_at[0])

    def __len__(self) -> int:
        return len(self.views) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.views.order(self.epoch)
        shared = order[: len(self) * self.world_size]  # equal shares, or a rank would wait for ever
        epoch, seen = self.resume_at
        own = shared[self.rank :: self.world_size][seen if self.epoch == epoch else 0 :]
        return ((self.epoch, int(index)) for index in own)


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


def _in_a_mapped_file(table: pd.DataFrame, cache_dir: Path) -> pd.DataFrame:
    """The same table, its columns in a file that is mapped and has no name: gone with the last process that maps it."""
    with writing(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, suffix=".arrow") as file:
            arrow = pa.Table.from_pandas(table, preserve_index=False)
            with pa.ipc.new_file(file, arrow.schema) as writer:
                writer.write_table(arrow)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all().to_pandas(split_blocks=True)


def _return_freed_memory() -> None:
    """Give back what the table took before it lay in a file; else every forked worker has it too."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


class ImageData(pl.LightningDataModule):
    """Splits, pixels and loaders over a table of pictures.

    Args:
        augmentation: makes the training views.
        img_size: side of a view in pixels.
        batch_size: pictures of one step over all ranks together.
        num_workers: loader processes per rank; 0 loads in the training process.
        crop_pct: the short side is resized to floor(img_size / crop_pct), as in timm, before the centre crop.
        fraction, fold, folds, label_noise, split_seed, split_ratios: see `facemask.data.splits`.
        cache: "decoded" keeps decoded pixels in cache_dir; "none" decodes at every access, with the same pixels.
        cache_dir: decoded pixels are kept here.
        split: CSV with path,label,split; None makes a seeded split. A fold goes before it.
        group_by: further columns whose equal values keep pictures on one side of a split.
        on_bad_file: "error" or "skip", for pictures that cannot be decoded.
        max_pixels: pictures above this are refused undecoded.
        default_img_size: read by conf/model/_base.yaml alone.

    After `prepare`: `table` (one row per picture used; it lies in a mapped file, not in memory), `classes` (sorted),
    `fingerprint` (of all of it) and `test_fingerprint` (of the test split, whatever is trained on), `left_out` (path ->
    reason), `unnamed` (pictures that a split file does not name).
    """

    drawn = False  # drawn pictures may leave the machine, photographs of people may not
    root: Path | None = None
    unnamed = 0
    pin_memory: bool | None = None  # None: where there is a GPU
    prefetched: Callable[[DataLoader], Any] | None = None  # what the loader of training batches is wrapped in
    resume_at = (0, 0)  # (epoch, batches of it already trained on)

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
        cache: str = "decoded",
        cache_dir: str | Path = ".cache/facemask",
        split: str | None = None,
        group_by: Sequence[str] | None = None,
        on_bad_file: str = "error",
        max_pixels: int = 64_000_000,
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
        self.split_ratios = split_ratios
        self.cache = cache
        self.cache_dir = Path(cache_dir)
        self.split = split
        self.group_by = list(group_by or [])
        self.on_bad_file = on_bad_file
        self.max_pixels = max_pixels
        self.left_out: dict[str, str] = {}
        self.crossfit = 1
        self._prepared: tuple[str, ...] = ()

    @abstractmethod
    def load_table(self) -> pd.DataFrame:
        """One row per picture: path, label, sha256, group, width, height, bytes, format, problem; and split where
        the source brings its own."""

    def read(self, path: str) -> bytes:
        """The encoded picture at a path of the table."""
        assert self.root is not None
        return (self.root / path).read_bytes()

    def thumbnails(self, paths: Sequence[str]) -> np.ndarray:
        """What near-duplicates are found by, uint8 (N, 64, 64), of pictures of the table that was loaded."""
        with ThreadPoolExecutor() as pool:
            pictures = pool.map(lambda path: duplicates.thumbnail(decode(self.read(path), self.max_pixels)), paths)
            return np.array(list(pictures))

    # -- the table ----------------------------------------------------------------------------------------------

    def prepare(self, needed: Sequence[str] = ()) -> None:
        """Read the table, split it and decode the pictures of train, val and the needed splits; others stay undecoded.

        Raises:
            UserError: no pictures, no usable split, or undecodable pictures with on_bad_file=error.
        """
        wanted = tuple(sorted({"train", "val", *needed}))
        if self._prepared == wanted:
            return
        table = self._load()
        classes = sorted(table["label"].unique())
        table = self._without_bad(table)
        table = splits.split_table(table, self.split_seed, self.split_ratios, self.fold, self.folds, self.fraction)
        self._decode(table, wanted)
        self.classes = classes
        self._check_splits(wanted)
        self._prepared = wanted
        self._noisy = self._class_index(self._noisy_labels())

    def prepare_whole(self, split: str, classes: Sequence[str], names: Mapping[str, str]) -> None:
        """Read the table and decode all of it as one split, labelled with the classes of a model.

        Args:
            names: label of this data -> class of the model, where they differ.

        Raises:
            UserError: a label that is none of the classes, or what `prepare` raises.
        """
        table = self._load()
        labels = sorted(table["label"].unique())
        if unused := sorted(set(names) - set(labels)):
            raise UserError(f"--classes names {unused[0]!r}, and the data has the labels {', '.join(labels)}")
        if foreign := [label for label in labels if names.get(label, label) not in classes]:
            raise UserError(
                f"the data's label {foreign[0]!r} is none of the model's classes {', '.join(classes)}: "
                f"say which one it means with --classes {foreign[0]}={classes[0]}"
            )
        table = table.assign(label=table["label"].replace(dict(names)), split=split)
        self._decode(self._without_bad(table), (split,))
        self.classes = list(classes)
        self._prepared = (split,)

    def _decode(self, table: pd.DataFrame, wanted: tuple[str, ...]) -> None:
        # Unneeded splits stay in the table (and in the fingerprint) but their pictures are not decoded.
        table = table.sort_values("path", ignore_index=True)
        used = table["split"].isin(wanted).to_numpy()
        if self.cache == "none":
            files = Files(table[used], self.read, self.working_size, self.max_pixels)
            for _ in files.decode_all():  # to find the bad ones
                pass
            self.pixels: Pixels = files
        else:
            self.pixels = open_cache(table[used], self.read, self.working_size, self.max_pixels, self.cache_dir)
        table = self._without_bad(table, self.pixels.problems)
        self.cache_rows = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)[table.index]
        self.table = _in_a_mapped_file(table, self.cache_dir)
        self.fingerprint = splits.fingerprint(self.table)
        self.test_fingerprint = splits.fingerprint(self.table[self.table["split"] == "test"])

    def _load(self) -> pd.DataFrame:
        table = self.load_table()
        if self.split is None or self.fold is not None:
            return table
        named, self.unnamed = splits.read_split(self.split, table)
        return table.assign(split=named).dropna(subset="split")

    def _without_bad(self, table: pd.DataFrame, problems: dict[str, str] | None = None) -> pd.DataFrame:
        """The table less its pictures with problems, which `on_bad_file` may forbid."""
        if problems is None:
            bad = table[table["problem"] != ""]
            problems = dict(zip(bad["path"], bad["problem"], strict=True))
        self.left_out |= problems
        if problems and self.on_bad_file == "error":
            names = "; ".join(f"{path} ({problem})" for path, problem in sorted(problems.items())[:20])
            more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(
                f"{len(problems)} picture(s) cannot be used: {names}{more}; "
                "mend or remove them, or leave them out with data.on_bad_file=skip"
            )
        return table[~table["path"].isin(list(problems))]

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

        pair = ("bare", "masked") if self.augmentation.counterfactual > 0 else ()
        for key in pair:
            if (name := getattr(self.augmentation, key)) not in self.classes:
                raise UserError(
                    f"augment.{key}={name} is none of the data's classes {', '.join(self.classes)}: "
                    f"set augment.{key}, or augment.counterfactual=0"
                )

    def _class_index(self, labels: pd.Series) -> np.ndarray:
        return pd.Categorical(labels, categories=self.classes).codes.astype(np.int32)

    def _noisy_labels(self) -> pd.Series:
        if self.label_noise == 0:
            return self.table["label"]
        return splits.flip_labels(self.table, self.label_noise, self.split_seed, self.classes)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split in `table`."""
        return np.flatnonzero(self.table["split"] == split)

    def labels(self, rows: np.ndarray, noisy: bool = False) -> np.ndarray:
        """Class indices (N,) of rows; `noisy` gives the training targets under label noise."""
        column = self._noisy if noisy else self._class_index(self.table["label"])
        return column[rows].astype(np.int64)

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
        faces, masked = self._paintable(rows)
        return TrainViews(
            self.pixels,
            self.cache_rows[rows],
            _in_a_mapped_file(self.table.iloc[rows][["path"]], self.cache_dir)["path"].array,
            self.labels(rows, noisy=noisy),
            len(self.classes),
            self.augmentation,
            self.crossfit_folds(),
            faces,
            masked,
        )

    def _paintable(self, rows: np.ndarray) -> tuple[np.ndarray | None, int]:
        """`faces` and `masked` of the training views."""
        augmentation = self.augmentation
        if augmentation.counterfactual == 0:
            return None, NO_LABEL
        bare = (self.table["label"].iloc[rows] == augmentation.bare).to_numpy()
        faces = np.full((len(rows), 4), np.nan, dtype=np.float32)
        pictures = (self.pixels[row] for row in self.cache_rows[rows[bare]])
        names = [f"{digest} {self.working_size}" for digest in self.table["sha256"].iloc[rows[bare]]]
        faces[bare] = counterfactual.kept_faces(pictures, names, self.cache_dir)
        return faces, self.classes.index(augmentation.masked)

    def eval_loader(self, split: str, batch_size: int, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Evaluation views of a split in the table's order; rank r of w gets every w-th batch, so that every picture is
        seen once and beside the same others, whatever w is."""
        if split not in self._prepared:
            raise ValueError(f"the pictures of {split} are not decoded: name it in prepare()")
        rows = self.rows(split)
        views = EvalViews(self.pixels, self.cache_rows[rows], self.labels(rows), self.img_size)
        batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
        return DataLoader(views, batch_sampler=batches[rank::world_size], **self._workers())  # type: ignore[arg-type]

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": _quiet_worker,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        }

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def prepare_data(self) -> None:
        self.prepare(self._prepared)

    def setup(self, stage: str | None = None) -> None:
        self.prepare(self._prepared)

    def check_shares(self, world_size: int) -> None:
        """Raises UserError where so many processes cannot have equal shares of every batch."""
        if self.batch_size % world_size:
            raise UserError(
                f"data.batch_size={self.batch_size} is shared by {world_size} processes: "
                f"choose a multiple of {world_size}"
            )
        if (pictures := len(self.rows("train"))) < world_size:
            raise UserError(f"{pictures} training pictures are too few for {world_size} processes: start fewer")

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank()
        self.check_shares(world_size)
        views = self.train_views()
        _return_freed_memory()
        share = self.batch_size // world_size
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        if overfits:
            sampler: FirstEpoch | EpochSampler = FirstEpoch(EpochSampler(views, rank, world_size))
        else:
            epoch, batches = self.resume_at
            sampler = EpochSampler(views, rank, world_size, (epoch, batches * share))
        # A smaller last batch would be a noisier step; a set smaller than one batch is used whole.
        loader = DataLoader(views, share, sampler=sampler, drop_last=len(sampler) >= share, **self._workers())
        return loader if overfits or self.prefetched is None else self.prefetched(loader)

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._rank()
        share = -(-len(self.rows("val")) // world_size)
        loader = self.eval_loader("val", min(self.batch_size, share), rank, world_size)
        if len(loader) > 0:
            return loader
        # Lightning would leave out the validation of a rank without pictures, for which the others would wait.
        nothing = EvalViews(self.pixels, self.cache_rows[self.rows("val")[:1]], np.array([NO_LABEL]), self.img_size)
        return DataLoader(nothing, **self._workers())


class FolderData(ImageData):
    """Any folder of pictures with one sub-folder per class.

    Args:
        root: the folder.
        manifest: CSV or Parquet with path, dup_group and further columns; None takes the one that `facemask data scan`
            wrote into the folder, else a search for near-duplicates that is made now.
    """

    def __init__(self, *, root: str | None, manifest: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root) if root else None
        self.manifest = Path(manifest) if manifest else None

    def load_table(self) -> pd.DataFrame:
        return load_manifest(
            self.root, self.manifest, group_by=self.group_by, cache_dir=self.cache_dir, max_pixels=self.max_pixels
        )

    def thumbnails(self, paths: Sequence[str]) -> np.ndarray:
        assert self.root is not None
        return thumbnails(store_of(self.root, self.cache_dir, self.max_pixels), paths)


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
        code = b"".join(Path(str(module.__file__)).read_bytes() for module in (faces, synthetic))
        version = hashlib.sha256(code).hexdigest()[:12]  # other drawing code draws other faces
        name = f"{num_images}_{states}_{draw_seed}_{version}"
        self.folder = self.cache_dir / "synthetic" / name
        self.root = self.folder / "faces"

    def load_table(self) -> pd.DataFrame:
        if not self.folder.exists():
            with writing(self.cache_dir):
                build_folder(self.folder, self._draw)
        return scan_folder(self.root)

    def _draw(self, folder: Path) -> None:
        synthetic.write_folder(folder / "faces", self.num_images, self.draw_seed, self.states)
