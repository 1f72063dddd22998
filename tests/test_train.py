"""Whole runs, as a user starts them: python train.py ... in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from facemask.runs import metrics as run_metrics
from facemask.runs.checkpoints import weights_sha256
from facemask.runs.folder import file_sha256
from facemask.runs.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[1]
# A network of two blocks on small pictures: every part of a run, in seconds.
SMALL = [
    "data.num_images=120",
    "data.batch_size=16",
    "model.img_size=32",
    "model.depth=2",
    "augment=light",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "evaluate.resamples=200",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def command(cache: Path, *overrides: str) -> list[str]:
    own = [f"cache_dir={cache}", f"ledger={cache}/ledger.jsonl"]
    flags = [option for option in overrides if option.startswith("-")]
    options = [option for option in overrides if not option.startswith("-")]
    return [sys.executable, str(ROOT / "train.py"), *flags, *SMALL, *own, *options]


def run(cache: Path, *overrides: str, cwd: Path = ROOT, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command(cache, *overrides), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, "cpu", weights_only=True)["state_dict"]


def same_bits(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def distilled(cache, tmp_path_factory):
    """One distilled run with the default logger, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    output = run(cache, "model=deit_distilled", f"run_dir={folder}", "logger=[wandb,csv]")
    return folder, output


def test_everything_about_the_run_is_in_its_folder(distilled):
    folder, output = distilled
    for name in ("config.yaml", "provenance.json", "split.csv", "curves.csv", "predictions.parquet", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["name"] == "deit_tiny_distilled_patch16_224"
    assert config["distill"]["_target_"].endswith("HardDistillation")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert "model=deit_distilled" in provenance["command"]
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0] or provenance["versions"]["torch"]
    assert provenance["seeds"] == {"run": 0, "augment": 0, "split": 0}
    assert provenance["hardware"]["torch_threads"] == 1
    assert str(folder) in output
    assert not list(folder.rglob("*.tmp"))


def test_every_number_follows_from_the_predictions(distilled):
    folder, output = distilled
    frame, classes = read_predictions(folder / "predictions.parquet")
    assert classes == ["with_mask", "without_mask"]
    assert frame["split"].value_counts().to_dict() == {"test": 24, "val": 12}
    stored = json.loads((folder / "metrics.json").read_text())
    assert json.loads(json.dumps(run_metrics.evaluate(frame, classes, resamples=200))) == stored
    assert set(stored["test"]) == {"head", "head_dist", "mean", "teacher", "majority", "no_pixels"}
    assert stored["test"]["majority"]["accuracy"]["value"] == 0.5
    shown = f"{100 * stored['val']['mean']['accuracy']['value']:.1f}"
    assert re.search(rf"student mean of heads \* +{re.escape(shown)} \[", output)


def test_training_figures_count_what_was_done(distilled):
    folder, _ = distilled
    training = json.loads((folder / "summary.json").read_text())["training"]
    # 84 training pictures in batches of 16 without the rest: 5 steps, 80 pictures an epoch, 2 epochs
    assert training["epoch"] == pytest.approx(160 / 84)
    assert training["total_flos"] == 6 * 3 * 32**2 * training["parameters"] * 160
    assert training["train_samples_per_second"] * training["train_runtime"] == pytest.approx(160)
    assert training["train_steps_per_second"] * training["train_runtime"] == pytest.approx(10)
    curves = pd.read_csv(folder / "curves.csv")
    assert training["train_loss"] == pytest.approx(curves["train/loss_step"].mean(), rel=1e-6)
    assert curves["step"].tolist() == sorted(curves["step"])
    assert curves["train/loss_step"].count() == 10


def test_the_distillation_is_described_on_the_views_used(distilled):
    folder, _ = distilled
    facts = json.loads((folder / "summary.json").read_text())["distillation"]
    curves = pd.read_csv(folder / "curves.csv")
    assert facts["teacher_label_disagreement"] == pytest.approx(curves["train/teacher_label_disagreement"].mean())
    assert 0 <= facts["student_teacher_agreement"] <= 1
    assert facts["teacher_entropy"] > 0
    assert facts["degenerate"] is False


def test_checkpoints_are_hashed_and_load_alone(distilled):
    from facemask.modeling.classifier import Classifier

    folder, _ = distilled
    hashes = json.loads((folder / "checkpoints.json").read_text())
    assert list(hashes) == ["best.ckpt", "last.ckpt"]
    for name, facts in hashes.items():
        assert facts == {
            "sha256": file_sha256(folder / "checkpoints" / name),
            "weights_sha256": weights_sha256(weights(folder, name)),
        }
    assert json.loads((folder / "summary.json").read_text())["weights_sha256"] == hashes["best.ckpt"]["weights_sha256"]
    classifier = Classifier.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)
    assert classifier.heads == ["head", "head_dist"]
    assert not any("teacher" in key for key in classifier.state_dict())


def test_wandb_ran_offline_once(distilled):
    folder, _output = distilled
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert (folder / "csv" / "metrics.csv").exists()


def test_the_report_is_one_page(distilled):
    folder, _ = distilled
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert "data:image" in page  # worst errors of drawn faces


