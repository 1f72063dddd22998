"""Weights & Biases without a server: what it is asked for when a run starts, goes on, and is pruned."""

import os
from types import SimpleNamespace

import pytest
import wandb
from hydra import compose, initialize_config_dir

from facemask.config import ROOT
from facemask.runs.folder import RunFolder
from facemask.runs.loggers import WandbLogger
from facemask.train import _loggers


@pytest.fixture
def asked(monkeypatch):
    """Arguments of every wandb.init, and the runs that it gave."""
    found = []

    def init(**arguments):
        run = SimpleNamespace(tags=None, summary={}, config=SimpleNamespace(update=lambda *a, **k: None))
        found.append((arguments, run))
        return run

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "finish", lambda: found.append(("finished", None)))
    return found


def test_a_run_that_goes_on_is_one_run_online_and_a_pruned_one_is_marked(tmp_path, asked):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["name=deit", f"run_dir={tmp_path}/run", "logger.wandb.mode=online"])
    folder = RunFolder(tmp_path / "run")
    folder.start({"run_dir": str(folder.path)}, {}, "")
    for _ in range(2):  # as after a kill
        (logger,) = _loggers(cfg, {}, SimpleNamespace(drawn=False), folder)
        folder.set_status("running")
    (first, _), (again, run) = asked
    assert (first["id"], first["resume"], first["mode"]) == (folder.status()["id"], "allow", "online")
    assert first == again
    assert (first["group"], first["name"]) == ("deit", "run")
    assert not logger.log_images
    logger.mark_pruned()
    assert (run.tags, run.summary) == (("pruned",), {"pruned": True})
    assert asked[-1] == ("finished", None)


def test_offline_leaves_the_environment_as_it_is(tmp_path, asked, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbLogger("offline", log_images=False, save_dir=str(tmp_path))
    assert logger.experiment is asked[0][1]
    assert asked[0][0]["mode"] == "offline"
    assert "WANDB_MODE" not in os.environ  # else another rank would compose another config
