"""Pictures through Hugging Face `datasets`: local Parquet files and image folders, and names on the hub."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.data import manifest, splits, store
from facemask.data.datamodule import ImageData
from facemask.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation", "dev"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}
_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


class HubData(ImageData):
    """A data set that Hugging Face `datasets` reads, under the same rules as a folder of pictures.

    A picture's id is its file name where every row has one and no two are equal, else `split/row`. Of picture columns
    only bytes are read: decoding is this project's own.

    Args:
        name: a Parquet file, a folder that `datasets` understands (Parquet files or class folders), or a hub id.
        config, revision: of a hub data set that has several.
        image_column, label_column: needed only where more than one column could be meant.
        own_splits: keep the data set's own train, validation and test (without validation, a part of train); false
            pools them for a split by our rules. A data set of one split is always split by our rules.
        on_bad_file: as everywhere, and rows without a label are treated as bad pictures.
    """

    def __init__(
        self,
        *,
        name: str | None,
        config: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        own_splits: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not name:
            raise UserError(
                "no data set is given: set data.name to a Parquet file, a folder, or a hub id as OWNER/NAME"
            )
        self.source = name
        self.config = config
        self.revision = revision
        self.image_column = image_column
        self.label_column = label_column
        self.own_splits = own_splits
        self._places: dict[str, tuple[Dataset, int]] = {}

    def load_table(self) -> pd.DataFrame:
        parts = load(self.source, self.config, self.revision, self.cache_dir / "datasets")
        listing = self._listing(parts)
        if (lost := listing["label"].isna()).any():
            unlabelled = dict.fromkeys(listing["path"][lost], "has no label")
            listing = self._without_bad(listing, unlabelled)
        if len(found := sorted(listing["label"].unique())) < 2:
            raise UserError(f"data.name={self.source} has pictures of {len(found)} class(es); it needs two or more")
        kept = store.collect(
            listing[["path", "label", "bytes", "mtime_ns"]], self.read, self.store, max_pixels=self.max_pixels
        )
        by = [f"by {column}" for column in self.group_by]
        table = kept.merge(listing[["path", "part", *by]], on="path", validate="one_to_one")
        table["group"] = manifest.join_groups(table, ["dup_group", *by])
        if len(parts) == 1 or not self.own_splits or self.split is not None:
            return table
        return table.assign(split=self._own_split(table))

    def read(self, path: str) -> bytes:
        dataset, row = self._places[path]
        return _bytes(dataset[row][self._image])

    def thumbnails(self, paths: Sequence[str]) -> np.ndarray:
        return store.thumbnails(self.store, paths)

    def _listing(self, parts: dict[str, "Dataset"]) -> pd.DataFrame:
        """One row per picture in the data set's order: path, label (None where unlabelled), bytes, mtime_ns, part, and
        the columns of group_by as "by COLUMN"."""
        from datasets import ClassLabel, Image

        first = next(iter(parts.values()))
        if absent := [column for column in self.group_by if column not in first.features]:
            known = ", ".join(first.features)
            raise UserError(f"data.group_by: data.name={self.source} has no column {absent[0]}, but {known}")
        self._image, label = find_columns(first, self.source, self.image_column, self.label_column)
        feature = first.features[label]
        names = feature.names if isinstance(feature, ClassLabel) else None
        parts = {part: rows.cast_column(self._image, Image(decode=False)) for part, rows in parts.items()}
        seen = "".join(rows._fingerprint for rows in parts.values())
        folder = self.cache_dir / "manifests"
        self.store = folder / f"hf_{hashlib.sha256(f'{self.source}{seen}'.encode()).hexdigest()[:32]}.sqlite"

        frames = []
        for part, rows in parts.items():
            others = pd.DataFrame({f"by {column}": rows[column][:] for column in self.group_by})
            facts = pd.DataFrame(_facts(rows, self._image), columns=["file", "bytes", "mtime_ns"])
            labels = pd.Series([_label_name(value, names) for value in rows[label]], dtype="str")
            frames.append(facts.assign(part=part, row=range(len(rows)), label=labels).join(others))
        listing = pd.concat(frames, ignore_index=True)
        root = Path(self.source).absolute()
        files = [_relative(file, root) for file in listing.pop("file")]
        if all(files) and len(set(files)) == len(files):
            listing["path"] = files
        else:
            listing["path"] = [f"{part}/{row:06d}" for part, row in zip(listing["part"], listing["row"], strict=True)]
        places = zip(listing["path"], listing["part"], listing.pop("row"), strict=True)
        self._places = {path: (parts[part], row) for path, part, row in places}
        return listing

    def _own_split(self, table: pd.DataFrame) -> pd.Series:
        split = table["part"].str.lower().map(_SPLITS)
        if split.isna().any():
            unknown = ", ".join(sorted(table["part"][split.isna()].unique()))
            raise UserError(
                f"data.name={self.source} has the split(s) {unknown}, which are none of train, validation and test; "
                "data.own_splits=false pools all pictures and splits them by our rules"
            )
        if "val" not in set(split):
            train, val, _ = self.split_ratios
            rows = table[split == "train"]
            share = val / (train + val)
            split = splits.make_split(rows, self.split_seed, (1 - share, share, 0.0)).reindex(table.index).fillna(split)
        return split


def load(name: str, config: str | None, revision: str | None, cache_dir: Path) -> dict[str, "Dataset"]:
    """The splits of a data set by name; local ones without a network, hub ones from the cache where there is none.

    Args:
        cache_dir: what `datasets` makes of local files is kept here; hub data sets stay in its own cache.

    Raises:
        UserError: `datasets` is not installed, or there is no such data set, or it cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("data=hf needs the package datasets: pip install 'facemask[hf]'") from error

    path, more = Path(name), {"name": config, "revision": revision}
    local = path.exists()
    if local:
        more = {"cache_dir": str(cache_dir)}
    elif path.suffix in (".parquet", ".arrow", ".csv", ".json") or not _HUB_ID.fullmatch(name):
        raise UserError(f"data.name={name} does not exist; give a Parquet file, a folder, or a hub id as OWNER/NAME")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if local and path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=[str(path)], **more)
        else:
            if not local:
                _check_hub(name)
            loaded = datasets.load_dataset(str(path.absolute()) if local else name, **more)
    except UserError:
        raise
    except Exception as error:  # its builders raise what their readers raise
        if not local and datasets.config.HF_HUB_OFFLINE:
            raise UserError(
                f"data.name={name} is no file or folder here, the hub is not reached, and its cache has no data set of "
                "this name: mend the path, or fetch the data set where there is a network"
            ) from error
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"data.name={name} cannot be read by datasets ({reason}); give another data set") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return {str(part): rows for part, rows in loaded.items()}