def test_an_existing_run_is_never_overwritten_and_can_be_shown_again(cache, distilled):
    folder, _first = distilled
    before = (folder / "predictions.parquet").read_bytes()
    output = run(cache, "model=deit_distilled", f"run_dir={folder}", "logger=[wandb,csv]", code=2)
    assert "is never overwritten" in output
    again = run(cache, "model=deit_distilled", f"run_dir={folder}", "logger=[wandb,csv]", "resume=true")
    assert "student mean of heads" in again  # finished: nothing is trained, the table is shown
    other = run(cache, "model=deit_distilled", f"run_dir={folder}", "resume=true", "optim.lr=1", code=2)
    assert "holds a run of another config" in other
    assert "optim.lr" in other
    assert (folder / "predictions.parquet").read_bytes() == before


def test_vit_and_deit_under_one_recipe_are_the_same_bits(cache, tmp_path):
    options = ["model=vit,deit", "recipe=deit", "seed=0", "+sweep_name=same", "logger=none", "evaluate.splits=[val]"]
    run(cache, "-m", *options, f"hydra.sweep.dir={tmp_path}/same")
    folders = sorted(path.parent for path in tmp_path.glob("same/*/config.yaml"))
    assert len(folders) == 2
    assert "model=deit" in folders[0].name
    assert "model=vit" in folders[1].name
    assert same_bits(*folders)
    frames = [read_predictions(folder / "predictions.parquet")[0] for folder in folders]
    pd.testing.assert_frame_equal(*frames)


def test_a_split_that_is_not_listed_is_not_opened(cache, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    run(cache, f"run_dir={tmp_path}/run", f"ledger={ledger}", "evaluate.splits=[val]", "logger=none")
    frame, _ = read_predictions(tmp_path / "run" / "predictions.parquet")
    assert set(frame["split"]) == {"val"}
    assert not ledger.exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_opened"] == 0
    assert "Test opened" not in (tmp_path / "run" / "report.html").read_text()


def test_two_processes_write_one_run(cache, tmp_path):
    options = ["trainer.precision=32-true", "model.drop_path_rate=0", "logger=csv", "optim.label_smoothing=0"]
    run(cache, *options, f"run_dir={tmp_path}/one")
    run(cache, *options, f"run_dir={tmp_path}/two", "trainer=ddp_cpu")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # the same pictures in every global batch: only the order of summation differs
    for key, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4)
    frame, _ = read_predictions(tmp_path / "two" / "predictions.parquet")
    assert len(frame) == frame["id"].nunique() == 36


def test_multirun_gives_each_job_a_folder_and_a_wandb_run(cache, tmp_path):
    shutil.rmtree(tmp_path / "sweep", ignore_errors=True)
    run(
        cache, "-m", "distill=none,soft", "trainer.max_epochs=1", "evaluate.splits=[val]",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    folders = sorted(path.parent for path in tmp_path.glob("sweep/*/summary.json"))
    assert len(folders) == 2
    ids = {json.loads((folder / "status.json").read_text())["id"] for folder in folders}
    runs = [path.stem.removeprefix("run-") for folder in folders for path in folder.glob("wandb/offline-*/*.wandb")]
    assert len(ids) == 2
    assert set(runs) == ids
    heads = [set(json.loads((folder / "metrics.json").read_text())["val"]) for folder in folders]
    assert [("teacher" in names) for names in heads] == [False, True]
    assert all("mean" in names for names in heads)  # distill=none trains both heads of a token model


@pytest.mark.slow
def test_a_multirun_with_two_processes_gives_each_job_its_own_config(cache, tmp_path):
    options = ["seed=0,1", "trainer=ddp_cpu", "trainer.max_epochs=1", "evaluate.splits=[val]", "logger=none"]
    run(cache, "-m", *options, f"hydra.sweep.dir={tmp_path}/sweep")
    folders = sorted(path.parent for path in tmp_path.glob("sweep/*/summary.json"))
    assert [folder.name for folder in folders] == ["seed=0", "seed=1"]
    assert not same_bits(*folders)
    run(cache, "seed=1", "trainer=ddp_cpu", *options[2:], f"run_dir={tmp_path}/alone")
    assert same_bits(folders[1], tmp_path / "alone")


def test_the_test_split_is_counted_whatever_is_trained_on(cache, tmp_path):
    own = ["logger=none", "trainer.max_epochs=1", f"ledger={tmp_path}/ledger.jsonl"]
    assert "test opened once" in run(cache, *own, f"run_dir={tmp_path}/a")
    assert "test opened 2 times" in run(cache, *own, f"run_dir={tmp_path}/b", "data.fraction=0.5")


def test_train_loss_is_the_loss_under_accumulation(cache, tmp_path):
    own = ["logger=none", "distill=none", "trainer.max_epochs=1", "evaluate.splits=[val]", "optim.lr=1e-9"]
    losses = []
    for name, batch, accumulate in (("plain", 16, 1), ("accumulated", 8, 2)):
        options = [f"data.batch_size={batch}", f"trainer.accumulate_grad_batches={accumulate}"]
        run(cache, *own, *options, "model.drop_path_rate=0", f"run_dir={tmp_path}/{name}")
        training = json.loads((tmp_path / name / "summary.json").read_text())["training"]
        losses.append(training["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # 80 of 84 pictures in both, nothing is learnt
