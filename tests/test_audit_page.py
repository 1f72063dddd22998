import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from facemask import audit
from facemask.cli import app
from facemask.data import audit as shortcuts
from facemask.data.datamodule import FolderData, SyntheticData
from facemask.data.transforms import Augmentation
from facemask.errors import UserError
from facemask.runs.metrics import evaluate
from facemask.runs.page import show
from facemask.runs.predictions import heads


def write_tree(root: Path, labels: str = "ab", per_class: int = 40) -> Path:
    """Class a has a bright top row and is wide, the others differ in nothing; no two pictures look alike."""
    rng = np.random.default_rng(0)
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            pixels = cv2.resize(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8), (48 if label == "a" else 40, 40))
            pixels[:4] = 255 if label == "a" else pixels[:4]
            cv2.imwrite(str(root / label / f"{i:03}.png"), pixels)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("audit") / "faces")


def folder(root: Path, **options: Any) -> FolderData:
    data = FolderData(
        root=str(root),
        augmentation=Augmentation(0, 32),
        img_size=32,
        cache_dir=root.parent / "cache",
        **{"on_bad_file": "skip", **options},
    )
    data.prepare(("test",))
    return data


def accuracies(data: FolderData | SyntheticData) -> dict[str, float]:
    numbers = evaluate(audit.shortcut_predictions(data, 0.5), data.classes, resamples=50)["test"]
    return {head: entry["accuracy"]["value"] for head, entry in numbers.items()}


def text_of(page: audit.Page) -> str:
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    show(page, console)
    return console.export_text()


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_each_shortcut_sees_its_part_alone(tree: Path) -> None:
    found = accuracies(folder(tree))
    assert list(found)[:3] == ["majority", "no_pixels", "border"]
    assert set(found) == set(audit.HEADS) | {f"{h}{s}" for h in audit.PIXEL_SHORTCUTS for s in ("", "_degraded")}
    assert found["majority"] == 0.5
    for head in ("no_pixels", "aspect_ratio", "border", "top_third", "covered", "pixels"):
        assert found[head] == 1.0, head


