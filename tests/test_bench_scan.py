import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from facemask.bench_scan import bench_duplicates, bench_scan, make_pictures, pairwise
from facemask.cli import app
from facemask.errors import UserError


def test_three_of_ten_made_pictures_are_copies(tmp_path: Path) -> None:
    known = make_pictures(tmp_path, 20)
    assert known.tolist() == [*range(6), 6, 6, 6, 6, *range(10, 16), 16, 16, 16, 16]
    pictures = [np.asarray(cv2.imread(str(tmp_path / path))) for path in known.index]
    assert [picture.shape[0] for picture in pictures] == [96] * 7 + [58, 96, 96] + [96] * 7 + [58, 96, 96]
    assert np.abs(pictures[6].astype(int) - pictures[8][:, ::-1]).mean() < 5
    assert (tmp_path / known.index[9]).stat().st_size < (tmp_path / known.index[6]).stat().st_size


def test_scan_finds_all_made_copies_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench_scan([20, 40], tmp_path)
    assert file.name == "scan.json"
    assert file.parents[1] == tmp_path / "bench"
    content = json.loads(file.read_text())
    # a picture and three copies: six pairs
    assert [row["pairs"] for row in content["searches"]] == [
        dict.fromkeys(("found", "known", "both"), n) for n in (12, 24)
    ]
    assert [row["groups"] for row in content["searches"]] == [{"found": n, "known": n} for n in (2, 4)]
    assert all(row["precision"] == row["recall"] == 1 for row in content["searches"])
    assert all(30 < row["peak_rss_mib"] < 8192 for row in content["searches"])
    assert all(0 < row["rescan_seconds"] < row["seconds"] for row in content["searches"])
    assert content["command"] == "facemask bench scan --sizes 20,40"
    assert content["versions"].keys() >= {"faiss-cpu", "ImageHash"}
    assert "1.0000" in capsys.readouterr().out


def test_precision_and_recall_by_hand() -> None:
    known = pd.Series({"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 3})
    # found: ab, ad, bd, ef; known: ab, ac, bc, de; both: ab
    found = pd.Series({"f": "z", "e": "z", "d": "x", "c": "y", "b": "x", "a": "x"})
    assert pairwise(found, known) == {
        "groups": {"found": 2, "known": 2},
        "pairs": {"found": 4, "known": 4, "both": 1},
        "precision": 0.25,
        "recall": 0.25,
    }
    alone = pd.Series(dict.fromkeys("ab", 0) | {"c": 1})
    apart = pd.Series({"a": 0, "b": 1, "c": 2})
    assert (pairwise(apart, alone)["precision"], pairwise(apart, alone)["recall"]) == (None, 0)
    assert (pairwise(alone, apart)["precision"], pairwise(alone, apart)["recall"]) == (0, None)


def test_duplicates_against_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    known = make_pictures(root, 20).astype(str)
    # By this reference 9 is no copy of 6 (3 pairs found falsely), and 0, 1 and 2 are one (3 pairs missed);
    # an empty cell is no group.
    known.iloc[9], known.iloc[[1, 2]], known.iloc[[3, 4]] = "other", "0", ""
    reference = tmp_path / "known.csv"
    known.rename_axis("path").rename("dup_group").to_csv(reference)
    file = bench_duplicates(root, reference, False, tmp_path)
    assert file.name == "duplicates.json"
    (row,) = json.loads(file.read_text())["searches"]
    assert row["pairs"] == {"found": 12, "known": 12, "both": 9}
    assert row["precision"] == row["recall"] == 0.75
    assert row["groups"] == {"found": 2, "known": 3}
    assert row["files"] == 20
    assert "known.csv" in capsys.readouterr().out
    assert str(tmp_path) not in file.read_text()
    shutil.copy(root / known.index[0], root / "a" / "new.jpg")
    with pytest.raises(UserError, match=r"1 picture\(s\) have come"):
        bench_duplicates(root, reference, False, tmp_path)


def test_the_options_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sizes 10,x: give whole numbers from 2"):
        CliRunner().invoke(app, ["bench", "scan", "--sizes", "10,x"], catch_exceptions=False)
    result = CliRunner().invoke(app, ["bench", "duplicates", str(tmp_path), "--reference", str(tmp_path / "no.csv")])
    assert result.exit_code == 2
    assert "no.csv" in "".join(result.output.replace("│", "").split())  # the box breaks long paths
