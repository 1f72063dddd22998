import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from facemask import bench
from facemask.bench import AUGMENTS, machine_kind, pairs, ratio
from facemask.cli import app


def test_pairs_are_taken_in_turn_after_one_uncounted_call_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]

    def takes(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    times = pairs(lambda: takes("a", 2.0), lambda: takes("b", 6.0), 3)
    assert calls == ["a", "b"] * 4
    assert times == [(2.0, 6.0)] * 3


def test_ratio_by_hand() -> None:
    result = ratio([(1.0, 3.0), (2.0, 4.0), (1.5, 6.0)])
    assert result == {"seconds": 1.5, "other_seconds": 4.0, "ratio": 4 / 1.5, "lowest": 2.0, "highest": 4.0}


def test_a_kind_of_machine_is_a_folder_name() -> None:
    hardware = {"processor": "AMD EPYC 9R14 (family 25 model 17)", "cores": 2, "gpus": []}
    assert machine_kind(hardware) == "amd-epyc-9r14-2-cores"
    assert machine_kind({**hardware, "gpus": ["NVIDIA H100"]}) == "amd-epyc-9r14-2-cores-nvidia-h100"


def test_the_options_of_the_command() -> None:
    result = CliRunner().invoke(app, ["bench", "data", "--pictures", "63"])
    assert result.exit_code == 2
    assert "--pictures" in result.output


@pytest.mark.slow
def test_bench_teacher(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "teacher", "--rounds", "3", "--side", "64", "--batch", "16", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.rglob("teacher.json")
    content = json.loads(file.read_text())
    compared = [(row["teacher"], row["what"]) for row in content["comparisons"]]
    teachers = ("efficientnet_lite0", "resnet_small")
    assert compared == [(name, what) for name in teachers for what in ("saved / no teacher", "asked / saved")]
    assert all(row["ratio"] > 1 for row in content["comparisons"] if row["what"] == "asked / saved")
    assert "efficientnet_lite0" in result.output


@pytest.mark.slow
def test_bench_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "faces"
    for i in range(120):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((260, 200)).save(root / "ab"[i % 2] / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "AUGMENTS", ("vit", "deit"))
    file = bench.bench_data(root, 2, 64, tmp_path / "out")
    assert file.parent.parent == tmp_path / "out" / "bench"
    content = json.loads(file.read_text())
    compared = [(row["augment"], row["against"]) for row in content["comparisons"]]
    assert compared == [(a, b) for a in ("vit", "deit") for b in ("torchvision", "albumentations")]
    for row in content["comparisons"]:
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["ratio"] > 0  # how much is measured by the command itself, on a quiet machine
    assert content["pictures_per_round"] == 64
    assert set(content["versions"]) >= {"torch", "torchvision", "albumentations"}
    assert "RandomResizedCrop" in content["milliseconds_per_picture"]["vit"]
    assert str(tmp_path) not in file.read_text()
    assert AUGMENTS == ("light", "vit", "deit")


def test_bench_determinism(tmp_path: Path) -> None:
    command = ["bench", "determinism", "--rounds", "3", "--side", "32", "--batch", "4", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "a deterministic step takes " in result.output
    content = json.loads(next(tmp_path.rglob("determinism.json")).read_text())
    figures = content["deterministic / not"]
    assert 0 < figures["lowest"] <= figures["ratio"] <= figures["highest"]
    assert not torch.are_deterministic_algorithms_enabled()
