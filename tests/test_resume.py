"""Runs that are killed, at chosen moments and at random ones, and what they leave behind."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from soak import DISTILLED, finish, soak, start

from facemask.errors import UserError
from facemask.runs.checkpoints import read_checkpoint, weights_sha256, write_checkpoint
from facemask.runs.folder import RunFolder


def kill_at(target: str, count: int, run_dir: Path, *options: str) -> None:
    process = start(run_dir, *options, kill_at=(target, count))
    process.join()
    assert process.exitcode == -9, Path(f"{run_dir}.log").read_text()[-5000:]


def damage_is_told(run_dir: Path, *options: str) -> None:
    file = run_dir / "checkpoints" / "last.ckpt"
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :])
    process = start(run_dir, *options)
    process.join()
    assert process.exitcode == 2
    output = Path(f"{run_dir}.log").read_text()
    assert f"error: the checkpoint {file} is damaged" in output
    assert "Traceback" not in output
    file.write_bytes(content)


@pytest.mark.slow
def test_a_run_killed_everywhere_ends_with_the_bits_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*DISTILLED, "trainer.max_epochs=3"]
    expected = finish(whole, *options)
    options.append("data.num_workers=2")  # which changes no bit
    kill_at("facemask.data.cache.resize_short", 50, killed, *options)  # while the pictures are decoded
    kill_at("facemask.modeling.teacher.save_file", 1, killed, *options)  # between teacher and student
    kill_at("facemask.runs.folder.write_text", 1, killed, *options)  # while the run folder is made
    assert not (killed / "config.yaml").exists()
    kill_at("facemask.modeling.classifier.Classifier.training_step", 2, killed, *options)  # before any checkpoint
    kill_at("facemask.modeling.classifier.Classifier.training_step", 5, killed, *options)  # inside an epoch
    state = torch.load(killed / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
    assert state["global_step"] == 4  # of 5 in an epoch: the run goes on in the middle of it
    damage_is_told(killed, *options)
    kill_at("facemask.modeling.classifier.Classifier.training_step", 5, killed, *options)  # inside the next one
    assert torch.load(killed / "checkpoints" / "last.ckpt", "cpu", weights_only=True)["global_step"] == 8
    # inside a checkpoint's write (the first two digests are of the teacher's file)
    kill_at("facemask.runs.checkpoints.hashlib.file_digest", 4, killed, *options)
    assert (killed / "checkpoints" / "last.ckpt.tmp").exists() or (killed / "checkpoints" / "best.ckpt.tmp").exists()
    kill_at("facemask.train.write_predictions", 1, killed, *options)  # when everything is trained
    assert finish(killed, *options) == expected
    assert [path.name for path in killed.rglob("*.tmp")] == []
    assert [path.name for path in killed.glob(".*.*")] == []


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, capsys):
    soak(tmp_path, kills=3, seed=int(time.time()))
    assert "the same bits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_stopped_early_does_not_go_on_and_wandb_keeps_one_id(tmp_path):
    options = ["model=vit", "trainer.max_epochs=9", "callbacks=[default,early_stopping]", "optim.lr=1e-12"]
    options += ["callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=1", "logger=wandb"]
    kill_at("facemask.train.write_predictions", 1, tmp_path / "run", *options)
    before = torch.load(tmp_path / "run/checkpoints/last.ckpt", "cpu", weights_only=True)
    finish(tmp_path / "run", *options)
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", "cpu", weights_only=True)
    assert before["global_step"] == after["global_step"] == 10  # two epochs of five steps, not nine
    segments = sorted(path.stem.removeprefix("run-") for path in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert segments == 2 * [json.loads((tmp_path / "run/status.json").read_text())["id"]]
    # `wandb sync` takes both segments for parts of one run, in the order of their starts.
    dry = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", "--dry-run", *(tmp_path / "run/wandb").glob("offline-run-*")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "WANDB_API_KEY": "0" * 40},
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert (dry.stdout + dry.stderr).count(segments[0]) >= 2


# -- checkpoints ------------------------------------------------------------------------------------------------


def state() -> dict:
    return {"state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, "epoch": 1}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    write_checkpoint(tmp_path / "new" / "last.ckpt", state())
    again = read_checkpoint(tmp_path / "new" / "last.ckpt")
    assert again["epoch"] == 1
    assert weights_sha256(again["state_dict"]) == weights_sha256(state()["state_dict"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]
    plain = torch.load(tmp_path / "new" / "last.ckpt", weights_only=True)  # other programs can read it, too
    assert torch.equal(plain["state_dict"]["a"], torch.arange(6.0).reshape(2, 3))


def test_the_sha256_of_weights_is_of_names_types_shapes_and_bits():
    a = torch.tensor([0.0, 1.0])
    assert weights_sha256({"x": a, "y": a + 1}) == weights_sha256({"y": a + 1, "x": a.clone()})
    others = [{"z": a}, {"x": a.double()}, {"x": a.reshape(2, 1)}, {"x": torch.tensor([-0.0, 1.0])}]
    assert len({weights_sha256({"x": a}), *map(weights_sha256, others)}) == 5


def test_every_flipped_bit_and_every_lost_byte_is_found(tmp_path):
    file = tmp_path / "last.ckpt"
    write_checkpoint(file, state())
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
            read_checkpoint(file)
    for length in (0, 1, 63, 64, 71, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
            read_checkpoint(file)
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    harm, file = tmp_path / "harm", tmp_path / "last.ckpt"
    pickle.loads(pickle.dumps(Harm(harm)))
    assert harm.exists()  # it would
    harm.unlink()
    write_checkpoint(file, {"state_dict": {}, "callbacks": Harm(harm)})  # with a right sha256 of itself
    with pytest.raises(UserError, match="something else than tensors and numbers"):
        read_checkpoint(file)
    assert not harm.exists()


# -- one process at a time --------------------------------------------------------------------------------------


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from facemask.runs.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); folder.lock(); folder.start({}, {}, '')\n"
        "import os; child = os.fork()\n"  # a loader process that outlives its parent for a moment
        "child and print('taken', flush=True)\n"
        "time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "run")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=rf"is still running \(process {process.pid}\): wait for it or stop it"):
            folder.lock()
        assert not folder.locked
        process.kill()
        process.wait()
        folder.lock()  # though the child lives
        assert folder.locked
        folder.release()
    finally:
        os.killpg(process.pid, 9)


def test_an_unused_folder_is_removed_with_its_lock(tmp_path):
    folder = RunFolder(tmp_path / "name" / "run")
    folder.lock()
    folder.release()
    assert not (tmp_path / "name").exists()
    folder.lock()
    (folder.path / "config.yaml").touch()
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml"]
