import hashlib
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from facemask.data.splits import (
    assign_folds,
    count,
    fingerprint,
    flip_labels,
    fold_split,
    make_split,
    parse_fold,
    read_split,
    split_table,
    take_fraction,
    write_split,
)
from facemask.errors import UserError


def table_of(sizes: dict[str, list[int]]) -> pd.DataFrame:
    """Label -> sizes of its groups; groups are named by label and number."""
    rows = [
        (f"{label}/{g:04d}_{i}.png", label, f"{label}{g}")
        for label, groups in sizes.items()
        for g, size in enumerate(groups)
        for i in range(size)
    ]
    table = pd.DataFrame(rows, columns=["path", "label", "group"])
    return table.assign(sha256=[hashlib.sha256(path.encode()).hexdigest() for path in table["path"]])


def by_path(table: pd.DataFrame, series: pd.Series) -> dict[str, object]:
    return dict(zip(table["path"], series.loc[table.index], strict=True))


def no_group_is_torn(table: pd.DataFrame, series: pd.Series) -> bool:
    return bool((series.groupby(table["group"]).nunique() == 1).all())


BIG = table_of({"a": [1] * 500 + [2] * 50 + [24, 17, 9], "b": [1] * 300 + [3] * 20 + [11], "c": [1] * 100})


def test_make_split_exact_counts_for_single_pictures() -> None:
    table = table_of({"a": [1] * 100, "b": [1] * 50})
    counts = pd.crosstab(table["label"], make_split(table, seed=0))
    assert counts[["train", "val", "test"]].to_numpy().tolist() == [[70, 10, 20], [35, 5, 10]]
    counts = pd.crosstab(table["label"], make_split(table, 0, (0.5, 0.25, 0.25)))
    assert counts.loc["a", ["train", "val", "test"]].tolist() == [50, 25, 25]
    assert set(make_split(table, 0, (0.8, 0.0, 0.2))) == {"train", "test"}


def test_make_split_with_groups() -> None:
    for seed in range(3):
        split = make_split(BIG, seed)
        assert split.name == "split"
        assert split.index.equals(BIG.index)
        assert no_group_is_torn(BIG, split)
        counts = pd.crosstab(BIG["label"], split)
        for name, ratio in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
            missed = counts[name].to_numpy() - ratio * counts.sum(axis=1).to_numpy()
            assert abs(missed).max() <= 1.5


def test_make_split_depends_on_seed_and_not_on_row_order() -> None:
    split = by_path(BIG, make_split(BIG, 0))
    shuffled = BIG.sample(frac=1, random_state=3)
    assert by_path(shuffled, make_split(shuffled, 0)) == split
    renumbered = shuffled.reset_index(drop=True)
    assert by_path(renumbered, make_split(renumbered, 0)) == split
    other = by_path(BIG, make_split(BIG, 1))
    changed = sum(split[path] != other[path] for path in split) / len(split)
    assert 0.3 < changed < 0.6  # independent draws of .7/.1/.2 differ in 1 - .49 - .01 - .04 = 46 %


def test_make_split_is_pinned() -> None:
    table = table_of({"a": [1] * 10, "b": [2] * 5})
    split = by_path(table, make_split(table, 7))
    assert sorted(path for path, name in split.items() if name == "test") == [
        "a/0006_0.png",
        "a/0007_0.png",
        "b/0001_0.png",
        "b/0001_1.png",
    ]
    assert sorted(path for path, name in split.items() if name == "val") == [
        "a/0009_0.png",
        "b/0003_0.png",
        "b/0003_1.png",
    ]


@pytest.mark.parametrize("sizes", [[1] * 12, [1] * 3, [10, 1, 1], [1] * 5])
def test_small_classes_are_everywhere(sizes: list[int]) -> None:
    table = table_of({"a": sizes, "b": [1] * 12})
    for seed in range(5):
        counts = pd.crosstab(table["label"], make_split(table, seed))
        assert (counts.to_numpy() >= 1).all()
        assert counts.shape == (2, 3)
        assert counts.loc["a", "train"] == counts.loc["a"].max()


def test_groups_with_two_labels() -> None:
    table = table_of({"a": [1] * 40, "b": [1] * 40})
    table.loc[:9, "group"] = table.loc[40:49, "group"].to_numpy()
    split = make_split(table, 0)
    assert no_group_is_torn(table, split)
    counts = pd.crosstab(table["label"], split)
    assert counts[["train", "val", "test"]].to_numpy().tolist() == [[28, 4, 8], [28, 4, 8]]


