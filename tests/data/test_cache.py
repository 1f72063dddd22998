import io
import json
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemask.data import cache as cache_module
from facemask.data.cache import PixelCache, cache_key, open_cache
from facemask.data.images import decode, resize_short

SIZES = {"a/0.png": (20, 30), "a/1.png": (30, 20), "b/2.png": (16, 16), "b/3.png": (50, 17)}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(paths: list[str] | None = None) -> pd.DataFrame:
    paths = list(SIZES) if paths is None else paths
    return pd.DataFrame({"path": paths, "sha256": [f"{path}-hash" for path in paths]})


def read(path: str) -> bytes:
    return png(*SIZES[path])


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
        ("pixels.bin", Path.unlink),
        ("shapes.npy", _truncate),
        ("shapes.npy", _empty),
        ("meta.json", _empty),
        ("meta.json", lambda file: file.write_text("[]")),
        ("meta.json", lambda file: file.write_text("{}")),
    ],
)
def test_a_damaged_cache_is_built_again(
    tmp_path: Path, decodings: list[int], name: str, damage: Callable[[Path], None]
) -> None:
    opened = open_cache(table(), read, 12, 10**6, tmp_path)
    damage(opened.file.parent / name)
    check(open_cache(table(), read, 12, 10**6, tmp_path))
    assert len(decodings) == 8


def test_the_key_follows_size_limit_paths_and_contents_but_not_labels() -> None:
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
    assert len(keys) == 7
    assert cache_key(base.assign(label="a", split="val"), 12, 100) == cache_key(base, 12, 100)


def test_another_content_is_decoded_anew(tmp_path: Path, decodings: list[int]) -> None:
    open_cache(table(), read, 12, 10**6, tmp_path)
    changed = table().assign(sha256=["new", *table()["sha256"][1:]])
    opened = open_cache(changed, lambda path: png(*SIZES[path], seed=int(path == "a/0.png")), 12, 10**6, tmp_path)
    assert len(decodings) == 8
    np.testing.assert_array_equal(opened[0], resize_short(decode(png(20, 30, seed=1)), 12))


def test_undecodable_pictures_are_named_and_have_no_pixels(tmp_path: Path, decodings: list[int]) -> None:
    def some_bad(path: str) -> bytes:
        return {"a/1.png": b"no picture", "b/2.png": read("b/2.png")[:-200]}.get(path, read(path))

    for _ in range(2):  # the second time from the cache
        opened = open_cache(table(), some_bad, 12, 10**6, tmp_path)
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
    paths = [f"{i}.png" for i in range(300)]
    opened = open_cache(table(paths), lambda path: png(4 + int(path[:-4]) % 7, 4), 4, 10**6, tmp_path)
    assert [opened[i].shape[1] for i in range(300)] == [4 + i % 7 for i in range(300)]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: str) -> bytes:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        open_cache(table(), fail, 12, 10**6, tmp_path)
    assert [path.name for path in (tmp_path / "pixels").iterdir() if path.is_dir()] == []
    check(open_cache(table(), read, 12, 10**6, tmp_path))


def test_a_pickled_cache_carries_no_pixels(tmp_path: Path) -> None:
    opened = open_cache(table(), read, 12, 10**6, tmp_path)
    _ = opened[0]
    blob = pickle.dumps(opened)
    assert len(blob) < 2000
    check(pickle.loads(blob))


def _open_and_sum(folder: str) -> tuple[int, int]:
    opened = open_cache(table(), read, 12, 10**6, Path(folder))
    return len(opened), sum(int(opened[i].sum()) for i in range(4))


def test_two_processes_building_at_once_end_well(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(_open_and_sum, [str(tmp_path)] * 6))
    assert len(set(results)) == 1
    folders = [path for path in (tmp_path / "pixels").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert json.loads((folders[0] / "meta.json").read_text()) == {"problems": {}}
    check(open_cache(table(), read, 12, 10**6, tmp_path))