def _check_hub(name: str) -> None:
    """One quick question to the hub; where it gives no answer, `datasets` is told to use its cache alone, or it would
    retry for a minute."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=5)
    except GatedRepoError as error:
        raise UserError(f"data.name={name} asks for an agreement on the hub: accept it and log in there") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"data.name={name} is neither a file or folder here nor a data set on the hub") from error
    except Exception:  # any other failure: the cache may still have it
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def find_columns(rows: "Dataset", name: str, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of pictures and labels: those named, else the only ones of their kind.

    Raises:
        UserError: a named column is absent, or none or several could be meant.
    """
    from datasets import ClassLabel, Image, Value

    kinds = dict(rows.features)

    def choose(what: str, given: str | None, *candidates: list[str]) -> str:
        if given is not None:
            if given not in kinds:
                raise UserError(f"data.{what}_column={given}: data.name={name} has the columns {', '.join(kinds)}")
            return given
        found = next((found for found in candidates if found), [])
        if len(found) == 1:
            return found[0]
        several = f"more than one column of {what}s ({', '.join(found)})" if found else f"no column of {what}s"
        raise UserError(
            f"data.name={name} has {several} among {', '.join(kinds)}: name it with data.{what}_column=COLUMN"
        )

    image = choose(
        "image",
        image,
        [column for column, kind in kinds.items() if isinstance(kind, Image)],
        [column for column, kind in kinds.items() if _holds_bytes(kind)],
    )
    scalars = [column for column, kind in kinds.items() if isinstance(kind, Value) and not _holds_bytes(kind)]
    label = choose(
        "label",
        label,
        [column for column, kind in kinds.items() if isinstance(kind, ClassLabel)],
        [column for column in scalars if column in ("label", "labels", "class")],
        scalars,
    )
    return image, label


def _holds_bytes(kind: Any) -> bool:
    """Whether a column could hold encoded pictures: bytes, or the pair of bytes and path that `datasets` stores."""
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _facts(rows: "Dataset", image: str) -> Iterator[tuple[str, int, int]]:
    """File name ("" where there is none), size and time of change (0 for pictures inside a table) of every row."""
    for batch in rows.select_columns([image]).iter(256):
        for value in batch[image]:
            value = value or {"bytes": b"", "path": None}
            if value["bytes"] is None:
                try:
                    facts = Path(value["path"]).stat()
                except OSError:
                    yield value["path"], 0, 0
                else:
                    yield value["path"], facts.st_size, facts.st_mtime_ns
            else:
                yield value["path"] or "", len(value["bytes"]), 0


def _bytes(value: dict[str, Any] | None) -> bytes:
    if value is None:
        return b""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _relative(file: str, root: Path) -> str:
    path = Path(file)
    if path.is_absolute() and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.name


def _label_name(value: Any, names: list[str] | None) -> str | None:
    """A label as text; None for a missing one (`datasets` writes -1 for the hidden labels of some test splits)."""
    if value is None or (names and value == -1) or (isinstance(value, float) and np.isnan(value)):
        return None
    return names[value] if names else str(value)
