"""The comparison itself, on a tiny model: that all engines are asked, and about the same pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from test_predict import write_run

from facemask.bench_inference import bench_inference


@pytest.mark.slow
def test_all_engines_decide_alike_and_are_timed(tmp_path):
    for package in ("transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    rng = np.random.default_rng(0)
    (tmp_path / "faces").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "faces" / f"{i}.png")
    (tmp_path / "faces" / "broken.png").write_bytes(b"")
    file = bench_inference(write_run(tmp_path / "run"), tmp_path / "faces", 7, 1, 3, tmp_path / "out")
    content = json.loads(file.read_text())
    assert content["pictures"] == 6
    whats = [row["what"] for row in content["comparisons"]]
    assert whats[:3] == ["predict / pipeline, defaults of both", "fp32, batch 1", "fp32, batch 32"]
    for row in content["comparisons"]:
        assert row["other_decisions"] == 0
        assert row["ratio"] == pytest.approx(row["ours_per_s"] / row["other_per_s"])
    engines = {row["engine"]: row for row in content["latency"]}
    assert {"torch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"} <= engines.keys()
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in engines.values())
