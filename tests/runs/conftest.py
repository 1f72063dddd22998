"""A finished run without training: 40 pictures on disk, logits from a random generator."""

import hashlib
import platform
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facemask.data.splits import fingerprint
from facemask.files import write_json
from facemask.runs.folder import RunFolder, file_sha256
from facemask.runs.metrics import evaluate
from facemask.runs.predictions import assemble, write_predictions
from facemask.runs.record import record

CLASSES = ["with_mask", "without_mask"]
SPLITS = ["train"] * 16 + ["val"] * 8 + ["test"] * 16


@pytest.fixture
def photographs(tmp_path, monkeypatch) -> Path:
    """20 files of each class (their bytes are no pictures: nothing here decodes them)."""
    root = tmp_path / "photographs"
    for label in CLASSES:
        (root / label).mkdir(parents=True)
        for i in range(20):
            (root / label / f"{i:02}.jpg").write_bytes(f"picture {label} {i}".encode() * 50)
    monkeypatch.setenv("FACEMASK_DATA", str(root))
    return root


@pytest.fixture
def make_run(tmp_path, photographs):
    """make_run(seed, fold=None, name=..., dirty=False, noise=1.0, **config) -> folder of a finished run."""

    def make(
        seed: int = 0, fold: int | None = None, name: str = "", dirty: bool = False, noise: float = 1.0, **more
    ) -> Path:
        folder = tmp_path / "elsewhere" / (name or f"run{seed}_{fold}")
        paths = sorted(file.relative_to(photographs).as_posix() for file in photographs.rglob("*.jpg"))
        split = pd.Series(SPLITS).sample(frac=1, random_state=7 if fold is None else fold).tolist()
        table = pd.DataFrame({"path": paths, "label": [p.split("/")[0] for p in paths], "split": split})
        table["sha256"] = [hashlib.sha256((photographs / p).read_bytes()).hexdigest() for p in paths]
        table["group"] = table["sha256"]
        table["bytes"] = [(photographs / p).stat().st_size for p in paths]
        config = {
            "seed": seed,
            "run_dir": str(folder),
            "resume": False,
            "cache_dir": str(tmp_path / "cache"),
            "ledger": str(tmp_path / "ledger.jsonl"),
            "evaluate": {"splits": ["val", "test"], "batch_size": 64, "resamples": 100},
            "augment": {"_target_": "facemask.data.transforms.Augmentation", "seed": seed},
            "callbacks": {"best": {"dirpath": f"{folder}/checkpoints"}},
            "model": {"checkpoint": "/somewhere/else/weights.pth"},
            "data": {"root": str(photographs), "split": f"{photographs}/splits/a.csv", "fold": fold, "fraction": 1.0},
            **more,
        }
        command = (
            f"python train.py seed={seed} data.root={photographs} run_dir={folder} model.checkpoint=/somewhere/w.pth"
        )
        provenance = {
            "command": command,
            "overrides": command.split()[2:],
            "hardware": {"processor": "CPU", "capability": "AVX2", "cores": 2, "torch_threads": 2, "gpus": []},
            "environment": {"OMP_NUM_THREADS": "2", "TORCH_HOME": "/mnt/me/torch"},
            "platform": {"system": "Linux", "python": platform.python_version()},
            "versions": {"numpy": np.__version__, "torch": "2.9"},
            "git": {"commit": "c" * 40, "trees": ["t"], "dirty": dirty, "untracked": []},
            "fingerprint": fingerprint(table),
        }
        run = RunFolder(folder)
        run.lock()
        run.start(config, provenance, "--- a/x\n+++ b/x\n" if dirty else "")
        table.to_csv(folder / "split.csv", index=False)
        part = table[table["split"] != "train"]
        rng = np.random.default_rng(seed)
        signal = np.where(part["label"] == CLASSES[1], 1.0, -1.0)[:, None] * [-0.5, 0.5]
        heads = {name: signal + noise * rng.normal(size=(len(part), 2)) for name in ("head", "teacher", "no_pixels")}
        heads["majority"] = np.zeros((len(part), 2))
        columns = (part[name].tolist() for name in ("path", "split", "group", "label"))
        frame = assemble(*columns, heads, CLASSES)
        write_predictions(folder / "predictions.parquet", frame, CLASSES)
        write_json(folder / "metrics.json", evaluate(frame, CLASSES, resamples=100))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "best.ckpt").write_bytes(b"weights")
        digest = {"sha256": file_sha256(folder / "checkpoints" / "best.ckpt"), "weights_sha256": f"{seed:064}"}
        write_json(folder / "checkpoints.json", {"best.ckpt": digest})
        summary = {
            "name": "a run",
            "reported_head": "head",
            "weights_sha256": digest["weights_sha256"],
            "test_opened": 3 + seed,
            "data": {
                "fingerprint": provenance["fingerprint"],
                "classes": CLASSES,
                "left_out": {},
                "not_in_split_file": 0,
            },
            "distillation": {"teacher_label_disagreement": 0.1, "student_teacher_agreement": 0.8},
            "training": {"epoch": 1.0, "train_runtime": 1800.0, "parameters": 7, "precision": "32-true"},
            "notes": [f"weights of {folder}/checkpoints/best.ckpt"],
        }
        write_json(folder / "summary.json", summary)
        curves = {"epoch": [0, 1], "train/teacher_label_disagreement": [0.1, 0.1 * (seed + 1)]}
        pd.DataFrame({**curves, "train/student_teacher_agreement": [0.75, 0.85]}).assign(
            **{"val/nll": [0.4, 0.5] if seed == 1 else [0.5, 0.4]}
        ).to_csv(folder / "curves.csv", index=False)
        (folder / "report.html").write_text("has pictures")
        run.set_status("finished")
        run.release()
        return folder

    return make


@pytest.fixture(scope="session")
def kept_records(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture
def make_record(make_run, tmp_path, kept_records):
    """make_record(name, seeds=(0, 1, 2)) -> folder of a record: a copy, since records name no place of a machine."""

    def make(name: str = "mine", seeds=(0, 1, 2)) -> Path:
        kept = kept_records / str(seeds)
        if not (kept / name).exists():
            record([make_run(seed) for seed in seeds], name, kept, fingerprint)
        return Path(shutil.copytree(kept / name, tmp_path / "experiments" / name))

    return make
