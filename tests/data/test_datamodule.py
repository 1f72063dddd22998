import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import albumentations
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from facemask.data.datamodule import EpochSampler, FolderData, ImageData, SyntheticData, TrainViews
from facemask.data.images import centre_crop, decode, resize_short
from facemask.data.splits import flip_labels
from facemask.data.transforms import Augmentation
from facemask.errors import UserError


def png(seed: int, width: int = 20, height: int = 18) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, per_class: int = 50, classes: str = "ab") -> Path:
    for number, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            (root / label / f"{i:03}.png").write_bytes(png(1000 * number + i))
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 50 pictures: 70 train, 10 val, 20 test."""
    return write_tree(tmp_path_factory.mktemp("tree") / "faces")


def real(name: str) -> Path:
    """A folder of real pictures beside FACEMASK_DATA."""
    data = os.environ.get("FACEMASK_DATA")
    if not data:
        pytest.skip("FACEMASK_DATA is not set")
    return Path(data).parent / name


def augmented(seed: int = 0, mixed: bool = True) -> Augmentation:
    crop = albumentations.RandomResizedCrop(size=(16, 16), scale=(0.3, 1.0))
    transform = albumentations.Compose([crop, albumentations.HorizontalFlip(p=0.5)])
    return Augmentation(seed, 16, transform, mix_prob=0.5 * mixed, mixup_alpha=0.8, cutmix_alpha=1.0)


def folder(root: Path, needed: tuple[str, ...] = (), crossfit: int = 1, **options: Any) -> FolderData:
    options = {"augmentation": augmented(), "batch_size": 16, "cache_dir": root.parent / "cache", **options}
    data = FolderData(root=str(root), img_size=16, **options)
    data.crossfit = crossfit
    data.prepare(needed)
    return data


def batches(loader: DataLoader, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def as_rank(data: ImageData, rank: int, world_size: int) -> ImageData:
    data._rank = lambda: (rank, world_size)  # type: ignore[method-assign]
    return data


# -- training views -----------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_number_of_workers(tree: Path) -> None:
    per_workers = [
        [batches(folder(tree, num_workers=workers).train_dataloader(), epoch) for epoch in (0, 1)]
        for workers in (0, 1, 2)
    ]
    for epochs in per_workers:
        assert [len(epoch) for epoch in epochs] == [4, 4]  # 70 pictures in batches of 16, the rest dropped
        assert epochs[0][0]["pixels"].shape == (16, 3, 16, 16)
        assert epochs[0][0]["pixels"].dtype == torch.uint8
        for epoch, first in zip(epochs, per_workers[0], strict=True):
            assert all(same(one, two) for one, two in zip(epoch, first, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch_of_one_rank(tree: Path, world_size: int) -> None:
    for epoch in (0, 3):
        whole = batches(folder(tree).train_dataloader(), epoch)
        parts = [
            batches(as_rank(folder(tree), rank, world_size).train_dataloader(), epoch) for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {len(whole)}
        for k, batch in enumerate(whole):
            # Rank r has every world_size-th picture: put back together they are the batch, bit for bit.
            woven = {
                key: torch.stack([part[k][key] for part in parts], dim=1).flatten(0, 1)
                for key in ("row", "pixels", "target", "epoch")
            }
            assert same(woven, batch)


def test_an_epoch_sees_every_picture_at_most_once_and_in_its_own_order(tree: Path) -> None:
    loader = folder(tree).train_dataloader()
    orders = [torch.cat([batch["row"] for batch in batches(loader, epoch)]).tolist() for epoch in (0, 1, 0)]
    assert all(len(order) == len(set(order)) == 64 for order in orders)
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    other = folder(tree, augmentation=augmented(seed=1)).train_dataloader()
    assert torch.cat([batch["row"] for batch in batches(other)]).tolist() != orders[0]


def test_views_differ_between_epochs(tree: Path) -> None:
    views = folder(tree, augmentation=augmented(mixed=False)).train_views()
    equal = [torch.equal(views[0, row]["pixels"], views[1, row]["pixels"]) for row in range(70)]
    assert sum(equal) == 0


def test_a_set_smaller_than_one_batch_is_used_whole(tree: Path) -> None:
    (only,) = batches(folder(tree, batch_size=128).train_dataloader())
    assert sorted(only["row"].tolist()) == list(range(70))


def test_batch_size_must_be_a_multiple_of_the_ranks(tree: Path) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=15 is shared by 2 processes: choose a multiple of 2"):
        as_rank(folder(tree, batch_size=15), 0, 2).train_dataloader()


def test_mixed_targets_and_pixels(tree: Path) -> None:
    data = folder(tree)
    views, labels = data.train_views(), data.labels(data.rows("train"))
    kinds: Counter[str] = Counter()
    partners = set()
    for row in range(70):
        item, mix = views[2, row], views.mix(row, 2)
        own = views.view(row, 2).transpose(2, 0, 1).astype(float)
        expected = np.zeros(2)
        if mix is None:
            kinds["plain"] += 1
            expected[labels[row]] = 1
            pixels = own
        else:
            partners.add(mix.partner)
            expected[labels[row]] += mix.lam
            expected[labels[mix.partner]] += 1 - mix.lam
            other = views.view(mix.partner, 2).transpose(2, 0, 1)
            if mix.box is None:
                kinds["mixup"] += 1
                pixels = mix.lam * own + (1 - mix.lam) * other
            else:
                kinds["cutmix"] += 1
                top, bottom, left, right = mix.box
                pixels = own.copy()
                pixels[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        assert item["row"] == row
        np.testing.assert_allclose(item["target"].numpy(), expected, atol=1e-6)
        assert np.abs(item["pixels"].numpy() - pixels).max() <= 0.501
    assert min(kinds["plain"], kinds["mixup"], kinds["cutmix"]) >= 5
    assert len({row // 16 for row in partners}) == 5  # from the whole split, wherever they lie in it


def test_crossfit_partners_come_from_the_same_fold(tree: Path) -> None:
    data = folder(tree, crossfit=3, augmentation=Augmentation(0, 16, mix_prob=1, mixup_alpha=1.0))
    folds, views = data.crossfit_folds(), data.train_views()
    assert all(22 <= count <= 25 for count in Counter(folds.tolist()).values())
    assert len(set(folds)) == 3
    for row in range(70):
        mix = views.mix(row, 0)
        assert mix is not None
        assert folds[mix.partner] == folds[row]
    assert folder(tree).crossfit_folds().tolist() == [0] * 70


@pytest.mark.parametrize("rate", [0.2, 0.33])
def test_label_noise_flips_training_targets_and_nothing_else(tree: Path, rate: float) -> None:
    unmixed = augmented(mixed=False)
    plain, noisy = (folder(tree, ("test",), label_noise=noise, augmentation=unmixed) for noise in (0, rate))
    pd.testing.assert_frame_equal(plain.table, noisy.table)
    assert plain.fingerprint == noisy.fingerprint

    def targets(data: ImageData, noisy: bool) -> np.ndarray:
        views = data.train_views(noisy=noisy)
        return np.array([int(views[0, row]["target"].argmax()) for row in range(70)])

    true = targets(plain, True)
    np.testing.assert_array_equal(targets(noisy, False), true)  # what the teacher is fitted on
    changed = targets(noisy, True) != true
    assert changed.sum() == round(rate * 70)
    names = flip_labels(noisy.table, rate, 0, ["a", "b"])
    flipped = set(noisy.table["path"][names != noisy.table["label"]])
    assert {path for path, flip in zip(noisy.train_views().paths, changed, strict=True) if flip} == flipped
    for split in ("train", "val", "test"):
        labels = torch.cat([batch["label"] for batch in noisy.eval_loader(split, 8)]).numpy()
        np.testing.assert_array_equal(labels, noisy.labels(noisy.rows(split)))


def test_a_batch_makes_each_view_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tree, augmentation=Augmentation(0, 16, mix_prob=1, mixup_alpha=1.0))
    single = [data.train_views()[3, row] for row in range(70)]
    made: list[int] = []
    original = TrainViews.view

    def counted(self: TrainViews, index: int, epoch: int) -> np.ndarray:
        made.append(index)
        return original(self, index, epoch)

    monkeypatch.setattr(TrainViews, "view", counted)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
    for batch in loader:
        assert sorted(made) == sorted(batch["row"].tolist())
        made.clear()
        for pixels, target, row in zip(batch["pixels"], batch["target"], batch["row"].tolist(), strict=True):
            assert torch.equal(pixels, single[row]["pixels"])
            assert torch.equal(target, single[row]["target"])


# -- without a cache ----------------------------------------------------------------------------------------------


def test_views_are_the_same_without_a_cache(tree: Path, tmp_path: Path) -> None:
    kept, live = folder(tree, ("test",)), folder(tree, ("test",), cache="none", cache_dir=tmp_path)
    assert not (tmp_path / "pixels").exists()
    assert kept.fingerprint == live.fingerprint
    assert len(kept.pixels) == len(live.pixels) == 100
    assert all(np.array_equal(one, two) for one, two in zip(kept.pixels, live.pixels, strict=True))
    for one, two in zip(batches(kept.train_dataloader(), 1), batches(live.train_dataloader(), 1), strict=True):
        assert same(one, two)
    for one, two in zip(kept.eval_loader("test", 8), live.eval_loader("test", 8), strict=True):
        assert same(one, two)


def test_bad_pictures_are_found_without_a_cache(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces")
    cut = (root / "a" / "007.png").read_bytes()[:-200]
    (root / "a" / "007.png").write_bytes(cut)
    with pytest.raises(UserError, match=r"1 picture\(s\) cannot be used: a/007\.png \(truncated\)"):
        folder(root, ("test",), cache="none")
    data = folder(root, ("test",), cache="none", on_bad_file="skip")
    assert data.left_out == {"a/007.png": "truncated"}
    for path in data.table["path"]:
        assert data.picture(path).shape == (16, 16, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_or_vanishes_during_training_is_named(tmp_path: Path, workers: int) -> None:
    data = folder(write_tree(tmp_path / "faces"), cache="none", num_workers=workers)
    path = data.train_views().paths[5]
    file = tmp_path / "faces" / path
    file.write_bytes(png(12345))
    with pytest.raises(
        UserError, match=f"^{path} has changed since the folder was scanned: start again, so that it is scanned anew$"
    ):
        batches(data.train_dataloader())
    file.unlink()
    with pytest.raises(UserError, match=f"^{path} was there when .* cannot be read now .No such file"):
        batches(data.train_dataloader())


def test_a_file_that_changes_or_vanishes_after_the_scan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path / "faces")
    path = folder(root).train_views().paths[0]
    original = FolderData.load_table
    for change, sentence in [
        (lambda: (root / path).write_bytes(png(77)), "has changed since"),
        (lambda: (root / path).unlink(), "cannot be read now"),
    ]:

        def table(self: FolderData, change: Any = change) -> pd.DataFrame:
            scanned = original(self)
            change()
            return scanned

        monkeypatch.setattr(FolderData, "load_table", table)
        with pytest.raises(UserError, match=f"^{path} .*{sentence}"):
            folder(root, cache_dir=tmp_path / "fresh")
    assert [file for file in (tmp_path / "fresh" / "pixels").iterdir() if file.is_dir()] == []


# -- memory -------------------------------------------------------------------------------------------------------

MEMORY = """
import functools, hashlib, io, re, sys
import pandas as pd
from PIL import Image
from facemask.data.datamodule import ImageData
from facemask.data.transforms import Augmentation

