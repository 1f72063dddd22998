from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.objectives import TeacherOutputs
from facemask.modeling.teacher import Teacher, TeacherSpec, TrainingSplit, fit, fit_or_load, load_teacher, teacher_key
from facemask.modeling.weights import lite0_state_dict

CPU = torch.device("cpu")
LITE0 = TeacherSpec(
    name="tf_efficientnet_lite0",
    weights="package",
    train="frozen",
    img_size=32,
    epochs=1,
    lr=1e-3,
    crossfit=1,
    checkpoint=None,
    seed=0,
)
SCRATCH = replace(LITE0, name="resnet10t", weights=None, train="scratch", lr=2e-3)


def colours(count: int = 40, side: int = 32, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey squares, of which class c is brighter by 80 grey levels in channel c; classes alternate."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(0, 170, (count, 1, side // 8, side // 8), generator=generator)
    pixels = squares.repeat(1, 3, 1, 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    labels = torch.arange(count) % classes
    pixels[torch.arange(count), labels] += 80
    return pixels.to(torch.uint8), labels


def split(count: int = 40, crossfit: int = 1, classes: int = 2, fingerprint: str = "a" * 64) -> TrainingSplit:
    pixels, labels = colours(count, classes=classes)
    targets = F.one_hot(labels, classes).float()

    def eval_batches():
        return [{"pixels": pixels[i : i + 16], "label": labels[i : i + 16]} for i in range(0, count, 16)]

    def train_batches(epoch, rows):
        return [{"pixels": pixels[rows[i : i + 8]], "target": targets[rows[i : i + 8]]} for i in range(0, len(rows), 8)]

    return TrainingSplit(
        classes=["with_mask", "without_mask", "wrong"][:classes],
        eval_batches=eval_batches,
        train_batches=train_batches,
        folds=np.arange(count) // 4 % crossfit,
        fingerprint=fingerprint,
    )


@pytest.fixture(scope="module")
def lite0() -> Teacher:
    return fit(LITE0, split(), CPU)


@pytest.fixture(scope="module")
def crossfitted() -> Teacher:
    return fit(replace(LITE0, crossfit=2), split(crossfit=2), CPU)


@pytest.fixture(scope="module")
def scratch() -> Teacher:
    return fit(replace(SCRATCH, crossfit=2), split(crossfit=2), CPU)


def same(first, second) -> bool:
    tensors = [[said.logits, said.pooled, *said.feature_maps] for said in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


# -- the frozen teacher -----------------------------------------------------------------------------------------


def test_frozen_features_and_a_linear_head_learn_two_colours(lite0):
    pixels, labels = colours()
    assert (lite0(pixels).logits.argmax(dim=1) == labels).all()
    assert lite0.map_channels == [112, 320]
    assert lite0.pooled_dim == 1280
    assert [m.shape for m in lite0(pixels).feature_maps] == [(40, 112, 2, 2), (40, 320, 1, 1)]
    assert lite0.head_weight.shape == (1, 2, 1280)


def test_dims_are_known_before_the_teacher_is(lite0):
    assert LITE0.dims() == ([112, 320], 1280) == (lite0.map_channels, lite0.pooled_dim)
    assert SCRATCH.dims() == ([256, 512], 512)


def test_fitting_is_deterministic(lite0):
    torch.manual_seed(123)
    assert fit(LITE0, split(), CPU).digest() == lite0.digest()
    assert lite0.digest() == lite0.digest() != fit(LITE0, split(36), CPU).digest()


def test_the_cnn_is_the_packages_and_stays_so(lite0):
    weights = lite0_state_dict()
    for key, value in lite0.cnns[0].state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_it_sees_its_own_normalisation(lite0):
    pixels, _ = colours()
    expected = (pixels / 255 - torch.tensor(LITE0_MEAN).view(3, 1, 1)) / torch.tensor(LITE0_STD).view(3, 1, 1)
    torch.testing.assert_close(lite0.images(pixels), expected)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.load_state_dict(lite0_state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(lite0.features(pixels)[1], network.eval()(expected), atol=1e-4, rtol=1e-4)


def test_pixels_of_another_size_are_resized(lite0):
    pixels, _ = colours(4, side=48)
    images = lite0.images(pixels)
    assert images.shape == (4, 3, 32, 32)
    mean, std = torch.tensor(LITE0_MEAN).view(3, 1, 1), torch.tensor(LITE0_STD).view(3, 1, 1)
    expected = F.interpolate((pixels / 255 - mean) / std, size=(32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(images, expected)
    by_hand = Teacher([lite0.cnns[0]], 2, 1, 32, LITE0_MEAN, LITE0_STD)
    by_hand.load_state_dict(lite0.state_dict())
    assert by_hand(pixels).logits.shape == (4, 2)
    flat = torch.full((1, 3, 48, 48), 77, dtype=torch.uint8)
    torch.testing.assert_close(lite0(flat).logits, lite0(flat[..., :32, :32]).logits, atol=1e-4, rtol=1e-4)


def test_the_head_is_scikit_learns_logistic_regression(lite0):
    pixels, labels = colours()
    features = lite0.features(pixels)[1].double().numpy()
    standard = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-3)
    model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit(standard, labels)
    probability = lite0(pixels).logits.softmax(dim=1).numpy()
    np.testing.assert_allclose(probability, model.predict_proba(standard), atol=1e-4)


def test_more_than_two_classes():
    teacher = fit(LITE0, split(45, classes=3), CPU)
    pixels, labels = colours(45, classes=3)
    features = teacher.features(pixels)[1].double().numpy()
    standard = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-3)
    model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit(standard, labels)
    said = teacher(pixels).logits
    assert said.shape == (45, 3)
    np.testing.assert_allclose(said.softmax(dim=1).numpy(), model.predict_proba(standard), atol=1e-4)


def assert_standard(teacher: Teacher, cnn: int, said: TeacherOutputs) -> None:
    """Every channel has mean 0 and deviation 1 over the training pixels (s / (s + 0.001): a dead channel stays 0)."""
    maps, pooled = teacher.features(colours()[0], cnn)
    for scaled, raw in zip([*said.feature_maps, said.pooled], [*maps, pooled], strict=True):
        scaled, raw = (x.double().movedim(1, -1).flatten(0, -2) for x in (scaled, raw))
        assert scaled.mean(dim=0).abs().max() < 1e-3
        deviation = raw.std(dim=0, correction=0)
        torch.testing.assert_close(
            scaled.std(dim=0, correction=0), deviation / (deviation + 1e-3), atol=1e-3, rtol=1e-3
        )
        assert deviation.max() > 0.1


def test_features_are_standardised_over_the_training_split(lite0):
    assert_standard(lite0, 0, lite0(colours()[0]))


# -- how it stays as it is --------------------------------------------------------------------------------------


def test_evaluation_mode_and_no_gradients_whatever_is_asked(lite0):
    before = lite0.digest()
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    said = lite0(colours()[0])
    assert not any(t.requires_grad for t in (said.logits, said.pooled, *said.feature_maps))
    assert lite0.digest() == before


def test_digest_changes_with_any_weight(lite0):
    before = lite0.digest()
    bias = lite0.head_bias[0, 0].clone()
    lite0.head_bias[0, 0] += 1e-6
    assert lite0.digest() != before
    lite0.head_bias[0, 0] = bias
    assert lite0.digest() == before


def test_fp32_under_autocast(lite0):
    pixels, _ = colours(8)
    plain = lite0(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, features = lite0(pixels), lite0.features(pixels)[1]
    assert torch.equal(features, lite0.features(pixels)[1])
    assert mixed.logits.dtype == mixed.pooled.dtype == torch.float32
    assert same(plain, mixed)


# -- cross-fitting ----------------------------------------------------------------------------------------------


def test_each_fold_has_the_head_that_never_saw_it(crossfitted):
    pixels, labels = colours()
    folds = np.arange(40) // 4 % 2
    features = crossfitted.features(pixels)[1].double().numpy()
    assert len(crossfitted.cnns) == 1
    logits = []
    for fold in range(2):
        rest = features[folds != fold]
        mean, std = rest.mean(axis=0), rest.std(axis=0) + 1e-3
        model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit((rest - mean) / std, labels[folds != fold])
        expected = model.predict_proba((features - mean) / std)
        head = torch.full((40,), fold)
        np.testing.assert_allclose(crossfitted(pixels, head).logits.softmax(dim=1).numpy(), expected, atol=1e-4)
        logits.append(crossfitted(pixels, head).logits)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
    mixed = crossfitted(pixels, torch.from_numpy(folds)).logits
    for row, fold in enumerate(folds):
        assert torch.equal(mixed[row], logits[fold][row])
    torch.testing.assert_close(crossfitted(pixels).logits, (logits[0] + logits[1]) / 2)


def test_a_teacher_from_scratch_has_a_network_per_fold(scratch):
    pixels, _ = colours()
    assert len(scratch.cnns) == 2
    convolutions = [cnn.layer4[0].conv1.weight for cnn in scratch.cnns]
    assert not torch.equal(*convolutions)
    alone = [scratch(pixels, torch.full((40,), fold)) for fold in range(2)]
    folds = torch.arange(40) // 4 % 2
    mixed = scratch(pixels, folds)
    for row, fold in enumerate(folds.tolist()):
        torch.testing.assert_close(mixed.logits[row], alone[fold].logits[row])
        torch.testing.assert_close(mixed.pooled[row], alone[fold].pooled[row])
        for level in (0, 1):
            torch.testing.assert_close(mixed.feature_maps[level][row], alone[fold].feature_maps[level][row])
    assert not torch.allclose(alone[0].logits, alone[1].logits, atol=1e-3)
    for fold, said in enumerate(alone):  # each network has feature scales of its own
        assert_standard(scratch, fold, said)


def test_a_teacher_from_scratch_sees_the_other_folds_alone():
    seen: dict[int, list[np.ndarray]] = {}
    data = split(crossfit=2)
    batches = data.train_batches

    def watched(epoch, rows):
        seen.setdefault(len(seen), []).append(rows)
        return batches(epoch, rows)

    data.train_batches = watched
    fit(replace(SCRATCH, crossfit=2), data, CPU)
    rows = [tuple(given[0].tolist()) for given in seen.values()]
    odd, even = tuple(np.flatnonzero(data.folds == 1).tolist()), tuple(np.flatnonzero(data.folds == 0).tolist())
    assert set(rows) == {odd, even}
    assert rows[0] == odd  # the first network is asked about fold 0 and learns fold 1
    assert rows[-1] == even


def test_training_from_scratch_learns_and_is_deterministic():
    spec = replace(SCRATCH, epochs=4)
    first, second = fit(spec, split(), CPU), fit(spec, split(), CPU)
    assert first.digest() == second.digest()
    assert first.digest() != fit(replace(SCRATCH, seed=1), split(), CPU).digest()
    pixels, labels = colours()
    assert (first(pixels).logits.argmax(dim=1) == labels).float().mean() >= 0.9
    start = timm.create_model("resnet10t", num_classes=0).state_dict()
    assert not torch.equal(first.cnns[0].state_dict()["bn1.running_mean"], start["bn1.running_mean"])


def test_fine_tuning_starts_from_the_weights():
    tuned = fit(replace(LITE0, train="finetune", lr=1e-6), split(), CPU)
    stem, imagenet = tuned.cnns[0].conv_stem.weight, lite0_state_dict()["conv_stem.weight"]
    assert not torch.equal(stem, imagenet)
    torch.testing.assert_close(stem, imagenet, atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in tuned.parameters())


# -- files ------------------------------------------------------------------------------------------------------


def test_fitted_once_and_read_back_to_the_bit(tmp_path, scratch):
    pixels, _ = colours()
    spec, data = replace(SCRATCH, crossfit=2), split(crossfit=2)
    kept, file = fit_or_load(spec, data, CPU, tmp_path)
    assert file == tmp_path / "teachers" / f"{teacher_key(spec, data)}.safetensors"
    assert kept.digest() == scratch.digest()
    folds = torch.from_numpy(data.folds)
    assert same(kept(pixels, folds), scratch(pixels, folds))
    data.eval_batches = data.train_batches = lambda *_: pytest.fail("fitted again")
    again, same_file = fit_or_load(spec, data, CPU, tmp_path)
    assert same_file == file
    assert again.digest() == kept.digest()
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


def test_a_kept_teacher_belongs_to_config_data_and_classes():
    keys = {
        teacher_key(LITE0, split()),
        teacher_key(replace(LITE0, img_size=64), split()),
        teacher_key(replace(LITE0, seed=1), split()),
        teacher_key(LITE0, split(fingerprint="b" * 64)),
        teacher_key(LITE0, replace(split(), classes=["without_mask", "with_mask"])),
    }
    assert len(keys) == 5
    assert teacher_key(LITE0, split()) in keys


@pytest.mark.parametrize("damage", ["cut", "empty", "other tensors", "no metadata"])
def test_a_damaged_kept_teacher_is_fitted_again(tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    spec = replace(SCRATCH, name="test_resnet", epochs=1)
    teacher, file = fit_or_load(spec, split(), CPU, tmp_path)
    whole = file.read_bytes()
    if damage in ("cut", "empty"):
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors.pop("head_bias")
        save_file(tensors, file, metadata=metadata if damage == "other tensors" else None)
    again, same_file = fit_or_load(spec, split(), CPU, tmp_path)
    assert same_file == file
    assert again.digest() == teacher.digest()
    assert fit_or_load(spec, split(), CPU, tmp_path)[0].digest() == teacher.digest()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    spec = replace(SCRATCH, name="test_resnet", crossfit=2)
    return fit_or_load(spec, split(crossfit=2), CPU, tmp_path_factory.mktemp("cache"))[1]


@pytest.mark.parametrize("classes", [["without_mask", "with_mask"], ["with_mask", "other"], ["a", "b", "c"]])
def test_another_class_order_is_refused(kept, classes):
    sentence = r"knows the classes \['with_mask', 'without_mask'\] and the data has .*in this order: fit a teacher"
    with pytest.raises(UserError, match=sentence):
        load_teacher(kept, classes)
    spec = replace(SCRATCH, name="test_resnet", crossfit=2, checkpoint=str(kept))
    with pytest.raises(UserError, match=sentence):
        fit_or_load(spec, replace(split(crossfit=2), classes=classes), CPU, kept.parent)
    with pytest.raises(UserError, match=sentence):
        spec.dims(classes)


def test_a_teacher_file_can_be_named(kept):
    spec = replace(LITE0, crossfit=2, checkpoint=str(kept))
    teacher, file = fit_or_load(spec, split(crossfit=2), CPU, kept.parent)
    assert file == kept
    assert teacher.img_size == 32
    assert spec.dims(["with_mask", "without_mask"]) == (teacher.map_channels, teacher.pooled_dim)


def test_a_named_file_with_other_folds_is_refused(kept):
    spec = replace(LITE0, crossfit=1, checkpoint=str(kept))
    with pytest.raises(
        UserError, match=r"has 2 cross-fitting fold\(s\) and teacher.crossfit=1: set teacher.crossfit=2"
    ):
        fit_or_load(spec, split(), CPU, kept.parent)
    other = replace(split(crossfit=2), fingerprint="b" * 64)
    with pytest.raises(UserError, match="was cross-fitted on other data"):
        fit_or_load(replace(spec, crossfit=2), other, CPU, kept.parent)


def test_a_named_file_that_is_missing_or_no_teacher(tmp_path):
    with pytest.raises(UserError, match=r"teacher.checkpoint=/nowhere/a does not exist"):
        fit_or_load(replace(LITE0, checkpoint="/nowhere/a"), split(), CPU, tmp_path)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"a.safetensors is no readable teacher file"):
        fit_or_load(replace(LITE0, checkpoint=str(file)), split(), CPU, tmp_path)


# -- what cannot teach ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "resnet_nonsense"}, "teacher.name=resnet_nonsense is no timm model"),
        ({"name": "resnet10t"}, "teacher.weights=package holds tf_efficientnet_lite0 only: resnet10t needs"),
    ],
)
def test_names_that_cannot_teach(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(replace(LITE0, **changes), split(), CPU)
