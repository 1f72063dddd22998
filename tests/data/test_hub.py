"""Data sets through Hugging Face `datasets`, made here of drawn faces; no test needs a network."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")

from facemask.data import hub, synthetic  # noqa: E402
from facemask.data.hub import HubData, find_columns, load  # noqa: E402
from facemask.data.images import decode  # noqa: E402
from facemask.data.transforms import Augmentation  # noqa: E402
from facemask.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["with_mask", "without_mask"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "faces"
    synthetic.write_folder(folder, 60, 0)
    return folder


@pytest.fixture(scope="module")
def files(faces):
    return sorted(faces.glob("*/*.*"))


def rows_of(files, names=True):
    pictures = [{"bytes": file.read_bytes(), "path": file.name if names else None} for file in files]
    return {"image": pictures, "label": [CLASSES.index(file.parent.name) for file in files]}


@pytest.fixture(scope="module")
def parquet(faces, files):
    target = faces.parent / "faces.parquet"
    datasets.Dataset.from_dict(rows_of(files), features=FEATURES).to_parquet(target)
    return target


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local data set asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def data_of(name, cache, **more):
    views = Augmentation(seed=0, img_size=32)
    return HubData(name=str(name), augmentation=views, img_size=32, cache_dir=cache, **more)


def test_a_parquet_file_gives_the_pictures_of_the_folder(parquet, files, faces, cache):
    data = data_of(parquet, cache)
    data.prepare(["test"])
    table = data.table.set_index("path")
    assert data.classes == CLASSES
    assert list(table.index) == sorted(file.name for file in files)
    assert table["label"].to_dict() == {file.name: file.parent.name for file in files}
    assert table["split"].value_counts().to_dict() == {"train": 42, "test": 12, "val": 6}
    for file in files[:5]:
        assert data.read(file.name) == file.read_bytes()
        height, width = decode(file.read_bytes()).shape[:2]
        assert (table.loc[file.name, "width"], table.loc[file.name, "height"]) == (width, height)
    again = data_of(parquet, cache)
    again.prepare(["test"])
    assert again.fingerprint == data.fingerprint


def test_a_folder_of_classes_has_the_ids_and_pixels_of_data_folder(faces, files, cache):
    folder = faces.parent / "classes"
    for file in files:
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / file.name).write_bytes(file.read_bytes())
    data = data_of(folder, cache)
    data.prepare()
    assert set(data.table["path"]) == {f"{file.parent.name}/{file.name}" for file in files}
    first = files[0]
    assert data.read(f"{first.parent.name}/{first.name}") == first.read_bytes()


def parts(folder, files, sizes, names=True):
    order = np.random.default_rng(0).permutation(len(files))
    start = 0
    for part, size in sizes.items():
        chosen = [files[n] for n in order[start : start + size]]
        start += size
        target = folder / "data" / f"{part}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows_of(chosen, names), features=FEATURES).to_parquet(target)
    return folder


def test_own_splits_are_kept_or_pooled(files, cache, tmp_path):
    folder = parts(tmp_path, files, {"train": 30, "validation": 10, "test": 20})
    data = data_of(folder, cache)
    data.prepare(["test"])
    assert data.table["split"].value_counts().to_dict() == {"train": 30, "test": 20, "val": 10}
    pooled = data_of(folder, cache, own_splits=False)
    pooled.prepare(["test"])
    assert pooled.table["split"].value_counts().to_dict() == {"train": 42, "test": 12, "val": 6}
    fold = data_of(folder, cache, fold=0, folds=3)
    fold.prepare(["test"])
    assert (fold.table["split"] == "test").sum() == 20


def test_without_validation_a_part_of_train_is_taken(files, cache, tmp_path):
    folder = parts(tmp_path, files, {"train": 40, "test": 20}, names=False)
    data = data_of(folder, cache)
    data.prepare(["test"])
    assert data.table["split"].value_counts().to_dict() == {"train": 35, "test": 20, "val": 5}
    assert (data.table["path"].str.split("/").str[0] == "test").equals(data.table["split"] == "test")
    assert "train/000000" in set(data.table["path"])


def test_a_split_file_and_groups_of_a_column(parquet, files, cache, tmp_path):
    rows = rows_of(files)
    rows["person"] = [number // 2 for number in range(len(files))]
    features = datasets.Features({**FEATURES, "person": datasets.Value("int64")})
    target = tmp_path / "persons.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(target)
    data = data_of(target, cache, group_by=["person"], label_column="label")
    data.prepare(["test"])
    person = dict(zip([file.name for file in files], rows["person"], strict=True))
    assert data.table.groupby(data.table["path"].map(person))["split"].nunique().max() == 1
    with pytest.raises(UserError, match="has no column who, but image, label, person"):
        data_of(target, cache, group_by=["who"]).prepare()

    split = tmp_path / "split.csv"
    data.table[["path", "label", "split"]].to_csv(split, index=False)
    named = data_of(target, cache, split=str(split))
    named.prepare(["test"])
    assert named.fingerprint == data.fingerprint


def test_copies_stay_together(files, cache, tmp_path):
    rows = rows_of(files)
    rows["image"] += [{"bytes": rows["image"][0]["bytes"], "path": f"copy{n}.png"} for n in range(10)]
    rows["label"] += [rows["label"][0]] * 10
    target = tmp_path / "copies.parquet"
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(target)
    data = data_of(target, cache)
    data.prepare(["test"])
    copies = data.table[data.table["path"].str.startswith("copy") | (data.table["path"] == files[0].name)]
    assert len(copies) == 11
    assert copies["group"].nunique() == 1
    assert copies["split"].nunique() == 1


def test_bad_pictures_and_missing_labels_are_named(files, cache, tmp_path):
    rows = rows_of(files)
    rows["image"][3]["bytes"] = rows["image"][3]["bytes"][:200]
    rows["image"][4]["bytes"] = b"no picture"
    rows["label"][5] = -1
    target = tmp_path / "bad.parquet"
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(target)
    with pytest.raises(UserError, match=rf"1 picture\(s\) cannot be used: {files[5].name} \(has no label\)"):
        data_of(target, cache).prepare()
    data = data_of(target, cache, on_bad_file="skip")
    data.prepare(["test"])
    assert set(data.left_out) == {files[n].name for n in (3, 4, 5)}
    assert data.left_out[files[5].name] == "has no label"
    assert len(data.table) == 57


def test_a_table_of_bytes_and_words(files, cache, tmp_path):
    target = tmp_path / "plain.parquet"
    pd.DataFrame(
        {"picture": [file.read_bytes() for file in files], "worn": [file.parent.name for file in files]}
    ).to_parquet(target)
    data = data_of(target, cache)
    data.prepare()
    assert data.classes == CLASSES
    assert data.read("train/000007") == files[7].read_bytes()


def columns(**kinds):
    return datasets.Dataset.from_dict({name: [] for name in kinds}, features=datasets.Features(kinds))


def test_columns_are_found_or_asked_for():
    image, label, word = datasets.Image(), datasets.ClassLabel(names=CLASSES), datasets.Value("string")
    assert find_columns(columns(a=image, b=label, c=word), "x", None, None) == ("a", "b")
    assert find_columns(columns(a=image, label=word, c=word), "x", None, None) == ("a", "label")
    assert find_columns(columns(a=image, b=image, c=word), "x", "b", None) == ("b", "c")
    with pytest.raises(UserError, match=r"more than one column of images \(a, b\).*data.image_column=COLUMN"):
        find_columns(columns(a=image, b=image, c=word), "x", None, None)
    with pytest.raises(UserError, match=r"more than one column of labels \(b, c\).*data.label_column=COLUMN"):
        find_columns(columns(a=image, b=word, c=word), "x", None, None)
    with pytest.raises(UserError, match="has no column of images among c"):
        find_columns(columns(c=word), "x", None, None)
    with pytest.raises(UserError, match=r"data\.label_column=z: data\.name=x has the columns a, c"):
        find_columns(columns(a=image, c=word), "x", None, "z")


def test_a_name_is_needed(cache):
    with pytest.raises(UserError, match=r"no data set is given: set data\.name"):
        HubData(name=None, augmentation=Augmentation(seed=0, img_size=32), img_size=32, cache_dir=cache)


def test_unknown_splits_are_named(files, cache, tmp_path):
    source = {"train": datasets.Dataset.from_dict(rows_of(files[::2]), features=FEATURES)}
    source["hard"] = datasets.Dataset.from_dict(rows_of(files[1::2]), features=FEATURES)
    data = data_of("x", cache)
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(hub, "load", lambda *_: source)
        with pytest.raises(UserError, match=r"has the split\(s\) hard.*data.own_splits=false pools"):
            data.prepare()
        pooled = data_of("x", cache, own_splits=False)
        pooled.prepare()
        assert len(pooled.table) == 60


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/nowhere/faces", "does not exist; give a Parquet file"),
        ("faces.parquet", "does not exist; give a Parquet file"),
        ("../faces", "does not exist; give a Parquet file"),
        ("owner/no-such-data-set", "the hub is not reached, and its cache has no data set of this name"),
    ],
)
def test_names_that_lead_nowhere_are_told_at_once(name, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(UserError, match=sentence):
        load(name, None, None, tmp_path)
    assert time.perf_counter() - start < 5


def test_the_hub_is_asked_once(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    asked = []

    def answer(error):
        def dataset_info(self, name, **kwargs):
            asked.append(name)
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)

    answer(RepositoryNotFoundError.__new__(RepositoryNotFoundError))
    with pytest.raises(UserError, match="neither a file or folder here nor a data set on the hub"):
        load("owner/unknown", None, None, tmp_path)
    answer(OSError("no route"))
    with pytest.raises(UserError, match="the hub is not reached"):
        load("owner/unknown", None, None, tmp_path)
    assert asked == ["owner/unknown"] * 2
    assert datasets.config.HF_HUB_OFFLINE  # so that nothing else retries


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.parquet cannot be read by datasets \(.*Parquet"):
        load(str(tmp_path / "bad.parquet"), None, None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="doesn't contain any data files"):
        load(str(tmp_path / "empty"), None, None, tmp_path)


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data=hf needs the package datasets: pip install 'facemask\[hf\]'"):
        load("x", None, None, tmp_path)


@pytest.mark.slow
def test_training_and_evaluation_on_parquet(parquet, tmp_path):
    shared = [f"cache_dir={tmp_path}/cache", f"ledger={tmp_path}/ledger.jsonl"]
    small = ["model.img_size=32", "model.depth=1", "data.batch_size=16", "trainer.max_epochs=1", "logger=none"]
    options = ["data=hf", f"data.name={parquet}", "model=deit", "trainer=cpu", "evaluate.resamples=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(*arguments):
        result = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    command("train.py", *options, *small, *shared, f"run_dir={tmp_path}/run")
    command_line = "from facemask.cli import main; main()"
    told = command("-c", command_line, "evaluate", f"{tmp_path}/run", *shared)
    assert "predictions of 12 pictures (head) equal to the stored ones, bit for bit" in told
    told = command("-c", command_line, "evaluate", f"{tmp_path}/run", "data=hf", f"data.name={parquet}", *shared)
    assert "42 (70.0%) are near-duplicates" in told