class Dots(ImageData):
    def load_table(self):
        rows = []
        for i in range(int(sys.argv[1])):
            digest = hashlib.sha256(self.read(f"x_{i}.x")).hexdigest()
            rows.append((f"{'ab'[i % 2]}/a_folder_of_pictures/picture_{i}.png", "ab"[i % 2], digest, f"{digest}{i}"))
        table = pd.DataFrame(rows, columns=["path", "label", "sha256", "group"])
        return table.assign(width=8, height=8, bytes=100, format="PNG", problem="")

    def read(self, path):
        return png(int(re.search(r"_([0-9]+)[.]", path)[1]) % 256)

@functools.cache
def png(i):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (i, i, i)).save(buffer, "PNG")
    return buffer.getvalue()

mixing = Augmentation(0, 8, mix_prob=1.0, mixup_alpha=1.0)
data = Dots(augmentation=mixing, img_size=8, crop_pct=1.0, cache_dir=sys.argv[2], cache=sys.argv[3])
data.prepare()
seen = sum(len(batch["row"]) for batch in data.train_dataloader())
kilobytes = re.search(r"RssAnon:\\s+([0-9]+)", open("/proc/self/status").read())[1]
print(seen, int(kilobytes) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is told by Linux alone")
def test_anonymous_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    def megabytes(count: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count)), "decoded"]
        seen, anonymous = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(seen) > 0.68 * count
        return float(anonymous)

    assert megabytes(64_000) - megabytes(4_000) < 12  # measured: 6.3


