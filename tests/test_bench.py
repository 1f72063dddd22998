import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from facemask import bench, bench_data, bench_recipes, bench_sweep, bench_train
from facemask.bench import machine_kind, pairs, rates, ratio
from facemask.bench_data import AUGMENTS
from facemask.bench_train import Loop, Loops, parts_of_a_step
from facemask.cli import app
from facemask.devices import native_bf16
from facemask.errors import UserError


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
    assert rates([(2.0, 4.0)], 8).items() >= {"ours_per_s": 4.0, "other_per_s": 2.0, "ratio": 2.0}.items()


def test_a_kind_of_machine_is_a_folder_name() -> None:
    hardware = {"processor": "AMD EPYC 9R14 (family 25 model 17)", "cores": 2, "gpus": []}
    assert machine_kind(hardware) == "amd-epyc-9r14-2-cores"
    assert machine_kind({**hardware, "gpus": ["NVIDIA H100"]}) == "amd-epyc-9r14-2-cores-nvidia-h100"


def test_the_options_of_the_command() -> None:
    result = CliRunner().invoke(app, ["bench", "data", "--pictures", "63"])
    assert result.exit_code == 2
    assert "--pictures" in result.output


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "noise"
    for i in range(240):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((260, 200)).save(root / "ab"[i % 2] / f"{i}.jpg")
    return root


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
    expected = [(name, what) for name in teachers for what in ("saved / no teacher", "asked / saved")]
    assert compared == [*expected[:2], ("efficientnet_lite0", "features / no teacher"), *expected[2:]]
    assert all(row["ratio"] > 1 for row in content["comparisons"] if row["what"] == "asked / saved")
    assert "efficientnet_lite0" in result.output


@pytest.mark.slow
def test_bench_data(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_data, "AUGMENTS", ("vit", "deit"))
    file = bench_data.bench_data(noise, 2, 64, tmp_path / "out")
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
    assert str(noise) not in file.read_text()
    assert AUGMENTS == ("light", "vit", "deit")


def test_bench_determinism(tmp_path: Path) -> None:
    command = ["bench", "determinism", "--rounds", "3", "--side", "32", "--batch", "4", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "a deterministic step takes " in result.output
    content = json.loads(next(tmp_path.rglob("determinism.json")).read_text())
    figures = content["deterministic / not"]
    assert 0 < figures["lowest"] <= figures["ratio"] <= figures["highest"]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not native_bf16("cpu"), reason="the processor has no bf16 of its own")
def test_bench_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facemask.bench_step.shutil.which", lambda _: None)  # compiling takes a minute
    command = ["bench", "limit", "--rounds", "2", "--side", "32", "--batch", "4", "--out", str(tmp_path)]
    CliRunner().invoke(app, command, catch_exceptions=False)
    content = json.loads(next(tmp_path.rglob("limit.json")).read_text())
    assert [row["step"] for row in content["comparisons"]] == ["bf16 weights"]
    assert 0 < content["products_share_of_step"] < 1
    assert content["most_that_the_rest_could_give"] == 1 / content["products_share_of_step"]


# -- training loops ---------------------------------------------------------------------------------------------

LOOP = """
import json, os, sys, time

def tick(**facts):
    os.write(int(os.environ["FACEMASK_TICKS"]), json.dumps({"time": time.perf_counter(), **facts}).encode() + b"\\n")

for step in range(int(sys.argv[1])):
    if step % 3 == 0:  # an epoch begins after a long pause
        time.sleep(0.3)
        tick(start=True)
    time.sleep(0.01)
    tick(step=step)
print("enough")
"""


def looping(tmp_path: Path, steps: int) -> Loop:
    return Loop([sys.executable, "-c", LOOP, str(steps)], 4, tmp_path / "log")


