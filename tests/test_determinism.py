"""The same command gives the same bits: every pair of runs in two processes of its own."""

import json
from pathlib import Path

import pytest
import torch
from soak import SMALL, bits, launch

from facemask.devices import build_trainer

# Jobs of one multirun each: 12 students without a teacher, 2 with one that is fitted, 2 with one from a file.
STUDENTS = [
    "model=vit,deit,deit_distilled", "distill=none", "recipe=deit", "augment=light,deit", "data.num_workers=0,2",
    "trainer.precision=32-true",
]  # fmt: skip
DISTILLED = ["model=deit_distilled", "augment=light", "callbacks=[default,ema]", "trainer.precision=32-true,bf16-mixed"]


def run(folder: Path, cache: Path, *options: str) -> None:
    own = [f"hydra.sweep.dir={folder}", f"cache_dir={cache}", f"ledger={folder}/ledger", "trainer.max_epochs=1"]
    process = launch(["-m", *SMALL, "data.num_images=60", *own, *options], f"{folder}.log")
    process.join()
    assert process.exitcode == 0, Path(f"{folder}.log").read_text()[-5000:]


def results(folder: Path) -> dict[str, dict[str, str]]:
    return {path.parent.name: bits(path.parent) for path in sorted(folder.glob("*/summary.json"))}


@pytest.mark.slow
def test_students_without_a_teacher(tmp_path):
    run(tmp_path / "a", tmp_path / "cache", *STUDENTS)
    run(tmp_path / "b", tmp_path / "cache2", *STUDENTS)  # with nothing decoded yet
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert a == b
    assert len(a) == 12
    by_bits: dict[str, list[str]] = {}
    for name, facts in a.items():
        by_bits.setdefault(json.dumps(facts), []).append(name)
    # 0 and 2 loader processes give the same bits; vit and deit are one network under one recipe
    assert sorted(len(names) for names in by_bits.values()) == [2, 2, 4, 4]


@pytest.mark.slow
def test_distilled_students_with_averaged_weights(tmp_path):
    run(tmp_path / "a", tmp_path / "cache_a", *DISTILLED)
    run(tmp_path / "b", tmp_path / "cache_b", *DISTILLED)  # where the teacher is fitted again
    (file,) = (tmp_path / "cache_a" / "teachers").glob("*.safetensors")
    (again,) = (tmp_path / "cache_b" / "teachers").glob("*.safetensors")
    assert file.read_bytes() == again.read_bytes()
    run(tmp_path / "c", tmp_path / "cache_c", *DISTILLED, f"teacher.checkpoint={file}")  # where it is not fitted
    a, b, c = (results(tmp_path / name) for name in "abc")
    assert len(a) == 2
    assert a == b == c
    assert len({json.dumps(facts) for facts in a.values()}) == 2  # fp32 and bf16 differ


def test_deterministic_steps_do_not_fill_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    build_trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not torch.utils.deterministic.fill_uninitialized_memory