# -- evaluation views ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 25])
def test_evaluation_covers_every_picture_exactly_once(tree: Path, world_size: int) -> None:
    data = folder(tree, ("test",))
    seen = []
    for rank in range(world_size):
        for batch in data.eval_loader("test", 4, rank, world_size):  # with 25 ranks five have nothing
            seen += [
                (p.numpy().tobytes(), int(label)) for p, label in zip(batch["pixels"], batch["label"], strict=True)
            ]
    rows = data.rows("test")
    views = [data.picture(path).transpose(2, 0, 1).tobytes() for path in data.table["path"][rows]]
    assert len(set(views)) == 20
    assert sorted(seen) == sorted(zip(views, data.labels(rows).tolist(), strict=True))


def test_evaluation_order_is_the_tables(tree: Path) -> None:
    data = folder(tree, ("test",))
    pixels = torch.cat([batch["pixels"] for batch in data.eval_loader("test", 6)])
    for view, path in zip(pixels, data.table["path"][data.rows("test")], strict=True):
        np.testing.assert_array_equal(view.numpy().transpose(1, 2, 0), data.picture(path))
    with pytest.raises(KeyError):
        data.picture("a/nowhere.png")


def timm_view(file: bytes, img_size: int, crop_pct: float) -> np.ndarray:
    from timm.data import create_transform

    transform = create_transform(img_size, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
    return np.asarray(transform(Image.fromarray(decode(file)))).transpose(1, 2, 0)


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (101, 67), (33, 40), (640, 480), (73, 73), (20, 300)])
@pytest.mark.parametrize(("img_size", "crop_pct"), [(64, 0.875), (96, 0.875), (48, 0.9), (32, 1.0)])
def test_the_evaluation_view_is_timms(tmp_path: Path, size: tuple[int, int], img_size: int, crop_pct: float) -> None:
    for label in "ab":
        (tmp_path / "faces" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "faces" / label / f"{i}.png").write_bytes(png(i + 9 * (label == "b"), *size))
    data = FolderData(
        root=str(tmp_path / "faces"),
        augmentation=Augmentation(0, img_size),
        img_size=img_size,
        crop_pct=crop_pct,
        cache_dir=tmp_path / "cache",
        split_ratios=(0.34, 0.33, 0.33),
    )
    data.prepare(["test"])
    for path in data.table["path"]:
        view = data.picture(path)
        expected = timm_view((tmp_path / "faces" / path).read_bytes(), img_size, crop_pct)
        assert view.shape == expected.shape == (img_size, img_size, 3)
        assert np.abs(view.astype(int) - expected.astype(int)).max() <= 1