def state(loop: Loop) -> str:
    return Path(f"/proc/{loop.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loop_is_measured_in_whole_steps_and_stands_still_in_between(tmp_path: Path) -> None:
    loop = looping(tmp_path, 10**6)
    try:
        assert loop.first_step_after > 0.3
        assert state(loop) == "T"
        time.sleep(0.5)
        assert 0.01 <= loop.seconds(4) < 0.3  # neither the time it stood still nor the start of an epoch counts
        steps = [told["step"] for told in loop.told if "step" in told]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert state(loop) == "T"
        assert 0.001 < loop.peak_memory() < 1
    finally:
        loop.end()
    assert loop.process.returncode == -9


def test_a_loop_that_ends_by_itself_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a training loop ended by itself: enough"):
        looping(tmp_path, 2)


def test_the_parts_of_a_step_by_hand() -> None:
    actions = {
        "step": 100.0,
        "[_TrainingEpochLoop].train_dataloader_next": 1.0,
        "[Strategy]SingleDeviceStrategy.batch_to_device": 4.0,
        "[LightningModule]Classifier.on_before_batch_transfer": 3.5,  # Lightning's, around ours
        "on_before_batch_transfer": 3.0,
        "[LightningModule]Classifier.optimizer_step": 80.0,
        "[Strategy]SingleDeviceStrategy.training_step": 30.0,
        "_ask_teacher": 5.0,
        "log_dict": 1.0,
        "_add": 1.0,
        "[Strategy]SingleDeviceStrategy.backward": 40.0,
        "[Callback]Counter.on_train_batch_end": 0.5,
        "[Callback]Counter.on_train_epoch_end": 7.0,
    }
    assert parts_of_a_step(actions) == {
        "data wait": 1.0,
        "teacher": 8.0,
        "logging": 2.5,
        "backward": 40.0,
        "forward": 23.0,
        "optimizer": 10.0,
        "Lightning": 15.5,
    }


def test_what_bench_train_refuses() -> None:
    case = CliRunner().invoke(app, ["bench", "train", "--at", "huge/224"])
    assert isinstance(case.exception, UserError)
    assert "--at huge/224" in str(case.exception)
    precision = CliRunner().invoke(app, ["bench", "train", "--precision", "int8"])
    assert precision.exit_code == 2
    assert "'int8' is not one of" in precision.output


def test_bench_sweep_asks_two_cold_runs_and_one_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=0)

    ticks = iter([0.0, 100.0, 100.0, 400.0, 400.0, 520.0])  # 100 s, 300 s for 10 trials, 120 s
    monkeypatch.setattr(bench_sweep, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(bench_sweep, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    file = bench_sweep.bench_sweep(None, 10, 8, 64, 2, tmp_path)
    found = json.loads(file.read_text())["sweep / naive loop"]
    assert found["ratio"] == pytest.approx(110 / 30)
    assert (found["lowest"], found["highest"]) == pytest.approx((100 / 30, 120 / 30))
    assert found["trials_per_hour"] == pytest.approx(120)
    scripts = [Path(command[1]).name for command in asked]
    assert scripts == ["train.py", "sweep.py", "train.py"]
    caches = {option for command in asked for option in command if option.startswith("cache_dir=")}
    assert len(caches) == 3  # nothing is shared
    assert "sweep.trials=10" in asked[1]


@pytest.mark.slow
def test_bench_train(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [([], {"bare": ("bare", {})}), ([], {"timm": ("timm", {})})]
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_train, "_groups", lambda size: groups)
    file = bench_train.bench_train(noise, ["tiny/32"], 8, "fp32", 2, 2, tmp_path)
    (case,) = json.loads(file.read_text())["cases"]
    assert [row["against"] for row in case["comparisons"]] == ["bare", "timm"]
    for row in case["comparisons"]:
        assert row["batch"] == 8
        assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["ratio"] == pytest.approx(row["ours_per_s"] / row["other_per_s"])


@pytest.mark.slow
def test_bench_growth(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_train, "GROWTH", [("tiny", 32, 1), ("tiny", 32, 2)])
    rows = json.loads(bench_train.bench_growth(noise, 8, 2, tmp_path).read_text())["rows"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[0]["images_per_s"] > 0
    assert rows[1]["peak_gib"] > 1.5 * rows[0]["peak_gib"]  # both processes are counted


def test_a_target_is_reached_by_the_mean_of_three_accuracies() -> None:
    curve = [(10.0, 0.5), (20.0, 0.9), (30.0, 0.7), (40.0, 0.8), (50.0, 0.6)]
    assert bench_recipes.reached(curve, 0.7) == 30.0
    assert bench_recipes.reached(curve, 0.71) == 40.0
    assert bench_recipes.reached(curve, 0.81) is None
    assert bench_recipes.reached(curve[:2], 0.1) is None


@pytest.mark.slow
def test_bench_recipes(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_recipes, "BATCH", 8)
    monkeypatch.setattr(bench_recipes, "SAVED_STEPS", 60)
    monkeypatch.setattr(bench_recipes, "ARMS", {
        "plain": ["recipe=deit"],
        "fast": ["recipe=fast", "trainer.max_epochs=4", "augment.small_epochs=2",
                 "augment.small_size=32"],
    })  # fmt: skip
    content = json.loads(bench_recipes.bench_recipes(noise, 3, 48, [5], tmp_path).read_text())
    plain, fast = content["recipes"]
    assert [row["accuracy"] == row["accuracy.5"] for row in (plain, fast)] == [True, True]
    assert plain["seconds"] > 0
    assert plain["share_of_plain"] in (None, 1.0)  # its last three accuracies are all that it has
    assert content["sooner_than_hugging_face"] is None  # not measured
    assert [row["step"] for row in content["steps"]] == ["half of the patches", "linear probe, saved features"]
    assert content["steps"][1]["ratio"] > 1  # a head alone


@pytest.mark.slow
def test_bench_profile(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    content = json.loads(bench_train.bench_profile(noise, "tiny", 32, 8, 4, "none", tmp_path).read_text())
    took = content["milliseconds"]
    assert list(took) == ["data wait", "teacher", "logging", "backward", "forward", "optimizer", "Lightning"]
    assert min(took.values()) >= 0
    assert took["backward"] > took["logging"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_50_epochs(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    with Loops(["data=folder", f"data.root={noise}"], "tiny", 32, 84, "fp32") as loops:
        loop = loops.ours("model.depth=1")
        loop.seconds(10)
        before = loop.peak_memory()
        loop.seconds(110)  # two steps are an epoch
        assert sum("start" in told for told in loop.told) >= 50
        assert loop.peak_memory() < before + 0.02
