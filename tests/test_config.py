import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from facemask.config import check, distills, user_sentence
from facemask.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("local", "sweep"))
FILES = [
    f"{file.parent.name}={file.stem}"
    for group in GROUPS
    for file in sorted((CONF / group).glob("*.yaml"))
    if not file.stem.startswith("_")
]
LISTS = ("logger", "callbacks")


@pytest.fixture(autouse=True)
def _data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEMASK_DATA", "/data")


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_the_groups() -> None:
    assert " ".join(GROUPS) == (
        "augment callbacks data debug distill experiment hydra logger model optim recipe teacher trainer"
    )
    assert {
        "data=folder",
        "model=deit",
        "trainer=ddp_cpu",
        "debug=overfit",
        "debug=limit",
        "debug=fast_dev_run",
    } <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_its_targets_exist(file: str) -> None:
    group, name = file.split("=")
    cfg = config(f"{group}=[{name}]" if group in LISTS else file, *(["model=deit"] if file == "distill=logit" else []))
    check(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    for target in targets(plain):
        assert callable(hydra.utils.get_object(target)), target
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}
    assert set(targets(own)) <= set(targets(plain))


VIT = {"weight_decay": 0.3, "label_smoothing": 0.0, "clip": 1.0, "mix": 0.0}
DEIT = {"weight_decay": 0.05, "label_smoothing": 0.1, "clip": None, "mix": 1.0}


def recipe(cfg: DictConfig) -> dict[str, Any]:
    return {
        "weight_decay": cfg.optim.weight_decay,
        "label_smoothing": cfg.optim.label_smoothing,
        "clip": cfg.trainer.gradient_clip_val,
        "mix": cfg.augment.mix_prob,
    }


@pytest.mark.parametrize(
    ("overrides", "name", "published", "objective"),
    [
        (["model=vit"], "vit_tiny_patch16_224", VIT, "Labels"),
        (["model=deit"], "deit_tiny_patch16_224", DEIT, "Labels"),
        (["model=deit_distilled"], "deit_tiny_distilled_patch16_224", DEIT, "HardDistillation"),
        ([], "deit_tiny_distilled_patch16_224", DEIT, "HardDistillation"),
        (["model=vit", "model.size=base"], "vit_base_patch16_224", VIT, "Labels"),
        (["model=deit_distilled", "distill=none"], "deit_tiny_distilled_patch16_224", DEIT, "Labels"),
        (["distill=none", "model=deit_distilled"], "deit_tiny_distilled_patch16_224", DEIT, "Labels"),
        (["model=deit", "distill=logit"], "deit_tiny_patch16_224", DEIT, "LogitDistillation"),
        (["model=vit", "recipe=deit"], "vit_tiny_patch16_224", DEIT, "Labels"),
        (["recipe=vit", "model=deit"], "deit_tiny_patch16_224", VIT, "Labels"),
        (["model=vit", "optim.weight_decay=0.1"], "vit_tiny_patch16_224", VIT | {"weight_decay": 0.1}, "Labels"),
        (["model=vit", "augment=deit"], "vit_tiny_patch16_224", VIT | {"mix": 1.0}, "Labels"),
        (["model=deit", "model.name=vit_tiny_r_s16_p8_224"], "vit_tiny_r_s16_p8_224", DEIT, "Labels"),
    ],
)
def test_model_selects_recipe_and_distillation_and_overrides_win(
    overrides: list[str], name: str, published: dict[str, Any], objective: str
) -> None:
    cfg = config("data=folder", *overrides)
    assert cfg.model.name == name
    assert recipe(cfg) == published
    assert cfg.distill._target_ == f"facemask.modeling.objectives.{objective}"
    assert distills(cfg) == (objective != "Labels")


def test_drawn_faces_are_mirrored_only_unless_another_augmentation_is_named() -> None:
    flip = config("data=folder", "augment=flip", "model.img_size=64").augment
    for name in ("vit", "deit", "deit_distilled"):
        assert config(f"model={name}").augment == flip
    assert config("model=vit", "augment=deit").augment.mix_prob == 1.0
    assert config("experiment=facemask_tiny_scratch").data._target_.endswith("FolderData")


def test_seed_0_is_a_seed() -> None:
    for seed in (0, 3):
        cfg = config(f"seed={seed}", "augment=deit")
        check(cfg)
        assert (cfg.seed, cfg.augment.seed) == (seed, seed)
    assert config("seed=3", "augment.seed=0").augment.seed == 0


def test_loggers_can_be_several_or_none() -> None:
    assert list(config().logger) == ["wandb"]
    assert config().logger.wandb.mode == "offline"
    assert list(config("logger=[csv,tensorboard]").logger) == ["csv", "tensorboard"]
    assert list(config("logger=[wandb,csv]", "logger.wandb.mode=online").logger) == ["wandb", "csv"]
    assert not config("logger=none").logger


