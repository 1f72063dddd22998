import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemask.data.manifest import COLUMNS, label_conflicts, scan_folder
from facemask.errors import UserError


def picture(seed: int, format_: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def refused(root: Path | str | None) -> str:
    with pytest.raises(UserError) as caught:
        scan_folder(root)
    return str(caught.value)


def test_scan(tmp_path: Path) -> None:
    files = {
        "b/deeper/still/x.JPG": picture(0, "JPEG", (9, 7)),
        "b/wrong name.png": picture(1, "JPEG"),
        "a/1.png": picture(2),
        "a/2.gif": picture(3, "GIF"),
        "c/3.webp": picture(4, "WEBP"),
        "c/copy.webp": picture(4, "WEBP"),
    }
    ignored = {
        "a/.hidden.png": b"",
        ".git/a.png": b"",
        "a/.cache/b.png": b"",
        "a/notes.txt": b"",
        "README.md": b"",
        "manifest.csv": b"",
        "splits/seed0.csv": b"",
        "in_root.png": picture(5),
    }
    table = scan_folder(write(tmp_path, files | ignored))
    assert list(table.columns) == COLUMNS
    assert table["path"].tolist() == sorted(files)
    assert table["label"].tolist() == ["a", "a", "b", "b", "c", "c"]
    assert table["format"].tolist() == ["PNG", "GIF", "JPEG", "JPEG", "WEBP", "WEBP"]
    assert table["width"].tolist() == [8, 8, 9, 8, 8, 8]
    assert table["height"].tolist() == [6, 6, 7, 6, 6, 6]
    assert table["bytes"].tolist() == [len(files[path]) for path in sorted(files)]
    digests = [hashlib.sha256(files[path]).hexdigest() for path in sorted(files)]
    assert table["sha256"].tolist() == digests == table["group"].tolist()
    assert table["group"].nunique() == 5
    assert table["problem"].tolist() == [""] * 6


def test_problems_are_noted(tmp_path: Path) -> None:
    files = {"a/1.png": picture(0), "a/2.png": b"", "b/3.jpg": b"<html>", "b/4.jpg": picture(1, "JPEG")[:60]}
    table = scan_folder(write(tmp_path, files))
    assert table["problem"].tolist() == [
        "",
        "empty file",
        "not a JPEG, PNG, WEBP or GIF picture",
        "truncated",
    ]
    assert table["width"].tolist() == [8, 0, 0, 0]
    assert table["format"].tolist() == ["PNG", "", "", ""]


def test_dead_link_is_noted(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture(0), "b/2.png": picture(1)})
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "b/nothing.png")
    table = scan_folder(tmp_path)
    assert table.loc[2, ["path", "problem", "group"]].tolist() == [
        "b/gone.png",
        "cannot be read (No such file or directory)",
        "unread:b/gone.png",
    ]


def test_link_inside_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture(0), "b/2.png": picture(1)})
    (tmp_path / "a/link.png").symlink_to("../a/1.png")
    table = scan_folder(tmp_path)
    assert table["path"].tolist() == ["a/1.png", "a/link.png", "b/2.png"]
    assert table["group"].nunique() == 2


def test_root_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a/1.png": picture(0), "b/2.png": picture(1)})
    (tmp_path / "real/a/link.png").symlink_to("1.png")
    (tmp_path / "root").symlink_to("real")
    assert len(scan_folder(tmp_path / "root")) == 3


def test_links_out_of_root_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/1.png": picture(0), "b/2.png": picture(1)})
    write(tmp_path, {"root2/x.png": picture(2)})  # a name that merely begins like root's
    (root / "a/out.png").symlink_to("../../root2/x.png")
    assert f"a/out.png is a link to {tmp_path}/root2/x.png, outside the folder" in refused(root)
    (root / "a/out.png").unlink()
    (root / "b/more").symlink_to(tmp_path / "root2")
    assert f"b/more is a link to the folder {tmp_path}/root2" in refused(root)


def test_pipes_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture(0), "b/2.png": picture(1)})
    os.mkfifo(tmp_path / "a/pipe.png")
    assert len(scan_folder(tmp_path)) == 2


def test_bad_roots(tmp_path: Path) -> None:
    sentence = "no picture folder is given: set data.root=DIR or the environment variable FACEMASK_DATA"
    assert refused(None) == refused("") == sentence
    absent = tmp_path / "absent"
    assert refused(absent) == (
        f"data.root={absent} does not exist; give the folder that holds one sub-folder per class"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert refused(file) == f"data.root={file} is no folder; give the folder that holds one sub-folder per class"
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    write(empty, {"in_root.png": picture(0)})
    assert refused(empty) == (
        f"data.root={empty} holds no pictures (jpg, jpeg, png, webp, gif) in sub-folders; "
        "it must hold one sub-folder of pictures per class"
    )
    one = write(tmp_path / "one", {"a/1.png": picture(0)})
    assert refused(one) == f"data.root={one} holds one picture only (a/1.png); add pictures of every class"
    write(one, {"a/2.png": picture(1)})
    (one / "b").mkdir()
    assert refused(one) == (f"data.root={one} holds one class only (a); at least two sub-folders must hold pictures")


def test_folder_that_is_split_already(tmp_path: Path) -> None:
    write(tmp_path, {"Train/a/1.png": picture(0), "Test/a/2.png": picture(1)})
    assert f"data.root={tmp_path} is split already (Test, Train); merge" in refused(tmp_path)
    write(tmp_path, {"other/3.png": picture(2)})
    assert scan_folder(tmp_path)["label"].tolist() == ["Test", "Train", "other"]


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture(0), "b/2.png": picture(1)})
    (tmp_path / os.fsdecode(b"a/\xff.png")).write_bytes(picture(2))
    assert re.search(r"the file name 'a/\\udcff.png' is not valid UTF-8; rename the file", refused(tmp_path))


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a/1.png": picture(0), "b/2.png": picture(1)})
    scandir = os.scandir

    def locked(folder: str) -> object:
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    sentence = f"data.root={tmp_path}: {tmp_path}/b cannot be listed (Permission denied); mend its permissions"
    assert refused(tmp_path) == sentence


def test_label_conflicts(tmp_path: Path) -> None:
    same, other = picture(0), picture(1)
    files = {
        "a/1.png": same,
        "a/2.png": same,
        "b/3.png": same,
        "b/4.png": other,
        "c/5.png": b"",
        "b/6.png": b"",
    }
    table = scan_folder(write(tmp_path, files))
    expected = [("a/1.png", "b/3.png"), ("a/2.png", "b/3.png")]
    assert label_conflicts(table) == expected
    assert label_conflicts(table.iloc[::-1]) == expected
    assert label_conflicts(table[table["label"] == "a"]) == []


def test_real_folder() -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    table = scan_folder(root)
    assert table["label"].value_counts().to_dict() == {"with_mask": 2164, "without_mask": 1930}
    known = pd.read_csv(root / "manifest.csv").set_index("path").loc[table["path"]]
    for column in ("label", "sha256", "width", "height", "bytes", "format"):
        assert table[column].tolist() == known[column].tolist(), column
    assert (table["problem"] == "").all()
    assert label_conflicts(table) == []