def test_a_mark_in_the_lower_half_is_not_seen_when_it_is_covered(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", "bc")
    for file in (root / "b").iterdir():
        pixels = cv2.imread(str(file))
        pixels[24:34, 10:30] = 255
        cv2.imwrite(str(file), pixels)
    found = accuracies(folder(root))
    assert found["pixels"] == 1.0
    for head in ("aspect_ratio", "border", "top_third", "covered"):
        assert 0.1 < found[head] < 0.9, head


def test_baselines_are_kept_and_mended(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = folder(tree).table
    fits = []
    real = shortcuts.forest_baseline

    def counted(*arguments: Any) -> pd.DataFrame:
        fits.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(shortcuts, "forest_baseline", counted)
    first = audit.baselines(table, ["val", "test"], tmp_path)
    assert heads(first) == ["majority", "no_pixels"]
    assert len(first) == (table["split"] != "train").sum() == 24
    assert audit.baselines(table, ["test", "val"], tmp_path).equals(first)
    assert len(fits) == 1
    # The figures beside a run's result are those of the audit's predictions, number for number.
    page = audit.shortcut_predictions(folder(tree), 0.5)
    test = first[first["split"] == "test"].reset_index(drop=True)
    assert page[list(test.columns)].equals(test)
    fits.clear()
    (kept,) = (tmp_path / "audits").glob("*.parquet")
    kept.write_bytes(kept.read_bytes()[:100])
    assert audit.baselines(table, ["test", "val"], tmp_path).equals(first)
    assert len(fits) == 1
    only = audit.baselines(table, ["val"], tmp_path)
    assert set(only["split"]) == {"val"}
    other = table.assign(group=table["group"].where(table.index > 1, "joined"))
    assert set(audit.baselines(other, ["val", "test"], tmp_path)["group"]) <= set(other["group"])
    assert len(fits) == 3


def test_leaks_conflicts_and_persons_are_counted(tree: Path, tmp_path: Path) -> None:
    table = folder(tree).table
    split = tmp_path / "s.csv"
    table[["path", "label", "split"]].to_csv(split, index=False)
    of = {name: table["path"][table["split"] == name].tolist() for name in ("train", "val", "test")}
    manifest = table[["path", "sha256"]].assign(dup_group=table["path"], person="")
    by_path = manifest.set_index("path")
    train_a = next(path for path in of["train"] if path.startswith("a/"))
    test_a = [path for path in of["test"] if path.startswith("a/")]
    test_b = [path for path in of["test"] if path.startswith("b/")]
    by_path.loc[[train_a, *test_a[:3]], "dup_group"] = "twins"
    by_path.loc[[train_a, *test_b[:2]], "person"] = "p1"
    by_path.loc[of["val"][0], "person"] = "p2"
    by_path.loc[[test_a[5], test_b[5]], "dup_group"] = "mixed"
    file = tmp_path / "manifest.csv"
    by_path.reset_index().to_csv(file, index=False)
    text = text_of(audit.audit(folder(tree, split=str(split), manifest=str(file)), 0.5, "here"))
    assert "3 of 16 test pictures (18.8%) have a near-duplicate in train." in text
    assert "2 of 16 test pictures (12.5%) show a person of train." in text
    assert "Persons are known for 4 pictures (2 persons)." in text
    rows = {tuple(line.split()[:4]): line.split()[4:] for line in text.splitlines() if " in " in line}
    assert rows["test", "in", "train", "a"] == ["8", "0", "(0.0%)", "3", "(37.5%)", "0", "(0.0%)"]
    assert rows["test", "in", "train", "b"] == ["8", "0", "(0.0%)", "0", "(0.0%)", "2", "(25.0%)"]
    assert "0 pairs have the same pixels and different labels; 1 groups of near-duplicates hold more than one" in text
    assert f"Near-duplicates are those of {file}." in text


def test_unusable_files_are_named_and_the_page_is_self_contained(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", "abcd", 12)
    (root / "a" / "broken.png").write_bytes(b"nothing")
    (root / "b" / "copy of <c>.png").write_bytes((root / "c" / "000.png").read_bytes())
    page = audit.audit(folder(root), 1.0, "here")
    text = text_of(page)
    assert "1 files cannot be used and are left out" in text
    assert "a/broken.png" in text
    assert "1 pairs have the same pixels and different labels" in text
    html = page.write(tmp_path / "page.html").read_text()
    assert "copy of &lt;c&gt;.png" in html
    assert "copy of <c>" not in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert html.count("data:image/jpeg") == 2
    assert text.count("  c  ") >= 1


def test_drawn_faces_are_covered_where_a_mask_can_be(tmp_path: Path) -> None:
    data = SyntheticData(num_images=60, augmentation=Augmentation(0, 32), img_size=32, cache_dir=tmp_path)
    data.prepare(("test",))
    features = audit._features(data, data.table, 0.5)
    grey = (features["covered"].reshape(-1, 32, 32, 3) == 128).all(axis=3)
    assert 0.05 < grey.mean() < 0.65  # a box round mask and straps, wherever the head turns
    assert (grey.mean(axis=(1, 2)) > 0.03).all()
    page = audit.audit(data, 0.5, "drawn")
    assert "mask region covered" in text_of(page)
    assert "lower half covered" not in text_of(page)


def test_a_split_is_what_training_makes(tree: Path, tmp_path: Path) -> None:
    code, output = invoke("data", "split", tree, "--out", tmp_path / "s.csv", "--cache-dir", tmp_path)
    assert code == 0
    trained = folder(tree)
    written = pd.read_csv(tmp_path / "s.csv")
    assert written.equals(trained.table[["path", "label", "split"]].astype(written.dtypes))
    assert f"fingerprint {trained.fingerprint}" in output
    assert f"80 pictures in {trained.table['group'].nunique()} groups that stay together" in output
    assert output.splitlines()[1].split() == ["a", "28", "4", "8"]
    again = invoke("data", "split", tree, "--out", tmp_path / "s.csv", "--seed", 1, "--cache-dir", tmp_path)
    assert again == (
        2,
        f"{tmp_path}/s.csv holds another split or other data; choose another file, or replace it with --force",
    )
    assert invoke("data", "split", tree, "--out", tmp_path / "s.csv", "--seed", 1, "--force")[0] == 0
    options = ("--fold", "1/4", "--fraction", 0.5)
    assert invoke("data", "split", tree, "--out", tmp_path / "f.csv", *options, "--cache-dir", tmp_path)[0] == 0
    folded = folder(tree, fold=1, folds=4, fraction=0.5)
    assert pd.read_csv(tmp_path / "f.csv")["split"].tolist() == folded.table["split"].tolist()


def test_mistakes_on_the_command_line(tree: Path, tmp_path: Path) -> None:
    assert invoke("data", "audit") == (2, "give a folder of pictures, or --synthetic N for drawn faces")
    assert invoke("data", "audit", tree, "--synthetic", 5)[0] == 2
    code, sentence = invoke("data", "audit", tree, "--out", tmp_path / "no" / "page.html")
    assert (code, sentence) == (
        2,
        f"--out {tmp_path}/no/page.html cannot be written: name a file in a folder that exists",
    )
    code, sentence = invoke("data", "split", tree, "--out", tmp_path / "x.csv", "--group-by", "person")
    assert code == 2
    assert "data.group_by names person" in sentence
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leaked", "tested"),
    [("naive_seed0", 150, 819), ("leakfree_seed0", 0, 822), ("leakfree_person_seed0", 0, 818)],
)
def test_the_given_splits(name: str, leaked: int, tested: int) -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    table = pd.read_csv(root / "manifest.csv", dtype=str, keep_default_na=False)
    table = table.merge(pd.read_csv(root / "splits" / f"{name}.csv", dtype=str)[["path", "split"]], on="path")
    found = audit._also_in(table, table["dup_group"], "test", "train")
    assert (int(found.sum()), int((table["split"] == "test").sum())) == (leaked, tested)
    persons = audit._also_in(table, table["person"], "test", "train")
    if name == "leakfree_seed0":
        assert persons.groupby(table["label"]).sum().to_dict() == {"with_mask": 0, "without_mask": 250}
    if name == "leakfree_person_seed0":
        assert not persons.any()
