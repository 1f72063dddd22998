import os

import pytest
import torch
import yaml

from facemask.errors import UserError
from facemask.files import write_text
from facemask.runs.folder import RunFolder, file_sha256
from facemask.runs.provenance import collect

CONFIG = {"run_dir": "runs/a", "resume": False, "optim": {"lr": 0.1}, "callbacks": {"dirpath": "runs/a/checkpoints"}}


def started(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG, {"command": "python train.py"}, "")
    return folder


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "two \ud800")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert file_sha256(target) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_start_writes_what_is_known_before_training(tmp_path):
    folder = started(tmp_path)
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG
    assert folder.status()["state"] == "running"
    assert folder.status()["pid"] == os.getpid()
    assert len(folder.status()["id"]) == 8
    assert not (folder.path / "diff.patch").exists()


def test_a_run_with_another_config_is_not_resumed(tmp_path):
    folder = started(tmp_path)
    # the run folder's own path may be given another way, and resume is what makes the difference
    folder.resume({**CONFIG, "resume": True, "run_dir": "b", "callbacks": {"dirpath": "b/checkpoints"}})
    with pytest.raises(UserError, match=r"holds a run of another config \(optim.lr differ\)"):
        folder.resume({**CONFIG, "optim": {"lr": 0.2}})


def test_resuming_removes_half_written_files_and_keeps_the_id(tmp_path):
    folder = started(tmp_path)
    before = folder.status()
    (folder.path / "checkpoints").mkdir()
    for name in (".curves.csv.k3x_1a", ".lock", "checkpoints/last.ckpt.tmp", "checkpoints/best.ckpt"):
        (folder.path / name).touch()
    folder.resume(CONFIG)
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
    assert left == [".lock", "checkpoints/best.ckpt", "config.yaml", "provenance.json", "status.json"]
    assert folder.status()["id"] == before["id"]
    assert folder.status()["state"] == "running"


def test_provenance_names_code_versions_and_hardware(monkeypatch):
    monkeypatch.setenv("FACEMASK_DATA", "/mnt/somebody/pictures")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HOME", "/mnt/somebody")
    provenance, diff = collect(["model=vit", "seed=1"])
    assert provenance["overrides"] == ["model=vit", "seed=1"]
    assert provenance["environment"]["OMP_NUM_THREADS"] == "3"
    assert provenance["environment"]["FACEMASK_DATA"] == "set"
    assert "somebody" not in str(provenance["environment"])
    assert provenance["hardware"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(provenance["git"]["commit"]) == 40
    assert provenance["git"]["dirty"] == bool(diff or provenance["git"]["untracked"])
    assert provenance["versions"]["timm"].startswith("1.")
    assert provenance["hardware"]["cores"] == os.cpu_count()