def test_too_small_class_is_named() -> None:
    table = table_of({"a": [1] * 20, "rare": [4, 1]})
    with pytest.raises(UserError) as caught:
        make_split(table, 0)
    assert str(caught.value) == (
        "class 'rare' is too small: its 5 pictures form 2 independent groups (copies count once), too few to "
        "give each of 3 parts (train, val, test) one; add pictures or remove its folder"
    )
    assert make_split(table, 0, (0.8, 0.0, 0.2)).nunique() == 2


@pytest.mark.parametrize("ratios", [(0.7, 0.1, 0.1), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_impossible_ratios(ratios: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="must be three shares"):
        make_split(BIG, 0, ratios)


def test_folds() -> None:
    folds = assign_folds(BIG, 5, 0)
    assert folds.dtype == "int64"
    assert set(folds) == {0, 1, 2, 3, 4}
    assert no_group_is_torn(BIG, folds)
    counts = pd.crosstab(BIG["label"], folds)
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1
    shuffled = BIG.sample(frac=1, random_state=1)
    assert by_path(shuffled, assign_folds(shuffled, 5, 0)) == by_path(BIG, folds)
    with pytest.raises(UserError, match=r"^data.folds=1 must be 2 or more$"):
        assign_folds(BIG, 1, 0)
    with pytest.raises(UserError, match=r"^class 'b' is too small: its 4 pictures form 4 independent groups"):
        assign_folds(table_of({"a": [1] * 9, "b": [1] * 4}), 5, 0)


def test_fold_split() -> None:
    folds = assign_folds(BIG, 5, 0)
    for i in range(5):
        split = fold_split(BIG, i, 5, 0, val_ratio=0.125)
        assert ((split == "test") == (folds == i)).all()
        assert no_group_is_torn(BIG, split)
        share = split.value_counts(normalize=True)
        assert abs(share["val"] - 0.1) < 0.005
        assert abs(share["train"] - 0.7) < 0.005
        assert pd.crosstab(BIG["label"], split).to_numpy().min() >= 1
    with pytest.raises(UserError, match=r"^data.fold=5 must be from 0 to 4 with data.folds=5$"):
        fold_split(BIG, 5, 5, 0)
    with pytest.raises(UserError, match=r"^data.val_ratio=0 must be between 0 and 1$"):
        fold_split(BIG, 0, 5, 0, val_ratio=0)


def test_take_fraction_is_nested_stratified_and_train_only() -> None:
    table = BIG.assign(split=make_split(BIG, 0))
    train = table[table["split"] == "train"]
    kept = {f: take_fraction(table, f, seed=0) for f in (0.01, 0.1, 0.25, 0.5, 1.0)}
    for small, large in combinations(kept, 2):
        assert set(kept[small]["path"]) < set(kept[large]["path"])
    assert kept[1.0].equals(table)
    for fraction, part in kept.items():
        assert len(part[part["split"] != "train"]) == len(table) - len(train)
        mine = part[part["split"] == "train"]
        for label, total in train["label"].value_counts().items():
            largest = train[train["label"] == label]["group"].value_counts().max()
            assert abs((mine["label"] == label).sum() - fraction * total) <= max(1, largest / 2)
        assert train[train["group"].isin(set(mine["group"]))].equals(mine)
    shuffled = table.sample(frac=1, random_state=0)
    assert set(take_fraction(shuffled, 0.25, 0)["path"]) == set(kept[0.25]["path"])
    assert set(take_fraction(table, 0.25, 1)["path"]) != set(kept[0.25]["path"])
    for wrong in (0, 1.5):
        with pytest.raises(UserError, match=f"^data.fraction={wrong} must be above 0 and at most 1$"):
            take_fraction(table, wrong, 0)


def test_take_fraction_exact_counts() -> None:
    table = table_of({"a": [1] * 200, "b": [1] * 40}).assign(split="train")
    assert take_fraction(table, 0.1, 0)["label"].value_counts().to_dict() == {"a": 20, "b": 4}
    assert take_fraction(table, 0.001, 0)["label"].value_counts().to_dict() == {"a": 1, "b": 1}


def test_flip_labels() -> None:
    table = BIG.assign(split=make_split(BIG, 0))
    is_train = table["split"] == "train"
    classes = ["a", "b", "c"]
    flipped = {rate: flip_labels(table, rate, 0, classes) for rate in (0.0, 0.1, 0.2, 1.0)}
    for rate, labels in flipped.items():
        changed = labels != table["label"]
        assert changed.sum() == round(rate * is_train.sum())
        assert not changed[~is_train].any()
        assert set(labels) == set(classes)
    assert flipped[0.0].equals(table["label"])
    assert ((flipped[0.1] != table["label"]) <= (flipped[0.2] != table["label"])).all()
    was_a = is_train & (table["label"] == "a")
    assert abs((flipped[1.0][was_a] == "b").mean() - 0.5) < 0.08  # uniform over the other two
    shuffled = table.sample(frac=1, random_state=5)
    assert by_path(shuffled, flip_labels(shuffled, 0.2, 0, classes)) == by_path(table, flipped[0.2])
    assert not flip_labels(table, 0.2, 1, classes).equals(flipped[0.2])
    with pytest.raises(UserError, match=r"^data.label_noise=-0.1 must be from 0 to 1$"):
        flip_labels(table, -0.1, 0, classes)


def test_fingerprint_bytes() -> None:
    table = pd.DataFrame(
        {
            "path": ["b/ü.png", "a/1.png"],
            "label": ["b", "a"],
            "split": ["val", "train"],
            "sha256": ["22", "11"],
        }
    )
    rows = ["a/1.png", "a", "train", "11", "b/ü.png", "b", "val", "22"]
    expected = hashlib.sha256(b"".join(value.encode() + bytes(1) for value in rows)).hexdigest()
    assert fingerprint(table) == fingerprint(table.iloc[::-1]) == expected
    assert fingerprint(table.assign(width=3)) == expected
    for column in table:
        changed = table.copy()
        changed[column] = [f"{table[column][0]}x", table[column][1]]
        assert fingerprint(changed) != expected, column


def test_write_and_read_back(tmp_path: Path) -> None:
    table = BIG.assign(split=make_split(BIG, 0)).sample(frac=1, random_state=0)
    file = tmp_path / "new" / "split.csv"
    write_split(file, table)
    lines = file.read_text().splitlines()
    assert lines[0] == "path,label,split"
    assert len(lines) == len(table) + 1
    assert lines[1:] == sorted(lines[1:])
    split, left_out = read_split(file, table)
    assert left_out == 0
    assert split.equals(table["split"].loc[split.index])
    assert split.index.equals(table.index)
    assert [entry.name for entry in file.parent.iterdir()] == ["split.csv"]
    before = file.read_bytes()
    write_split(file, table.iloc[::-1])
    assert file.read_bytes() == before


def test_another_split_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    write_split(file, BIG.assign(split=make_split(BIG, 0)))
    before = file.read_bytes()
    write_split(file, BIG.assign(split=make_split(BIG, 0)))
    other = BIG.assign(split=make_split(BIG, 1))
    with pytest.raises(UserError, match=r"split.csv holds another split or other data; choose another file, or"):
        write_split(file, other)
    assert file.read_bytes() == before
    write_split(file, other, force=True)
    assert read_split(file, BIG)[0].equals(other["split"])


def test_split_table_is_what_its_parts_are() -> None:
    assert split_table(BIG, 3)["split"].equals(make_split(BIG, 3))
    assert split_table(BIG, 3, (0.5, 0.25, 0.25))["split"].equals(make_split(BIG, 3, (0.5, 0.25, 0.25)))
    given = BIG.assign(split="train")
    assert split_table(given, 3).equals(given)
    assert split_table(given, 3, fold=1, folds=4)["split"].equals(fold_split(BIG, 1, 4, 3))
    part = split_table(BIG, 3, fraction=0.25)
    assert part.equals(take_fraction(BIG.assign(split=make_split(BIG, 3)), 0.25, 3))
    with pytest.raises(UserError, match=r"^data.fraction=0 must be above 0"):
        split_table(BIG, 3, fraction=0)


def test_parse_fold() -> None:
    assert parse_fold("2/5") == (2, 5)
    for wrong in ("2", "2/", "-1/5", "a/b", "1/5/2"):
        with pytest.raises(UserError, match=f"^fold '{wrong}' must be I/K, such as 0/5 for the first of five folds$"):
            parse_fold(wrong)


def test_count() -> None:
    table = pd.DataFrame({"label": ["all", "b", "b"], "split": ["train", "train", "test"]})
    assert count(table).to_dict("index") == {
        "all": {"train": 1, "val": 0, "test": 0},
        "b": {"train": 1, "val": 0, "test": 1},
    }


def test_odd_names_come_back(tmp_path: Path) -> None:
    names = ["NA/1,2.png", 'NA/"q".png', "null/ü\n3.png", "null/4 .png"]
    table = pd.DataFrame({"path": names, "label": ["NA", "NA", "null", "null"], "split": ["train", "val"] * 2})
    write_split(tmp_path / "s.csv", table)
    assert read_split(tmp_path / "s.csv", table)[0].tolist() == ["train", "val"] * 2
    numbers = table.assign(path=["007/1.png", "007/2.png", "8/3.png", "8/4.png"], label=["007", "007", "8", "8"])
    write_split(tmp_path / "n.csv", numbers)
    assert read_split(tmp_path / "n.csv", numbers)[0].tolist() == ["train", "val"] * 2


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = BIG.assign(split="train")
    file = tmp_path / "split.csv"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"split.csv cannot be written .No space left on device.; choose another place"):
        write_split(file, table, force=True)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["split.csv"]


TABLE = table_of({"a": [1] * 4, "b": [1] * 4})
GOOD = [
    ("a/0000_0.png", "a", "train"),
    ("a/0001_0.png", "a", "val"),
    ("b/0000_0.png", "b", "train"),
    ("b/0001_0.png", "b", "test"),
]


def written(folder: Path, rows: Sequence[tuple[str, ...]], header: str = "path,label,split") -> Path:
    file = folder / "s.csv"
    file.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return file


def test_read_split_leaves_out_what_is_not_named(tmp_path: Path) -> None:
    split, left_out = read_split(written(tmp_path, GOOD), TABLE)
    assert left_out == 4
    joined = TABLE.iloc[::-1].join(split, how="inner")
    assert sorted(zip(joined["path"], joined["label"], joined["split"], strict=True)) == GOOD


def test_read_split_needs_only_what_is_asked_for(tmp_path: Path) -> None:
    rows = [row for row in GOOD if row[2] == "train"]
    with pytest.raises(UserError, match=r"s.csv has no val picture; add some$"):
        read_split(written(tmp_path, rows), TABLE)
    with pytest.raises(UserError, match=r"s.csv has no val and no test picture; add some$"):
        read_split(written(tmp_path, rows), TABLE, need=("test", "val"))
    assert len(read_split(written(tmp_path, rows), TABLE, need=("train",))[0]) == 2


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [*GOOD, *((f"a/no{i}.png", "a", "val") for i in range(4))],
            "names 4 pictures not in the data folder (a/no0.png, a/no1.png, a/no2.png, ...); mend the paths",
        ),
        ([*GOOD, ("a/no.png", "a", "val")], "names 1 pictures not in the data folder (a/no.png); mend"),
        ([*GOOD, ("a/0002_0.png", "a", "dev")], "has the unknown split(s) 'dev'; use train, val or test"),
        ([*GOOD, ("a/0002_0.png", "a")], "has the unknown split(s) ''; use train, val or test"),
        (
            [*GOOD, ("a/0002_0.png", "b", "val")],
            "gives 1 pictures another label than their folder (first: a/0002_0.png as 'b'); mend the labels",
        ),
        ([*GOOD, ("a/0000_0.png", "a", "val")], "names 1 pictures twice (a/0000_0.png); keep one line each"),
        (GOOD[:2], "has no train picture of the class(es) b; add some, or remove the class's folder"),
        ([*GOOD[:2], GOOD[3]], "has no train picture of the class(es) b; add some"),
    ],
)
def test_read_split_errors(tmp_path: Path, rows: list[tuple[str, ...]], sentence: str) -> None:
    file = written(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        read_split(file, TABLE)
    assert str(caught.value).startswith(f"data.split={file} {sentence}")


def test_read_split_of_no_csv(tmp_path: Path) -> None:
    absent = tmp_path / "absent.csv"
    with pytest.raises(UserError, match=r"absent.csv does not exist; give a CSV file, or leave data.split out$"):
        read_split(absent, TABLE)
    with pytest.raises(UserError, match=r"lacks the column.s. label, split; it needs path,label,split$"):
        read_split(written(tmp_path, [], header="path,class"), TABLE)
    (tmp_path / "s.csv").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read as CSV .No columns to parse from file.; give another file$"):
        read_split(tmp_path / "s.csv", TABLE)
    (tmp_path / "s.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_split(tmp_path / "s.csv", TABLE)
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_split(tmp_path, TABLE)


def test_real_groups() -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    table = pd.read_csv(root / "manifest.csv", dtype=str).rename(columns={"dup_group": "group"})
    split = make_split(table, 0)
    assert no_group_is_torn(table, split)
    counts = pd.crosstab(table["label"], split)
    sizes = counts.sum() / len(table)
    for name, ratio in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert abs(sizes[name] - ratio) < 0.001
    shares = counts.loc["with_mask"] / counts.sum()
    assert (shares - 2164 / 4094).abs().max() < 0.002
    for name in ("leakfree_seed0", "leakfree_person_seed0", "naive_seed0"):
        given, left_out = read_split(root / "splits" / f"{name}.csv", table)
        assert left_out == 0
        assert len(given) == 4094
    table = table.join(read_split(root / "splits" / "leakfree_seed0.csv", table)[0])
    assert table["split"].value_counts().to_dict() == {"train": 2861, "val": 411, "test": 822}
    assert fingerprint(table) == "87f115c87918d72c39b75bbfced919fc96ea81a5540849ab47defbd9406bc8e8"
