import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from optim_config import OPTIM
from PIL import Image

from facemask.data.datamodule import FolderData
from facemask.data.transforms import Augmentation
from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.classifier import Classifier
from facemask.modeling.objectives import Labels
from facemask.modeling.optim import EMA
from facemask.modeling.saved_logits import SavedLogits
from facemask.modeling.teacher import Teacher

CLASSES = ["blue", "red"]
DISTILLED = "deit_tiny_distilled_patch16_224"
OBJECTIVES = {
    "none": {"_target_": "facemask.modeling.objectives.Labels"},
    "hard": {"_target_": "facemask.modeling.objectives.HardDistillation", "alpha": 0.5},
    "alpha0": {"_target_": "facemask.modeling.objectives.HardDistillation", "alpha": 0.0},
    "logit": {"_target_": "facemask.modeling.objectives.LogitDistillation", "alpha": 0.5, "tau": 3.0},
}
OBJECTIVES["feature"] = {
    "_target_": "facemask.modeling.objectives.FeatureDistillation",
    "weight": 0.5,
    "base": OBJECTIVES["hard"],
}


class NeedsToken(Labels):
    """An objective from outside the package."""

    needs_token = True


def classifier(objective="none", name=DISTILLED, seed=0, dims=None, drop_path=0.1, **model) -> Classifier:
    return Classifier(
        model={
            "_target_": "facemask.modeling.backbones.build_backbone",
            "size": "tiny",
            "name": name,
            "img_size": 32,
            "pretrained": False,
            "checkpoint": None,
            "drop_path_rate": drop_path,
            "depth": 2,
            **model,
        },
        objective=OBJECTIVES[objective] if isinstance(objective, str) else objective,
        optim=OPTIM,
        classes=CLASSES,
        seed=seed,
        global_batch=8,
        teacher_dims=dims,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 noisy pictures of two colours: 28 for training, 4 for validation."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(40):
        label = CLASSES[number % 2]
        pixels = rng.integers(0, 150, (36, 36, 3), dtype=np.uint8)
        pixels[..., 2 if label == "blue" else 0] += 100
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


@pytest.fixture
def data(folder, tmp_path) -> FolderData:
    module = FolderData(
        root=str(folder), augmentation=Augmentation(0, 32), img_size=32, batch_size=8, cache_dir=tmp_path / "cache"
    )
    module.prepare()
    return module


@pytest.fixture
def teacher() -> Teacher:
    import timm

    torch.manual_seed(5)
    cnn = timm.create_model("test_resnet", num_classes=0)
    made = Teacher([cnn], 2, 2, 32, LITE0_MEAN, LITE0_STD)
    made.head_weight.normal_()
    return made


def trainer(folder: Path, epochs: int = 1, **more) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(max_epochs=epochs, **{**options, **more})


def saving(folder: Path, **more) -> dict:
    keep = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **more)
    return {"enable_checkpointing": True, "callbacks": [keep]}


