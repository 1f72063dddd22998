import json
from pathlib import Path

import pytest

from facemask.runs.bench_page import bench_page, limits

ROWS = [
    {"augment": "deit", "against": "torchvision", "ours_per_s": 100.0, "ratio": 4.0},
    {"augment": "deit", "against": "albumentations", "ours_per_s": 101.0, "ratio": 3.0},
]


def test_limits_by_hand() -> None:
    found = limits({"comparisons": ROWS})
    *_, base = (row.split(" | ") for row in found["table"].splitlines())
    # 0.35 * 989e12 / (6 * 17.6e9) = 3,278 images/s, but 16 cores load 1,600: 1,281,167 * 300 / 1,600 s = 66.7 h
    assert base[:3] == ["| deit_base", "3,278", "1,600"]
    assert base[3] == f"{1000 * 256 / 3278:.1f}"
    assert base[4] == f"{1000 * 8 * 86.6e6 / 450e9:.1f}"
    assert float(base[-2]) == pytest.approx(66.73 / 8, abs=0.06)
    assert found["waiting"] == ["deit_tiny", "deit_small", "deit_base"]
    assert limits({"comparisons": [{**ROWS[0], "ours_per_s": 1000.0}]})["waiting"] == ["deit_tiny"]


def test_a_page_shows_every_row(tmp_path: Path) -> None:
    common = {"hardware": {"processor": "X", "cores": 2}, "load_average": 1.0, "git": "0123456789", "versions": {}}
    train = {"cases": [{"side": 224, "comparisons": [{"against": "bare", "ratio": 0.9712}]}], "precision": "bf16"}
    (tmp_path / "data.json").write_text(json.dumps({"command": "facemask bench data", "comparisons": ROWS, **common}))
    (tmp_path / "train.json").write_text(json.dumps({"command": "facemask bench train", **train, **common}))
    (tmp_path / "peak.json").write_text(json.dumps({"command": "c", "peak_gib": {"ours": 1.5, "timm": 12.0}, **common}))
    lines = bench_page(tmp_path).splitlines()
    for line in (
        "| deit | albumentations | 101.0 | 3.000 |",
        "side 224",
        "| bare | 0.971 |",
        "precision bf16",
        "| peak_gib | 1.500 | 12.0 |",
        "X, 2 cores; load average 1.0 at the end; commit 0123456.",
    ):
        assert line in lines
