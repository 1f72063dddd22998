"""Whole runs that share what a teacher said have the bits of runs that ask it, killed or not, in 1 or 2 processes."""

from pathlib import Path

import numpy as np
import pytest
from soak import DISTILLED, bits, finish, start

SOFT = [*DISTILLED, "distill=soft", "augment=deit", "teacher.crossfit=2", "trainer.max_epochs=3"]
ASKED = "facemask.modeling.classifier.ask_in_groups"


def killed(run_dir: Path, target: str, count: int, *options: str) -> None:
    process = start(run_dir, *options, kill_at=(target, count))
    process.join()
    assert process.exitcode == -9, Path(f"{run_dir}.log").read_text()[-5000:]


def finish_unasked(run_dir: Path, *options: str) -> dict[str, str]:
    """Finish a run that would be killed if it asked the teacher about a view."""
    process = start(run_dir, *options, kill_at=(ASKED, 1))
    process.join()
    assert process.exitcode == 0, Path(f"{run_dir}.log").read_text()[-5000:]
    return bits(run_dir)


@pytest.mark.slow
def test_runs_share_what_one_of_them_asked(tmp_path: Path) -> None:
    cache = f"cache_dir={tmp_path}/cache"
    online = finish(tmp_path / "online", *SOFT, cache, "teacher.save_logits=false")
    assert not (tmp_path / "cache" / "teacher_logits").exists()
    killed(tmp_path / "first", ASKED, 3, *SOFT, cache)  # inside the first epoch, and again after a checkpoint there
    killed(tmp_path / "first", ASKED, 4, *SOFT, cache)
    assert finish(tmp_path / "first", *SOFT, cache) == online
    options = [*SOFT, cache]
    killed(tmp_path / "second", "facemask.modeling.classifier.Classifier.training_step", 4, *options)
    assert finish_unasked(tmp_path / "second", *options) == online
    # Another student, rate and objective; the teacher is loaded for the predictions alone.
    other = [option for option in options if option != "model=deit_distilled" and option != "distill=soft"]
    finish_unasked(tmp_path / "logit", *other, "model=deit", "distill=logit", "augment=deit", "optim.lr=1e-5")
    assert len(list((tmp_path / "cache" / "teacher_logits").iterdir())) == 1
    killed(tmp_path / "seed", ASKED, 1, *options, "augment.seed=1")  # other views
    killed(tmp_path / "fold", ASKED, 1, *options, "data.fold=0")  # another split
    killed(tmp_path / "light", ASKED, 1, *options, "augment=light")  # other augmentation
    assert len(list((tmp_path / "cache" / "teacher_logits").iterdir())) == 4


@pytest.mark.slow
def test_two_processes_ask_about_a_half_each(tmp_path: Path) -> None:
    options = [*SOFT, "trainer.max_epochs=1"]
    finish(tmp_path / "two", *options, "trainer=ddp_cpu")
    (by_two,) = (tmp_path / "two.cache").rglob("epoch_0000.bin")
    assert (np.fromfile(by_two, "<u4").reshape(84, 3)[:, 2] != 0).sum() == 80
    online = finish(tmp_path / "one", *options)
    (by_one,) = (tmp_path / "one.cache").rglob("epoch_0000.bin")
    assert by_one.read_bytes() == by_two.read_bytes()
    assert finish_unasked(tmp_path / "again", *options, f"cache_dir={tmp_path}/two.cache") == online
