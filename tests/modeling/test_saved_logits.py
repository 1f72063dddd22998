"""Saved logits: the bits of asking online, found when they are damaged, refused under another header."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from optim_config import OPTIM

from facemask.data.datamodule import SyntheticData
from facemask.data.transforms import Augmentation
from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.classifier import Classifier
from facemask.modeling.saved_logits import GROUP, SavedLogits, ask_in_groups
from facemask.modeling.teacher import Teacher
from facemask.runs.checkpoints import weights_sha256

HEADER = {"teacher_sha256": "a" * 64, "augment": {"seed": 0}, "data": "b" * 64}
ROWS = np.array([4, 1, 2])
LOGITS = torch.tensor([[0.5, -1.5], [3e-8, 7e7], [0.0, -0.0]])


def new_teacher(name: str, side: int, crossfit: int = 2, cnns: int = 1) -> Teacher:
    torch.manual_seed(5)
    teacher = Teacher(
        [timm.create_model(name, num_classes=0) for _ in range(cnns)], 2, crossfit, side, LITE0_MEAN, LITE0_STD
    )
    teacher.head_weight.normal_(0, 0.2)
    return teacher


# -- a logit belongs to its view alone --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cnns"), [("tf_efficientnet_lite0", 1), ("resnet10t", 2)])
def test_the_bits_of_a_picture_do_not_depend_on_its_batch(name: str, cnns: int) -> None:
    teacher = new_teacher(name, 32, cnns=cnns)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (28, 3, 32, 32), generator=rng, dtype=torch.uint8)
    folds = torch.arange(28) % 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = ask_in_groups(teacher, pixels, folds)
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (3, GROUP, 28):
                rows = torch.randperm(28, generator=rng)[: 2 * size]
                for part in rows.split(size):
                    said = ask_in_groups(teacher, pixels[part], folds[part])
                    assert torch.equal(said, whole[part])
                    plain = teacher(pixels[part], folds[part]).logits
                    torch.testing.assert_close(said, plain, rtol=0, atol=1e-4)
                    assert len(part) != GROUP or torch.equal(said, plain)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(ask_in_groups(teacher, pixels, 1 - folds), whole)


# -- the files --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = SavedLogits(tmp_path, HEADER, 6, 2)
    assert saved.read(3, ROWS) is None
    saved.write(3, ROWS, LOGITS)
    again = SavedLogits(tmp_path, HEADER, 6, 2)
    for got in (saved.read(3, ROWS), again.read(3, ROWS)):
        assert got is not None
        assert got.dtype == torch.float32
        assert got.numpy().tobytes() == LOGITS.numpy().tobytes()  # minus zero included
    reordered = again.read(3, ROWS[::-1].copy())
    assert reordered is not None
    assert torch.equal(reordered, LOGITS.flip(0))
    assert again.read(3, np.array([4, 0])) is None  # partly there
    assert again.read(2, ROWS) is None  # another epoch
    file = saved.folder / "epoch_0003.bin"
    assert file.stat().st_size == 6 * (2 + 1) * 4
    assert np.frombuffer(file.read_bytes(), "<f4").reshape(6, 3)[4, :2].tolist() == [0.5, -1.5]


def test_an_epoch_is_covered_when_no_whole_batch_is_left(tmp_path: Path) -> None:
    saved = SavedLogits(tmp_path, HEADER, 6, 2)
    assert not saved.covers(range(1), 2)
    for epoch in (0, 1):
        saved.write(epoch, np.arange(4), torch.zeros(4, 2))
    assert not saved.covers(range(2), 2)  # rows 4 and 5
    saved.write(0, np.array([5]), torch.zeros(1, 2))
    saved.write(1, np.array([4]), torch.zeros(1, 2))
    assert saved.covers(range(2), 2)
    assert not saved.covers(range(3), 2)  # asked for longer training


def test_every_flipped_bit_is_found_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SavedLogits(tmp_path, HEADER, 6, 2).write(0, ROWS, LOGITS)
    file = SavedLogits(tmp_path, HEADER, 6, 2).folder / "epoch_0000.bin"
    content, row = file.read_bytes(), 3 * 4
    for bit in range(8 * row, 8 * 3 * row):  # of rows 1 and 2
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert SavedLogits(tmp_path, HEADER, 6, 2).read(0, ROWS) is None
    assert "1 logits in" in caplog.text
    assert "are damaged and are computed again" in caplog.text
    SavedLogits(tmp_path, HEADER, 6, 2).write(0, ROWS, LOGITS)
    assert file.read_bytes() == content
    file.write_bytes(content[: 4 * row] + content[row : 2 * row] + content[5 * row :])  # row 1 in the place of row 4
    assert SavedLogits(tmp_path, HEADER, 6, 2).read(0, ROWS) is None
    file.with_name("epoch_0001.bin").write_bytes(content)  # of another epoch
    assert SavedLogits(tmp_path, HEADER, 6, 2).read(1, ROWS) is None
    file.write_bytes(content[:-5])
    assert SavedLogits(tmp_path, HEADER, 6, 2).read(0, ROWS) is None
    assert file.stat().st_size == len(content)


def test_another_header_has_another_folder_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    saved = SavedLogits(tmp_path, HEADER, 6, 2)
    saved.write(0, ROWS, LOGITS)
    others = [SavedLogits(tmp_path, {**HEADER, key: "c"}, 6, 2) for key in HEADER]
    others += [SavedLogits(tmp_path, HEADER, 7, 2), SavedLogits(tmp_path, HEADER, 6, 3)]
    assert len({other.folder for other in [saved, *others]}) == 6
    assert all(other.read(0, ROWS) is None for other in others)
    shutil.copy(saved.folder / "epoch_0000.bin", others[0].folder)  # under the header of another teacher
    assert others[0].read(0, ROWS) is None
    header = saved.folder / "header.json"
    assert json.loads(header.read_text()) == {**HEADER, "pictures": 6, "classes": 2}
    header.write_text(header.read_text().replace("aaa", "aab", 1))
    with pytest.raises(UserError, match=r"header\.json is not the header .* delete the folder"):
        SavedLogits(tmp_path, HEADER, 6, 2)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "teacher_logits").touch()
    with pytest.raises(UserError, match=r"cannot be kept in .*cache_dir=DIR, or .*teacher\.save_logits=false"):
        SavedLogits(tmp_path, HEADER, 6, 2)


def test_many_write_at_once(tmp_path: Path) -> None:
    logits = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def write(seed: int) -> None:
        saved = SavedLogits(tmp_path, HEADER, 64, 2)
        for epoch in range(3):
            for rows in np.random.default_rng(seed).permutation(64).reshape(8, 8):
                saved.write(epoch, rows, logits[rows])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    saved = SavedLogits(tmp_path, HEADER, 64, 2)
    assert saved.covers(range(3), 1)
    for epoch in range(3):
        read = saved.read(epoch, np.arange(64))
        assert read is not None
        assert torch.equal(read, logits)


# -- in training ------------------------------------------------------------------------------------------------


def fit(folder: Path, cache: Path, *, ask: bool = True, save: bool = True, epochs: int = 2, **more) -> str:
    """Soft distillation of a small student from a cross-fitted teacher on mixed views; returns its weights' sha256."""
    data = SyntheticData(
        num_images=60,
        augmentation=Augmentation(0, 32, mix_prob=1.0, mixup_alpha=0.8, cutmix_alpha=1.0),
        img_size=32,
        batch_size=more.pop("batch_size", 8),
        label_noise=more.pop("label_noise", 0.0),
        cache_dir=folder,
    )
    data.crossfit = 2
    data.prepare()
    module = Classifier(
        model={
            "_target_": "facemask.modeling.backbones.build_backbone",
            "size": "tiny",
            "name": "deit_tiny_distilled_patch16_224",
            "img_size": 32,
            "pretrained": False,
            "checkpoint": None,
            "drop_path_rate": 0.5,
            "depth": 2,
        },
        objective={"_target_": "facemask.modeling.objectives.SoftDistillation", "alpha": 0.5, "tau": 2.0},
        optim=OPTIM,
        classes=data.classes,
        seed=0,
        global_batch=8,
    )

    def load() -> Teacher:
        assert ask, "the teacher is asked though all is saved"
        return new_teacher("test_resnet", 32)

    saved = SavedLogits(cache, HEADER, len(data.rows("train")), 2) if save else None
    module.attach_teacher(load, torch.tensor(data.crossfit_folds()), saved)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_epochs=epochs, use_distributed_sampler=False, **quiet, **more
    )
    trainer.fit(module, data)
    return weights_sha256(module.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_training_on_saved_logits_gives_the_bits_of_asking(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    online = fit(tmp_path, cache, save=False)
    assert not cache.exists()
    assert fit(tmp_path, cache) == online  # asks, and keeps
    assert fit(tmp_path, cache, ask=False) == online
    (folder,) = (cache / "teacher_logits").iterdir()
    assert sorted(file.name for file in folder.glob("epoch*")) == ["epoch_0000.bin", "epoch_0001.bin"]
    records = np.fromfile(folder / "epoch_0001.bin", "<u4").reshape(42, 3)
    assert (records[:, 2] != 0).sum() == 40  # the two that make no batch are never asked for

    with pytest.raises(AssertionError, match="asked though all is saved"):
        fit(tmp_path, cache, ask=False, epochs=3)  # one epoch more than is saved
    assert fit(tmp_path, cache, epochs=3) == fit(tmp_path, cache, ask=False, epochs=3)
    # The teacher knows nothing of labels; and the same few pictures in every epoch are views as well.
    assert fit(tmp_path, cache, ask=False, label_noise=0.3) != online
    overfitted = fit(tmp_path, cache, ask=False, overfit_batches=2, epochs=4)
    assert overfitted == fit(tmp_path, cache, save=False, overfit_batches=2, epochs=4)
    # What batches of 5 have saved is what batches of 8 see.
    fit(tmp_path, tmp_path / "other", batch_size=5)
    assert fit(tmp_path, tmp_path / "other") == online


@pytest.mark.filterwarnings("ignore")
def test_damage_in_the_middle_of_training_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    online = fit(tmp_path, tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("epoch_0001.bin")
    content = file.read_bytes()
    filled = int(np.flatnonzero(np.frombuffer(content, "<u4").reshape(42, 3)[:, 2])[7])
    file.write_bytes(content[: 12 * filled] + bytes([content[12 * filled] ^ 1]) + content[12 * filled + 1 :])
    with caplog.at_level(logging.WARNING):
        assert fit(tmp_path, tmp_path / "cache") == online
    assert "1 logits in" in caplog.text
    assert file.read_bytes() == content
