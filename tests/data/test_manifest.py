import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemask.data.images import decode
from facemask.data.manifest import (
    COLUMNS,
    MANIFEST_COLUMNS,
    join_groups,
    label_conflicts,
    load_manifest,
    near_conflicts,
    scan,
    scan_folder,
)
from facemask.data.store import collect
from facemask.data.synthetic import synthetic_bytes
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


def face(index: int, quality: int = 90, mirror: bool = False) -> bytes:
    pixels = decode(synthetic_bytes(0, index))
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, ::-1] if mirror else pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Five pictures: 1, its mirrored copy under the other label, 2, 3, and a damaged one."""
    files = {
        "a/1.jpg": face(0),
        "b/copy of 1.jpg": face(0, 60, mirror=True),
        "a/2.jpg": face(2),
        "b/3\n.jpg": face(3),
        "b/ü.JPG": face(4)[:900],
    }
    return write(tmp_path / "faces", files)


def test_manifest(faces: Path, tmp_path: Path) -> None:
    table = scan(faces, cache_dir=tmp_path / "cache").set_index("path")
    assert list(table.reset_index().columns) == MANIFEST_COLUMNS
    assert table.index.tolist() == ["a/1.jpg", "a/2.jpg", "b/3\n.jpg", "b/copy of 1.jpg", "b/ü.JPG"]
    twins = table.loc[["a/1.jpg", "b/copy of 1.jpg"]]
    assert twins["dup_group"].tolist() == [twins["sha256"].min()] * 2
    alone = table.loc[["a/2.jpg", "b/3\n.jpg", "b/ü.JPG"]]
    assert alone["dup_group"].tolist() == alone["sha256"].tolist()
    bad = table.loc["b/ü.JPG"]
    assert (bad["problem"], bad["pixels_sha256"], bad["phash"]) == ("truncated", "", "")
    pixels = decode((faces / "a/2.jpg").read_bytes())
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"{height}x{width}\n".encode() + pixels.tobytes()).hexdigest()
    assert table.loc["a/2.jpg", "pixels_sha256"] == digest
    assert re.fullmatch("[0-9a-f]{16}", table.loc["a/2.jpg", "phash"])
    assert table.loc["a/2.jpg", "mtime_ns"] == (faces / "a/2.jpg").stat().st_mtime_ns
    written = pd.read_csv(faces / "manifest.csv", keep_default_na=False).set_index("path")
    assert written["dup_group"].to_dict() == table["dup_group"].to_dict()
    assert label_conflicts(table.reset_index()) == []
    assert near_conflicts(table.reset_index())["path"].tolist() == ["a/1.jpg", "b/copy of 1.jpg"]


def test_only_changed_pictures_are_read_again(faces: Path, tmp_path: Path) -> None:
    read: list[str] = []

    def look(**options: Any) -> pd.DataFrame:
        read.clear()

        def bytes_of(path: str) -> bytes:
            read.append(path)
            return (faces / path).read_bytes()

        paths = sorted(path.relative_to(faces).as_posix() for path in faces.glob("*/*"))
        stats = [(faces / path).stat() for path in paths]
        facts = {"bytes": [s.st_size for s in stats], "mtime_ns": [s.st_mtime_ns for s in stats]}
        listing = pd.DataFrame({"path": paths, "label": [path[0] for path in paths], **facts})
        return collect(listing, bytes_of, tmp_path / "cache/x.sqlite", **options)

    first = look()
    assert len(read) == 5
    pd.testing.assert_frame_equal(look(), first)
    assert read == []
    pd.testing.assert_frame_equal(look(full=True), first)
    assert len(read) == 5
    (faces / "a/2.jpg").write_bytes(face(0, 70))  # now a third copy of 1
    (faces / "b/3\n.jpg").unlink()
    table = look()
    assert read == ["a/2.jpg"]
    assert len(table) == 4
    assert table["dup_group"].value_counts().max() == 3
    (tmp_path / "cache/x.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 99)
    pd.testing.assert_frame_equal(look(), table)
    assert len(read) == 4


def test_an_interrupted_scan_goes_on(tmp_path: Path) -> None:
    data = {f"a/{number:03}.png": picture(number) for number in range(300)}
    listing = pd.DataFrame({"path": list(data), "label": "a", "bytes": 1, "mtime_ns": 1})
    read: list[str] = []

    def stop_at(path: str, last: str) -> bytes:
        if path == last:
            raise KeyboardInterrupt
        read.append(path)
        return data[path]

    with pytest.raises(KeyboardInterrupt):
        collect(listing, lambda path: stop_at(path, "a/290.png"), tmp_path / "x.sqlite")
    read.clear()
    assert len(collect(listing, lambda path: stop_at(path, ""), tmp_path / "x.sqlite")) == 300
    assert min(read) == "a/256.png"


def test_foreign_and_unwritable_manifests(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = faces / "manifest.csv"
    theirs.write_text("path,label\n")
    with pytest.raises(UserError, match=r"manifest\.csv was not written by this command .* with --out"):
        scan(faces, cache_dir=tmp_path / "cache")
    assert theirs.read_text() == "path,label\n"
    theirs.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"{faces} cannot be written; give a file elsewhere with --out"):
        scan(faces, cache_dir=tmp_path / "cache")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"must end in \.csv or \.parquet"):
        scan(faces, tmp_path / "m.txt", cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .* --cache-dir"):
        scan(faces, cache_dir=tmp_path / "file")


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.parquet"])
def test_further_columns_live_on(faces: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    table = scan(faces, out, cache_dir=tmp_path / "cache").assign(person=["x", "", "x", "y", ""])
    if name.endswith("csv"):
        table.to_csv(out, index=False)
    else:
        table.to_parquet(out)
    scan(faces, out, cache_dir=tmp_path / "cache")
    loaded = load_manifest(faces, out, group_by=["person"], cache_dir=tmp_path / "cache")
    assert loaded["person"].tolist() == ["x", "", "x", "y", ""]
    # 1, 3 by person; 1 and its copy by dup_group; the others alone.
    assert sorted(loaded["group"].value_counts()) == [1, 1, 3]
    with pytest.raises(UserError, match=r"data\.group_by names shoot, a column that .* lacks"):
        load_manifest(faces, out, group_by=["shoot"], cache_dir=tmp_path / "cache")


def test_pictures_that_changed_since_the_scan(faces: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    scan(faces, cache_dir=cache)
    assert len(load_manifest(faces, cache_dir=cache)) == 5
    (faces / "a/2.jpg").touch()  # the same bytes: nothing changed
    assert len(load_manifest(faces, cache_dir=cache)) == 5
    old = (faces / "a/2.jpg").read_bytes()
    (faces / "a/2.jpg").write_bytes(face(5))
    with pytest.raises(UserError, match=r"1 picture\(s\) have changed since .*manifest\.csv was written \(a/2\.jpg\)"):
        load_manifest(faces, cache_dir=cache)
    (faces / "a/2.jpg").unlink()
    with pytest.raises(UserError, match=r"1 picture\(s\) are gone since .*\(a/2\.jpg\)"):
        load_manifest(faces, cache_dir=cache)
    write(faces, {"a/2.jpg": old, "a/new.jpg": face(6)})
    with pytest.raises(UserError, match=r"1 picture\(s\) have come since .*\(a/new\.jpg\)"):
        load_manifest(faces, cache_dir=cache)
    (faces / "manifest.csv").unlink()
    table = load_manifest(faces, cache_dir=cache)
    assert len(table) == 6
    assert table["group"].tolist() == table["dup_group"].tolist()


def test_join_groups() -> None:
    table = pd.DataFrame({"path": list("vwxyz"), "dup": ["2", "2", "3", "1", ""], "person": ["", "p", "p", "", None]})
    assert join_groups(table, ["dup"]).tolist() == ["2", "2", "3", "1", "z"]
    assert join_groups(table, ["dup", "person"]).tolist() == ["2", "2", "2", "1", "z"]


def test_a_quick_scan_does_not_replace_a_thorough_one(faces: Path, tmp_path: Path) -> None:
    def embed(pictures: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.array(Image.fromarray(rgb).resize((8, 8)), dtype=np.float32).ravel() for rgb in pictures])

    pixels = decode((faces / "a/2.jpg").read_bytes())
    turned = Image.fromarray(pixels).rotate(20, Image.Resampling.BICUBIC)
    turned.save(faces / "b/2 turned.png")
    cache = tmp_path / "cache"
    quick = scan(faces, tmp_path / "quick.csv", cache_dir=cache).set_index("path")["dup_group"]
    assert quick["a/2.jpg"] != quick["b/2 turned.png"]
    thorough = scan(faces, cache_dir=cache, embed=embed)
    assert thorough.set_index("path")["dup_group"].loc[["a/2.jpg", "b/2 turned.png"]].nunique() == 1
    assert near_conflicts(thorough)["path"].tolist() == sorted(
        ["a/1.jpg", "b/copy of 1.jpg", "a/2.jpg", "b/2 turned.png"],
        key=lambda path: (thorough.set_index("path")["dup_group"][path], path),
    )
    before = (faces / "manifest.csv").read_bytes()
    with pytest.raises(UserError, match=r"manifest\.csv was written with --thorough; repeat --thorough"):
        scan(faces, cache_dir=cache)
    assert (faces / "manifest.csv").read_bytes() == before
    scan(faces, cache_dir=cache, embed=embed)
    assert (faces / "manifest.csv").read_bytes() == before
    # Training takes the groups of the thorough manifest.
    assert load_manifest(faces, cache_dir=cache)["dup_group"].tolist() == thorough["dup_group"].tolist()
