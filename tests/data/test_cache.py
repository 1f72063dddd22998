import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemask.data import cache as cache_module
from facemask.data.cache import PixelCache, cache_key, open_cache
from facemask.data.images import decode, resize_short
from facemask.errors import UserError

SIZES = {"a/0.png": (20, 30), "a/1.png": (30, 20), "b/2.png": (16, 16), "b/3.png": (50, 17)}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: str) -> bytes:
    return png(*SIZES[path])


def table(make: Callable[[str], bytes] = read, paths: Sequence[str] = tuple(SIZES)) -> pd.DataFrame:
    return pd.DataFrame({"path": paths, "sha256": [hashlib.sha256(make(path)).hexdigest() for path in paths]})


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every picture that the cache decodes."""
    calls: list[int] = []

    def counted(data: bytes, max_pixels: int) -> np.ndarray:
        calls.append(len(data))
        return decode(data, max_pixels)

    monkeypatch.setattr(cache_module, "decode", counted)
    return calls


def check(opened: PixelCache) -> None:
    assert len(opened) == 4
    shapes = [(18, 12), (12, 18), (12, 12), (12, 35)]  # short side 12; 35 = floor(12 * 50 / 17)
    for index, (path, (height, width)) in enumerate(zip(SIZES, shapes, strict=True)):
        assert opened[index].shape == (height, width, 3)
        np.testing.assert_array_equal(opened[index], resize_short(decode(read(path)), 12))


def test_a_second_opening_decodes_nothing(tmp_path: Path, decodings: list[int]) -> None:
    check(open_cache(table(), read, 12, 10**6, tmp_path))
    assert len(decodings) == 4
    check(open_cache(table(), read, 12, 10**6, tmp_path))
    assert len(decodings) == 4
    assert [path.suffix for path in (tmp_path / "pixels").iterdir() if path.is_dir()] == [""]  # no scratch folder


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pixels.bin", _truncate),
        ("pixels.bin", _empty),
        ("pixels.bin", Path.unlink),
        ("index.npz", _truncate),
        ("index.npz", _empty),
        ("index.npz", Path.unlink),
    ],
)
def test_a_damaged_cache_is_built_again(
    tmp_path: Path,
    decodings: list[int],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    opened = open_cache(table(), read, 12, 10**6, tmp_path)
    damage(opened.file.parent / name)
    check(open_cache(table(), read, 12, 10**6, tmp_path))
    assert len(decodings) == 8
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(("name", "step"), [("pixels.bin", 97), ("index.npz", 23)])
def test_a_flipped_bit_never_reaches_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK", 500)  # several checksums
    file = open_cache(table(), read, 12, 10**6, tmp_path).file.parent / name
    sound = file.read_bytes()
    refused = 0
    for at in range(0, len(sound), step):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            check(PixelCache(file.parent))  # dates and the like in index.npz say nothing about the pixels
        except Exception:
            refused += 1
            check(open_cache(table(), read, 12, 10**6, tmp_path))
    count = len(range(0, len(sound), step))
    assert refused == count if name == "pixels.bin" else refused > 0.3 * count


def test_the_key_follows_everything_that_changes_pixels_but_not_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    base = table()
    keys = {
        cache_key(base, 12, 100),
        cache_key(base, 13, 100),
        cache_key(base, 12, 101),
        cache_key(base.iloc[::-1], 12, 100),
        cache_key(base.iloc[:3], 12, 100),
        cache_key(base.assign(sha256="other"), 12, 100),
        cache_key(base.assign(path=base["path"] + "x"), 12, 100),
    }
    monkeypatch.setattr(cache_module.PIL, "__version__", "0")
    keys.add(cache_key(base, 12, 100))
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "_CODE", "other code")
    keys.add(cache_key(base, 12, 100))
    assert len(keys) == 9
    assert cache_key(base.assign(label="a", split="val"), 12, 100) == cache_key(base, 12, 100)


def test_another_content_is_decoded_anew(tmp_path: Path, decodings: list[int]) -> None:
    open_cache(table(), read, 12, 10**6, tmp_path)

    def changed(path: str) -> bytes:
        return png(*SIZES[path], seed=int(path == "a/0.png"))

    opened = open_cache(table(changed), changed, 12, 10**6, tmp_path)
    assert len(decodings) == 8
    np.testing.assert_array_equal(opened[0], resize_short(decode(png(20, 30, seed=1)), 12))


def test_undecodable_pictures_are_named_and_have_no_pixels(tmp_path: Path, decodings: list[int]) -> None:
    def some_bad(path: str) -> bytes:
        return {"a/1.png": b"no picture", "b/2.png": read("b/2.png")[:-200]}.get(path, read(path))

    for _ in range(2):  # the second time from the cache
        opened = open_cache(table(some_bad), some_bad, 12, 10**6, tmp_path)
        assert opened.problems.keys() == {"a/1.png", "b/2.png"}
        assert opened.problems["a/1.png"] == "not a JPEG, PNG, WEBP or GIF picture"
        assert opened[1].shape == (0, 0, 3)
        np.testing.assert_array_equal(opened[3], resize_short(decode(read("b/3.png")), 12))
    assert len(decodings) == 4


def test_max_pixels_refuses_by_the_header(tmp_path: Path) -> None:
    opened = open_cache(table(), read, 12, 599, tmp_path)  # 20x30 = 600
    assert opened.problems == {
        "a/0.png": "20x30 is 600 pixels, more than data.max_pixels=599 allows",
        "a/1.png": "30x20 is 600 pixels, more than data.max_pixels=599 allows",
        "b/3.png": "50x17 is 850 pixels, more than data.max_pixels=599 allows",
    }
    assert open_cache(table(), read, 12, 850, tmp_path).problems == {}


def test_order_is_the_tables_beyond_one_batch_of_threads(tmp_path: Path) -> None:
    def small(path: str) -> bytes:
        return png(4 + int(path[:-4]) % 7, 4)

    opened = open_cache(table(small, [f"{i}.png" for i in range(300)]), small, 4, 10**6, tmp_path)
    assert [opened[i].shape[1] for i in range(300)] == [4 + i % 7 for i in range(300)]


def test_a_table_of_no_pictures_and_one_of_bad_ones(tmp_path: Path) -> None:
    assert len(open_cache(table(paths=[]), read, 12, 10**6, tmp_path)) == 0
    for _ in range(2):
        opened = open_cache(table(lambda _: b"bad"), lambda _: b"bad", 12, 10**6, tmp_path)
        assert len(opened.problems) == 4
        assert opened[2].shape == (0, 0, 3)


def test_a_file_that_changed_or_vanished_since_the_scan_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    def gone(path: str) -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    for other, sentence in [
        (gone, r"^a/0\.png was there when the folder was scanned and cannot be read now \(No such file"),
        (lambda path: read(path) + b"x", r"^a/0\.png has changed since the folder was scanned: start again"),
    ]:
        with pytest.raises(UserError, match=sentence):
            open_cache(table(), other, 12, 10**6, tmp_path)
        assert [path.name for path in (tmp_path / "pixels").iterdir() if path.is_dir()] == []
    check(open_cache(table(), read, 12, 10**6, tmp_path))


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cache_dir=.*file cannot be written \(Not a directory\): choose another with "
    ):
        open_cache(table(), read, 12, 10**6, tmp_path / "file")


def test_a_sound_cache_is_opened_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache(table(), read, 12, 10**6, tmp_path)
    monkeypatch.setattr("filelock.FileLock", None)  # on a medium that is read-only there is no lock to take
    check(open_cache(table(), read, 12, 10**6, tmp_path))


def test_a_pickled_cache_carries_no_pixels(tmp_path: Path) -> None:
    opened = open_cache(table(), read, 12, 10**6, tmp_path)
    _ = opened[0]
    blob = pickle.dumps(opened)
    assert len(blob) < 2000
    check(pickle.loads(blob))


def _open_and_sum(folder: str) -> tuple[int, int]:
    def logged(path: str) -> bytes:
        with Path(folder, "reads").open("a") as file:
            file.write(f"{path}\n")
        time.sleep(0.05)
        return read(path)

    opened = open_cache(table(), logged, 12, 10**6, Path(folder))
    return len(opened), sum(int(opened[i].sum()) for i in range(4))


def test_two_processes_building_at_once_build_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(_open_and_sum, [str(tmp_path)] * 4))
    assert len(set(results)) == 1
    assert sorted((tmp_path / "reads").read_text().split()) == sorted(SIZES)
    assert len([path for path in (tmp_path / "pixels").iterdir() if path.is_dir()]) == 1
    check(open_cache(table(), read, 12, 10**6, tmp_path))


SLOW_BUILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from test_cache import open_cache, read, table

def slow(path):
    if path == "b/3.png":
        Path(sys.argv[2], "reading").touch()
        time.sleep(60)
    return read(path)

open_cache(table(), slow, 12, 10**6, Path(sys.argv[2]))
"""


def test_a_killed_build_leaves_nothing_half_usable(tmp_path: Path) -> None:
    builder = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(Path(__file__).parent), str(tmp_path)])
    while not (tmp_path / "reading").exists():
        assert builder.poll() is None
        time.sleep(0.02)
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    left = [path for path in (tmp_path / "pixels").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".part"]
    check(open_cache(table(), read, 12, 10**6, tmp_path))
    assert [path.suffix for path in (tmp_path / "pixels").iterdir() if path.is_dir()] == [""]