def test_any_argument_of_the_trainer() -> None:
    cfg = config("trainer=cpu", "+trainer.max_time=00:01:00:00", "trainer.gradient_clip_val=0.5")
    assert (cfg.trainer.max_time, cfg.trainer.gradient_clip_val) == ("00:01:00:00", 0.5)


def test_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config("data=folder").data.root == "/data"
    assert config("data=folder", "data.root=/other").data.root == "/other"
    monkeypatch.delenv("FACEMASK_DATA")
    assert config("data=folder").data.root is None


@pytest.mark.parametrize("override", ["data.fold=0", "data.fold=null", "model.depth=null", "trainer.max_epochs=null"])
def test_what_may_be_null_or_zero(override: str) -> None:
    check(config(override))


def test_without_scikit_image_the_mend_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"augment.counterfactual needs scikit-image: pip install 'facemask\[faces\]'"):
        check(config("augment=robust"))
    check(config("augment=light"))


def test_a_defect_of_the_program_is_no_sentence() -> None:
    assert user_sentence(ValueError("broken")) is None
    assert user_sentence(UserError("mend it")) == "mend it"
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = UserError("inner")
    assert user_sentence(wrapped) == "inner"


# -- parts from outside the package -----------------------------------------------------------------------------------

OUTSIDE = '''
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from torch import nn

from facemask.data.datamodule import ImageData
from facemask.data.synthetic import synthetic_bytes, synthetic_table
from facemask.modeling.backbones import Backbone
from facemask.modeling.objectives import Labels


class Pooled(nn.Module):
    """The mean colour through one layer."""

    num_features = 3
    num_prefix_tokens = 0

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward_features(self, images):
        return images

    def forward_head(self, images, pre_logits):
        return images.mean(dim=(2, 3))

    def get_classifier(self):
        return self.fc


def backbone(name, num_classes, img_size, **_):
    return Backbone(Pooled(num_classes), (0.5,) * 3, (0.5,) * 3)


class Doubled(Labels):
    def forward(self, outputs, target, teacher):
        losses = super().forward(outputs, target, teacher)
        return {**losses, "once": losses["loss"], "loss": 2 * losses["loss"]}


class Note(pl.Callback):
    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, module):
        Path(self.file).write_text(f"{type(module.objective).__name__} {type(module.backbone.network).__name__}")


class Drawn(ImageData):
    drawn = True

    def __init__(self, *, count, **common):
        super().__init__(**common)
        self.count = count

    def load_table(self):
        table = synthetic_table(self.count).assign(problem="")
        self.number = {path: i for i, path in enumerate(table["path"])}
        return table

    def read(self, path):
        return synthetic_bytes(0, self.number[path])
'''
GROUP_FILES = {
    "model/mine.yaml": """# @package _global_
defaults: [_base, _self_, {override /recipe: vit}, {override /distill: doubled}]
model_name: mine
model: {_target_: outside.backbone, name: mine}
""",
    "distill/doubled.yaml": "_target_: outside.Doubled\n",
    "callbacks/note.yaml": "note: {_target_: outside.Note, file: '${run_dir}/note.txt'}\n",
    "data/mine.yaml": "defaults: [_base]\n_target_: outside.Drawn\ndefault_img_size: 32\ncount: 60\n",
}


@pytest.fixture
def outside(tmp_path: Path) -> list[str]:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    for name, text in GROUP_FILES.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    given = ["model=mine", "data=mine", "callbacks=[default,note]", "logger=none", "trainer.max_epochs=1"]
    return [
        f"hydra.searchpath=[file://{tmp_path}/conf]",
        *given,
        "data.batch_size=16",
        "evaluate.resamples=100",
        "trainer.log_every_n_steps=1",
    ]


def train(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_parts_from_outside_compose(tmp_path: Path, outside: list[str]) -> None:
    result = train(tmp_path, *outside, "--cfg", "job", "--resolve")
    assert result.returncode == 0, result.stderr
    cfg = yaml.safe_load(result.stdout)
    assert set(targets(cfg)) >= {"outside.backbone", "outside.Doubled", "outside.Note", "outside.Drawn"}
    assert cfg["optim"]["weight_decay"] == 0.3
    assert not (tmp_path / "runs").exists()


def test_parts_from_outside_run(tmp_path: Path, outside: list[str]) -> None:
    result = train(tmp_path, *outside, "run_dir=run", f"cache_dir={tmp_path / 'cache'}", f"ledger={tmp_path}/l.jsonl")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "note.txt").read_text() == "Doubled Pooled"
    assert (tmp_path / "run" / "report.html").exists()
    assert "train/once" in (tmp_path / "run" / "curves.csv").read_text().split("\n")[0]


def test_help_names_the_groups(tmp_path: Path) -> None:
    result = train(tmp_path, "--help")
    assert result.returncode == 0
    for group in GROUPS:
        if group not in ("experiment", "debug"):
            assert group in result.stdout
    assert "--hydra-help" in result.stdout