def digest(module: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        state.update(key.encode() + value.numpy().tobytes())
    return state.hexdigest()


class Watch(pl.Callback):
    """Every logged value, by step and after each epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def on_train_epoch_start(self, trainer, *_) -> None:
        if self.steps:
            self.on_train_end(trainer)

    def on_train_end(self, trainer, *_) -> None:
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()})


# -- a plain Lightning trainer ----------------------------------------------------------------------------------


def test_runs_in_a_plain_trainer_and_learns(data, tmp_path):
    module, watch = classifier(drop_path=0.0), Watch()
    trainer(tmp_path, 6, callbacks=[watch]).fit(module, data)
    assert len(watch.steps) == 6 * 3  # 28 pictures, batches of 8, the rest of 4 dropped
    assert watch.epochs[-1]["val/accuracy"] == 1.0
    assert watch.epochs[-1]["train/loss_epoch"] < watch.epochs[0]["train/loss_epoch"]


def test_logged_names_and_sums_without_a_teacher(data, tmp_path):
    watch = Watch()
    trainer(tmp_path, callbacks=[watch]).fit(classifier(), data)
    (end,) = watch.epochs
    both = [f"val/{metric}{suffix}" for metric in ("accuracy", "nll") for suffix in ("", "_head", "_head_dist")]
    losses = ["train/loss", "train/head_ce", "train/head_dist_ce"]  # of the last step, and their means over the epoch
    assert end.keys() == {*(f"{name}{kind}" for name in losses for kind in ("_step", "_epoch")), *both}
    for name in losses:
        assert end[f"{name}_epoch"] == pytest.approx(
            sum(step[f"{name}_step"] for step in watch.steps) / len(watch.steps), abs=1e-6
        )
    for step in watch.steps:
        parts = step["train/head_ce_step"], step["train/head_dist_ce_step"]
        assert step["train/loss_step"] == pytest.approx(sum(parts) / 2, abs=1e-6)


def test_logged_names_and_sums_with_features(data, tmp_path, teacher):
    module, watch = classifier("feature", dims=(teacher.map_channels, teacher.pooled_dim)), Watch()
    module.attach_teacher(teacher, torch.zeros(28, dtype=torch.long))
    trainer(tmp_path, callbacks=[watch]).fit(module, data)
    parts = ["head_ce", "head_dist_distillation", "feature_map1", "feature_map2", "feature_pooled"]
    shares = ["teacher_label_disagreement", "teacher_entropy", "student_teacher_agreement"]
    named = {name.removesuffix("_step").removesuffix("_epoch") for name in watch.epochs[0] if name.startswith("train/")}
    assert named == {f"train/{name}" for name in [*parts, *shares, "loss"]}
    for step in watch.steps:
        values = [step[f"train/{part}_step"] for part in parts]
        expected = 0.5 * values[0] + 0.5 * values[1] + 0.5 * sum(values[2:])
        assert step["train/loss_step"] == pytest.approx(expected, abs=1e-5)


def test_validation_metrics_are_those_of_the_validation_split(data, tmp_path):
    module, watch = classifier(), Watch()
    trainer(tmp_path, callbacks=[watch]).fit(module, data)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        logits = module.eval()(batch["pixels"])
    assert list(logits) == ["head", "head_dist", "mean"]
    torch.testing.assert_close(logits["mean"], (logits["head"] + logits["head_dist"]) / 2)
    for head, suffix in (("mean", ""), ("head", "_head"), ("head_dist", "_head_dist")):
        nll = torch.nn.functional.cross_entropy(logits[head], batch["label"]).item()
        assert watch.epochs[0][f"val/nll{suffix}"] == pytest.approx(nll, abs=1e-5)
        accuracy = (logits[head].argmax(dim=1) == batch["label"]).float().mean().item()
        assert watch.epochs[0][f"val/accuracy{suffix}"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("objective", "name", "heads", "reported"),
    [
        ("none", DISTILLED, ["head", "head_dist"], "mean"),
        ("none", "vit_tiny_patch16_224", ["head"], "head"),
        ("logit", "deit_tiny_patch16_224", ["head"], "head"),
        ("hard", DISTILLED, ["head", "head_dist"], "mean"),
        ("alpha0", DISTILLED, ["head"], "head"),
    ],
)
def test_reported_heads(objective, name, heads, reported):
    module = classifier(objective, name)
    assert module.heads == heads
    assert module.reported_head == reported
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert list(module(pixels)) == (heads if reported == "head" else [*heads, "mean"])


def test_a_head_that_nothing_trains_stays_as_it_is(data, tmp_path, teacher):
    module = classifier("alpha0")
    module.attach_teacher(teacher, torch.zeros(28, dtype=torch.long))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer(tmp_path).fit(module, data)
    for part in ("weight", "bias"):  # no weight decay either
        assert torch.equal(
            module.state_dict()[f"backbone.network.head_dist.{part}"], before[f"backbone.network.head_dist.{part}"]
        )
        key = f"backbone.network.head.{part}"
        assert not torch.equal(module.state_dict()[key], before[key])


def test_vit_and_deit_under_one_recipe_and_seed_end_in_the_same_bits(data, tmp_path):
    digests = []
    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        module = classifier(name=name)
        trainer(tmp_path).fit(module, data)
        digests.append(digest(module.backbone))
    assert digests[0] == digests[1]


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_alone(data, tmp_path, teacher):
    module = classifier("feature", dims=(teacher.map_channels, teacher.pooled_dim))
    module.attach_teacher(teacher, torch.zeros(28, dtype=torch.long))
    trainer(tmp_path, **saving(tmp_path)).fit(module, data)
    loaded = Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True, map_location="cpu")
    assert digest(loaded) == digest(module)
    assert loaded.hparams["classes"] == CLASSES
    assert loaded.heads == ["head", "head_dist"]
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels)["mean"], module.eval()(pixels)["mean"])


def test_a_checkpoint_is_read_without_the_file_that_it_started_from(data, tmp_path):
    trainer(tmp_path, **saving(tmp_path)).fit(classifier(), data)
    start = (tmp_path / "epoch=0.ckpt").rename(tmp_path / "start.ckpt")
    module = classifier(seed=1, checkpoint=str(start), name="vit_tiny_patch16_224")
    assert len(module.backbone.load_report.unused) == 3  # the distillation token and its head
    trainer(tmp_path, **saving(tmp_path)).fit(module, data)
    start.unlink()
    loaded = Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True, map_location="cpu")
    assert digest(loaded) == digest(module)
    assert module.hparams["model"]["checkpoint"] == str(start)  # the running module still knows it


def test_pretrained_normalisation_is_in_the_checkpoint(data, tmp_path):
    module = classifier(name="vit_tiny_patch16_224")
    module.backbone.mean.fill_(127.5)  # what pretrained=true does for this name
    module.hparams["model"]["pretrained"] = True
    trainer(tmp_path, **saving(tmp_path)).fit(module, data)
    loaded = Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True, map_location="cpu")
    assert loaded.backbone.mean.flatten().tolist() == [127.5] * 3


def test_ema_checkpoints_hold_the_average_and_are_read_alone(data, tmp_path):
    module = classifier()
    options = saving(tmp_path)
    trainer(tmp_path, **{**options, "callbacks": [*options["callbacks"], EMA(0.999)]}).fit(module, data)
    loaded = Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True, map_location="cpu")
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert digest(loaded) == digest(module)  # the average is left in the module, too
    key = "backbone.network.head.weight"
    assert not torch.equal(saved["current_model_state"][key], saved["state_dict"][key])
    assert torch.equal(loaded.state_dict()[key], saved["state_dict"][key])


# -- randomness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_resumed_at_an_epoch_boundary_ends_in_the_same_bits(data, tmp_path, ema):
    def run(epochs: int, before: int, ckpt: Path | None, folder: Path) -> str:
        torch.manual_seed(before)
        torch.rand(before)  # whatever the global generator has gone through
        module = classifier()
        options = saving(folder)
        callbacks = [*options["callbacks"], *([EMA(0.999)] if ema else [])]
        fitted = trainer(tmp_path, epochs, **{**options, "callbacks": callbacks})
        fitted.fit(module, data, ckpt_path=ckpt, weights_only=True)
        return digest(module)

    whole = run(3, 1, None, tmp_path / "a")
    assert run(3, 2, None, tmp_path / "b") == whole
    assert run(3, 3, tmp_path / "a" / "epoch=0.ckpt", tmp_path / "c") == whole
    assert run(3, 3, tmp_path / "b" / "epoch=1.ckpt", tmp_path / "d") == whole


def test_drop_path_depends_on_seed_step_and_rank_alone(data, tmp_path):
    drawn = {}

    class Draw(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.on_train_batch_start(batch, batch_idx)
            drawn[self.name, trainer.global_step] = torch.rand(3).tolist()

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        callback = Draw()
        callback.name = name
        trainer(tmp_path, 2, callbacks=[callback]).fit(classifier(seed=seed), data)
    steps = [drawn["a", step] for step in range(6)]
    assert len({tuple(values) for values in steps}) == 6
    assert steps == [drawn["b", step] for step in range(6)]
    assert not any(drawn["a", step] == drawn["c", step] for step in range(6))


def test_the_seed_is_the_seed_of_the_weights():
    torch.manual_seed(9)
    first = digest(classifier(seed=0))
    torch.manual_seed(10)
    assert digest(classifier(seed=0)) == first
    assert digest(classifier(seed=1)) != first


# -- the teacher ------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module(data, tmp_path, teacher):
    module = classifier("hard")
    keys, parameters = list(module.state_dict()), [id(p) for p in module.parameters()]
    module.attach_teacher(teacher, torch.zeros(28, dtype=torch.long))
    before = teacher.digest()
    assert list(module.state_dict()) == keys
    assert [id(p) for p in module.parameters()] == parameters
    module.train()
    assert not any(part.training for part in teacher.modules())
    ours = trainer(tmp_path, 2, **saving(tmp_path))
    ours.fit(module, data)
    assert teacher.digest() == before
    optimized = {id(p) for group in ours.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    assert torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"].keys() == set(keys)


def test_each_picture_is_labelled_by_the_teacher_of_its_fold(data, teacher):
    module = classifier("hard")
    folds = torch.tensor([0, 1]).repeat(14)
    module.attach_teacher(teacher, folds)
    batch = next(iter(data.train_dataloader()))
    said = module._ask_teacher(batch)
    expected = teacher(batch["pixels"], folds[batch["row"]])
    torch.testing.assert_close(said.logits, expected.logits, rtol=0, atol=1e-4)  # which groups pictures otherwise
    assert not torch.allclose(said.logits, teacher(batch["pixels"], 1 - folds[batch["row"]]).logits, atol=1e-4)


def test_what_is_reported_of_the_teacher_is_counted_on_the_training_views(data, tmp_path, teacher):
    module, watch = classifier("hard"), Watch()
    module.attach_teacher(teacher, torch.zeros(28, dtype=torch.long))
    views = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            views.append({key: value.clone() for key, value in batch.items()})

    trainer(tmp_path, callbacks=[watch, Keep()]).fit(module, data)
    pixels = torch.cat([view["pixels"] for view in views])
    labels = torch.cat([view["target"] for view in views]).argmax(dim=1)
    logits = teacher(pixels, torch.zeros(24, dtype=torch.long)).logits
    p = logits.softmax(dim=1)
    end = watch.epochs[0]
    disagreement = (logits.argmax(dim=1) != labels).float().mean().item()
    assert disagreement > 0
    assert end["train/teacher_label_disagreement"] == pytest.approx(disagreement, abs=1e-6)
    assert end["train/teacher_entropy"] == pytest.approx(-(p * p.log()).sum(dim=1).mean().item(), abs=1e-4)
    assert 0 <= end["train/student_teacher_agreement"] <= 1


# -- impossible pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "name", "sentence"),
    [
        ("hard", "deit_tiny_patch16_224", "HardDistillation needs a model with a distillation token, and deit_tiny"),
        ("logit", DISTILLED, "LogitDistillation needs a model without a distillation token, and deit_tiny_distilled"),
        ({"_target_": f"{__name__}.NeedsToken"}, "vit_tiny_patch16_224", "NeedsToken needs a model with a distill"),
    ],
)
def test_an_objective_and_a_model_that_do_not_fit(objective, name, sentence):
    with pytest.raises(UserError, match=sentence):
        classifier(objective, name)
    if isinstance(objective, dict):
        assert classifier(objective).heads == ["head", "head_dist"]


def test_learning_rate_is_scaled_and_scheduled(data, tmp_path):
    module = classifier()
    module.hparams["global_batch"] = 16
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, 4, callbacks=[Rates()]).fit(module, data)
    # 12 steps, one of warm-up (round(1.2)): 1e-3 * 16 / 8 at once, then half a cosine over the other 11
    expected = [2e-3, *(1e-3 * (1 + np.cos(np.pi * step / 11)) for step in range(11))]
    assert rates == pytest.approx(expected)
    assert pd.Series(rates).is_monotonic_decreasing


@pytest.mark.parametrize("name", [DISTILLED, "vit_tiny_patch16_224"])
def test_a_probe_on_kept_features_gives_the_bits_of_one_without(name, data, tmp_path, monkeypatch):
    width = 192 * (2 if name == DISTILLED else 1)

    def probe(keep: bool) -> dict[str, torch.Tensor]:
        module = classifier(name=name, drop_path=0.0, freeze_backbone=True)
        if keep:
            module.save_features(SavedLogits(tmp_path, {}, 28, width, kind="features"))
        trainer(tmp_path, epochs=2, limit_val_batches=0).fit(module, data)
        return module.backbone.state_dict()

    asked, kept = probe(keep=False), probe(keep=True)
    assert all(torch.equal(asked[key], kept[key]) for key in asked)
    assert not torch.equal(asked["network.head.weight"], classifier(name=name).backbone.network.head.weight)
    epochs = sorted(tmp_path.glob("features/*/epoch_*.bin"))
    assert [file.stat().st_size for file in epochs] == 2 * [28 * 4 * (width + 1)]
    monkeypatch.setattr("facemask.modeling.backbones.Backbone.forward", None)  # nothing asks the network again
    again = probe(keep=True)
    assert all(torch.equal(asked[key], again[key]) for key in asked)