def test_the_aspect_is_kept(tmp_path: Path) -> None:
    """A circle stays a circle in upright and lying pictures (squashing would show the size of the original)."""
    for label, (width, height) in {"a": (300, 150), "b": (150, 300)}.items():
        (tmp_path / "faces" / label).mkdir(parents=True)
        rows, columns = np.mgrid[:height, :width]
        for i in range(10):
            inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (40 + i) ** 2
            Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(tmp_path / "faces" / label / f"{i}.png")
    # circles are near-duplicates of each other, so the split is given
    rows = [
        f"{label}/{i}.png,{label},{split}"
        for label in "ab"
        for i, split in enumerate(["train", "val"] * 4 + ["test"] * 2)
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,label,split", *rows]))
    data = FolderData(
        root=str(tmp_path / "faces"),
        split=str(tmp_path / "split.csv"),
        augmentation=Augmentation(0, 64),
        img_size=64,
        cache_dir=tmp_path / "cache",
    )
    data.prepare(["test"])
    for path in data.table["path"]:
        bright = data.picture(path)[..., 0] > 127
        height, width = np.ptp(np.argwhere(bright), axis=0) + 1
        assert abs(height - width) <= 1
        assert height == pytest.approx(2 * (40 + int(path[2:-4])) * 73 / 150, abs=1.5)


def test_real_pictures_are_seen_as_timm_sees_them(tmp_path: Path) -> None:
    root = real("facemask_tiny")
    data = FolderData(root=str(root), augmentation=Augmentation(0, 64), img_size=64, cache_dir=tmp_path)
    data.prepare(["test"])
    assert len(data.table) == 24
    for path in data.table["path"]:
        expected = timm_view((root / path).read_bytes(), 64, 0.875)
        assert np.abs(data.picture(path).astype(int) - expected.astype(int)).max() <= 1


# -- splits -------------------------------------------------------------------------------------------------------


def test_splits_are_stratified_and_seeded(tree: Path) -> None:
    one, again, other = folder(tree), folder(tree), folder(tree, split_seed=1)
    counts = one.table.groupby(["split", "label"]).size().to_dict()
    assert counts == {(s, c): n for s, n in {"train": 35, "val": 5, "test": 10}.items() for c in "ab"}
    pd.testing.assert_frame_equal(one.table, again.table)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.classes == ["a", "b"]


def test_fractions_are_nested_and_leave_val_and_test_alone(tree: Path) -> None:
    tables = [folder(tree, fraction=fraction).table for fraction in (0.1, 0.25, 0.5, 1.0)]
    parts = [set(table["path"][table["split"] == "train"]) for table in tables]
    assert [len(part) for part in parts] == [8, 18, 36, 70]
    assert parts[0] < parts[1] < parts[2] < parts[3]
    rest = [set(table["path"][table["split"] != "train"]) for table in tables]
    assert all(part == rest[0] for part in rest)
    assert len(rest[0]) == 30


def test_folds_test_every_picture_once(tree: Path) -> None:
    folds = [folder(tree, ("test",), fold=i, folds=4) for i in range(4)]
    tested = [path for data in folds for path in data.table["path"][data.rows("test")]]
    assert len(tested) == len(set(tested)) == 100
    for data in folds:  # of 50 pictures of a class 12 or 13, and of the other 38 a tenth
        counts = data.table.groupby(["split", "label"]).size()
        assert counts["test"].between(12, 13).all()
        assert counts["val"].tolist() == [4, 4]


def test_a_split_file_is_followed(tree: Path, tmp_path: Path) -> None:
    lines = [f"{c}/{i:03}.png,{c},{'train' if i < 4 else 'val' if i < 6 else 'test'}" for c in "ab" for i in range(9)]
    file = tmp_path / "split.csv"
    file.write_text("\n".join(["path,label,split", *lines]) + "\n")
    data = folder(tree, ("test",), split=str(file))
    assert [f"{r.path},{r.label},{r.split}" for r in data.table.itertuples()] == sorted(lines)
    assert {split: len(data.rows(split)) for split in ("train", "val", "test")} == {"train": 8, "val": 4, "test": 6}


def test_pictures_of_a_split_that_is_not_needed_are_not_in_the_cache(tree: Path) -> None:
    data = folder(tree)
    assert len(data.pixels) == 80
    assert (data.cache_rows[data.rows("test")] == -1).all()
    with pytest.raises(ValueError, match="pictures of test are not decoded"):
        data.eval_loader("test", 4)
    data.prepare(["test"])
    assert len(data.pixels) == 100
    assert (data.cache_rows[data.rows("test")] >= 0).all()


def test_splits_wanted_later_are_decoded_then(tree: Path) -> None:
    data = folder(tree)
    before = data.fingerprint
    data.prepare(["test"])
    assert data.fingerprint == before
    assert len(next(iter(data.eval_loader("test", 99)))["label"]) == 20


# -- bad pictures -------------------------------------------------------------------------------------------------


def damage(root: Path) -> dict[str, str]:
    (root / "a" / "000.png").write_bytes(b"")
    (root / "a" / "001.png").write_bytes(b"no picture")
    (root / "b" / "002.png").write_bytes((root / "b" / "002.png").read_bytes()[:700])
    return {
        "a/000.png": "empty file",
        "a/001.png": "not a JPEG, PNG, WEBP or GIF picture",
        "b/002.png": "truncated",
    }


def test_bad_pictures_stop_by_name(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", 20)
    bad = damage(root)
    with pytest.raises(UserError) as caught:
        folder(root, ("test",))
    named = "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items()))
    assert str(caught.value) == (
        f"3 picture(s) cannot be used: {named}; mend or remove them, or leave them out with data.on_bad_file=skip"
    )


def test_bad_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", 20)
    bad = damage(root)
    data = folder(root, ("test",), on_bad_file="skip")
    assert data.left_out == bad
    assert len(data.table) == 37
    assert not set(data.table["path"]) & set(bad)
    for split in ("train", "val", "test"):
        for batch in data.eval_loader(split, 8):
            assert batch["pixels"].shape[1:] == (3, 16, 16)
    for path in data.table["path"]:  # rows did not shift
        expected = resize_short(decode((root / path).read_bytes()), data.working_size)
        np.testing.assert_array_equal(data.picture(path), centre_crop(expected, 16))


def test_a_class_without_usable_pictures_is_not_dropped_silently(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", 20, "abc")
    for file in (root / "c").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no usable picture of c is left in train: add pictures, or remove"):
        folder(root, on_bad_file="skip")


def test_an_empty_split_is_said(tree: Path) -> None:
    with pytest.raises(UserError, match="no picture is left in test: add pictures"):
        folder(tree, ("test",), split_ratios=(0.8, 0.2, 0.0))
    with pytest.raises(UserError, match="no picture is left in val: add pictures"):
        folder(tree, split_ratios=(0.8, 0.0, 0.2))
    assert len(folder(tree, split_ratios=(0.8, 0.2, 0.0)).rows("val")) == 20


def test_too_many_pixels_are_refused_by_name(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "faces", 20)
    (root / "a" / "large.png").write_bytes(png(1, 41, 10))
    with pytest.raises(UserError, match=r"a/large\.png \(41x10 is 410 pixels, more than data\.max_pixels=409 allows\)"):
        folder(root, ("test",), max_pixels=409)
    assert len(folder(root, ("test",), max_pixels=410).table) == 41


def test_hand_made_bad_files(tmp_path: Path) -> None:
    given = real("facemask_bad_inputs")
    kinds = pd.read_csv(given / "manifest.csv").set_index("path")["kind"]
    root = write_tree(tmp_path / "faces", 20)
    for path in kinds.index:
        (root / "a" / path).write_bytes((given / path).read_bytes())
    data = folder(root, ("test",), on_bad_file="skip")
    # What is neither plainly decodable has 144 megapixels or is garbled in the middle.
    assert set(data.left_out) == {f"a/{path}" for path in kinds.index[kinds != "decodable"]}
    for split in ("train", "val", "test"):
        for batch in data.eval_loader(split, 8):
            assert batch["pixels"].shape[1:] == (3, 16, 16)
    with pytest.raises(UserError) as caught:
        folder(root, ("test",))
    assert "a/zero_byte.jpg (empty file)" in str(caught.value)


# -- in Lightning -------------------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Trains one number and keeps which pictures came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[torch.Tensor]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch["pixels"])
        return self.weight * batch["pixels"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.validated += batch["label"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(data: ImageData, **options: Any) -> Recorder:
    recorder = Recorder()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, enable_model_summary=False, **silent, **options
    )
    trainer.fit(recorder, data)
    return recorder


def test_a_plain_trainer_tells_the_sampler_its_epoch(tree: Path) -> None:
    data = FolderData(
        root=str(tree), img_size=16, augmentation=augmented(), batch_size=16, cache_dir=tree.parent / "cache"
    )  # not prepared: Lightning does
    recorder = fit(data)
    assert recorder.validated == data.labels(data.rows("val")).tolist() * 2
    for epoch in (0, 1):
        expected = batches(folder(tree).train_dataloader(), epoch)
        assert len(recorder.epochs[epoch]) == 4
        for pixels, batch in zip(recorder.epochs[epoch], expected, strict=True):
            assert torch.equal(pixels, batch["pixels"])


def test_overfitting_repeats_one_shuffled_batch(tree: Path) -> None:
    recorder = fit(folder(tree), overfit_batches=1)
    (first,), (second,) = recorder.epochs[0], recorder.epochs[1]
    assert torch.equal(first, second)
    assert torch.equal(first, batches(folder(tree).train_dataloader(), 0)[0]["pixels"])
    resumed = folder(tree)
    resumed.resume_at = (3, 1)  # as a resumed run sets it
    (again,) = fit(resumed, overfit_batches=1).epochs[0]
    assert torch.equal(first, again)


# -- drawn faces --------------------------------------------------------------------------------------------------


def test_synthetic_faces_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def data(**options: Any) -> SyntheticData:
        made = SyntheticData(
            augmentation=Augmentation(0, 32), img_size=32, cache_dir=tmp_path, **{"num_images": 40, **options}
        )
        made.prepare(["test"])
        return made

    one = data()
    assert len(one.table) == 40
    assert one.classes == ["with_mask", "without_mask"]
    assert one.drawn
    monkeypatch.setattr("facemask.data.synthetic.write_folder", lambda *_: pytest.fail("drawn again"))
    assert data().fingerprint == one.fingerprint
    monkeypatch.undo()
    assert data(draw_seed=1).fingerprint != one.fingerprint
    assert len(data(states=5, num_images=50).classes) == 5


def test_an_interrupted_drawing_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, *_: Any) -> None:
        root.mkdir(parents=True)
        (root / "half.png").write_bytes(b"")
        raise KeyboardInterrupt

    made = SyntheticData(augmentation=Augmentation(0, 32), img_size=32, cache_dir=tmp_path, num_images=40)
    with monkeypatch.context() as patch:
        patch.setattr("facemask.data.synthetic.write_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.prepare()
    assert not [path for path in (tmp_path / "synthetic").iterdir() if path.is_dir()]
    made.prepare()
    assert len(made.table) == 40
