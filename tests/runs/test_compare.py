import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, t
from typer.testing import CliRunner

from facemask.cli import app
from facemask.errors import UserError
from facemask.runs import compare as comparison
from facemask.runs.compare import compare, page
from facemask.runs.metrics import SCALARS, scalar_metrics
from facemask.runs.predictions import assemble, write_predictions

CLASSES = ["with_mask", "without_mask"]


def logits(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits of ±1 that are right or wrong as asked."""
    return np.where(right, 1.0, -1.0)[:, None] * (2 * np.eye(2)[labels] - 1)


def run(path: Path, values: np.ndarray, labels: np.ndarray, groups=None, seed=0, fold=None, splits=None) -> Path:
    n = len(labels)
    names = [CLASSES[k] for k in labels]
    ids = [f"{name}/{i}.jpg" for i, name in enumerate(names)]
    path.mkdir(parents=True, exist_ok=True)
    frame = assemble(ids, splits or ["test"] * n, groups or ids, names, {"head": values}, CLASSES)
    write_predictions(path / "predictions.parquet", frame, CLASSES)
    (path / "config.yaml").write_text(f"seed: {seed}\ndata:\n  fold: {'null' if fold is None else fold}\n")
    (path / "summary.json").write_text('{"reported_head": "head"}')
    return path


def errors(n: int, *wrong: int) -> np.ndarray:
    right = np.ones(n, dtype=bool)
    right[list(wrong)] = False
    return right


LABELS = np.arange(100) % 2


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 300)
    monkeypatch.setattr(comparison, "FLIPS", 1999)  # still exact for the ten pictures of `two`


@pytest.fixture
def two(tmp_path):
    """A errs on 0 to 9, B on 8 to 11 of 100 pictures: 8 and 2 discordant."""
    a = run(tmp_path / "a", logits(errors(100, *range(10)), LABELS), LABELS)
    b = run(tmp_path / "b", logits(errors(100, *range(8, 12)), LABELS), LABELS)
    return a, b


def test_exact_mcnemar_and_the_pictures_that_differ(two):
    found = compare(two)
    (row,) = found["weights"]
    assert (row["reference_value"], row["arm_value"]) == (0.90, 0.96)
    assert row["difference"] == pytest.approx(0.06)
    assert (row["n"], row["groups"], row["differing"], row["test"]) == (100, 100, 10, "exact McNemar")
    assert row["p"] == row["p_sign_flip"] == pytest.approx(binomtest(2, 10).pvalue)
    assert row["low"] < 0.06 < row["high"]
    assert [line[0] for line in row["disagree"]] == [f"{CLASSES[i % 2]}/{i}.jpg" for i in [*range(8), 10, 11]]
    sure = pytest.approx(1 / (1 + np.exp(-2)))
    assert row["disagree"][0][1:] == ["with_mask", "without_mask", sure, "with_mask", sure]
    assert found["recipe"] == []
    assert "train at least two seeds" in found["notes"][0]


def test_duplicates_are_swapped_together(tmp_path):
    groups = [f"g{i // 4}" for i in range(100)]
    a = run(tmp_path / "a", logits(errors(100, *range(12)), LABELS), LABELS, groups)
    b = run(tmp_path / "b", logits(errors(100), LABELS), LABELS, groups)
    (row,) = compare([a, b])["weights"]
    assert (row["groups"], row["test"]) == (25, "sign-flip over groups")
    assert row["p"] == 2 / 2**3  # three groups, all one way
    assert row["low"] < 0


def test_groups_that_either_arm_knows_are_joined(tmp_path):
    # A knows pairs (0 1)(2 3), B (1 2): one group of four
    a = run(tmp_path / "a", logits(errors(6, 0), LABELS[:6]), LABELS[:6], list("xxyypq"))
    b = run(tmp_path / "b", logits(errors(6), LABELS[:6]), LABELS[:6], list("abbcde"))
    assert compare([a, b])["weights"][0]["groups"] == 3


@pytest.mark.parametrize("metric", SCALARS)
def test_every_metric_is_the_difference_of_the_reported_ones(tmp_path, metric):
    rng = np.random.default_rng(0)
    labels, group = rng.integers(0, 2, 150), [f"g{k}" for k in rng.integers(0, 90, 150)]
    pair = [np.float32(2 * rng.normal(size=(150, 2)) + k * np.eye(2)[labels]).astype(float) for k in (1.0, 4.0)]
    arms = [run(tmp_path / name, values, labels, group) for name, values in zip("ab", pair, strict=True)]
    (row,) = compare(arms, metric)["weights"]
    first, second = (scalar_metrics(v, labels, group, resamples=300)[metric] for v in pair)
    assert row["difference"] == pytest.approx(second["value"] - first["value"])
    widths = [e["high"] - e["low"] for e in (first, second)]
    assert 0.5 * max(widths) < row["high"] - row["low"] < 1.3 * sum(widths)
    if metric != "ece":
        assert row["p"] < 0.02
    (same,) = compare([arms[0], arms[0]], metric)["weights"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)


def test_the_auroc_does_not_depend_on_the_scale_of_either_model(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 80)
    pair = [rng.normal(size=(80, 2)) + np.eye(2)[labels] for _ in range(2)]
    plain = [run(tmp_path / f"p{k}", v, labels) for k, v in enumerate(pair)]
    scaled = run(tmp_path / "s", 50 * pair[1] + 3, labels)
    one, other = compare(plain, "auroc")["weights"][0], compare([plain[0], scaled], "auroc")["weights"][0]
    assert one["p"] == other["p"]
    assert one["difference"] == pytest.approx(other["difference"])


def seeds(folder: Path, counts: dict[int, int]) -> Path:
    for seed, wrong in counts.items():
        run(folder / f"s{seed}", logits(errors(100, *range(wrong)), LABELS), LABELS, seed=seed)
    return folder


def test_the_recipe_is_paired_by_seed(tmp_path):
    a = seeds(tmp_path / "a", {0: 10, 1: 12, 2: 9, 7: 50})
    b = seeds(tmp_path / "b", {2: 6, 1: 8, 0: 7})
    found = compare([a, b])
    assert [row["run"] for row in found["weights"]] == ["seed 0", "seed 1", "seed 2"]
    same, new = found["recipe"]
    differences = [0.03, 0.04, 0.03]
    assert same["differences"] == pytest.approx(differences)
    reach = t.ppf(0.975, 2) * np.std(differences, ddof=1) / np.sqrt(3)
    assert (same["low"], same["high"]) == pytest.approx((np.mean(differences) - reach, np.mean(differences) + reach))
    assert new["high"] - new["low"] > same["high"] - same["low"]
    assert (same["on"], new["on"], same["runs"], same["over"]) == ("same pictures", "new pictures", 3, "seeds")


def test_folds_have_pictures_of_their_own(tmp_path):
    for arm, extra in (("a", 2), ("b", 0)):
        for fold in range(3):
            splits = ["test" if i % 3 == fold else "train" for i in range(100)]
            right = errors(100, *range(4 * extra))
            run(tmp_path / arm / f"f{fold}", logits(right, LABELS), LABELS, fold=fold, splits=splits)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert [row["run"] for row in found["weights"]] == ["seed 0 fold 0", "seed 0 fold 1", "seed 0 fold 2"]
    assert [row["n"] for row in found["weights"]] == [34, 33, 33]
    (row,) = found["recipe"]
    assert (row["on"], row["over"]) == ("same pictures", "folds")
    spread = np.std(row["differences"], ddof=1) * np.sqrt(1 / 3 + 1 / 2)  # Nadeau & Bengio
    assert row["high"] - row["difference"] == pytest.approx(t.ppf(0.975, 2) * spread)


def test_seeds_of_one_fold_are_seeds(tmp_path):
    for arm in "ab":
        for seed in range(2):
            run(tmp_path / arm / f"s{seed}", logits(errors(100, seed), LABELS), LABELS, seed=seed, fold=0)
    found = compare([tmp_path / "a", tmp_path / "b"])["recipe"]
    assert [(row["on"], row["over"]) for row in found] == [("same pictures", "seeds"), ("new pictures", "seeds")]


def test_what_cannot_be_told_is_null(two, tmp_path):
    result = compare([two[0], two[0]], "auroc")
    assert np.isnan(result["weights"][0]["detectable"])
    made = page(result)
    assert any("cannot be told" in block.get("text", "") for block in made.blocks)
    comparison.write(result, made, tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)["weights"][0]["detectable"] is None


@pytest.mark.parametrize("form", ["first", "first, no index", "all, sorted", "all, sorted, no index"])
def test_the_best_classes_of_timm_are_refused(two, tmp_path, form):
    best = np.sort(softmax(np.random.default_rng(0).normal(size=(100, 2))), axis=1)[:, ::-1]
    table = pd.DataFrame({"filename": range(100)})
    if "first" in form:
        table = table.assign(prob=best[:, 0]) if "no" in form else table.assign(index=LABELS, prob=best[:, 0])
    else:
        table = table.assign(prob_0=best[:, 0], prob_1=best[:, 1])
        table = table if "no" in form else table.assign(index_0=LABELS, index_1=1 - LABELS)
    table.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(UserError, match="--topk 0"):
        compare([two[0], tmp_path / "x.csv"])


def test_holm_over_the_arms(two, tmp_path):
    c = run(tmp_path / "c", logits(errors(100, 0), LABELS), LABELS)
    found = compare([*two, c])
    p = [row["p"] for row in found["weights"]]
    assert [row["p_holm"] for row in found["weights"]] == pytest.approx([p[0], 2 * p[1]])
    alone = compare(two)["weights"][0]["detectable"]
    assert found["weights"][0]["detectable"] > alone  # at 0.05 / 2


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values)
    return e / e.sum(axis=1, keepdims=True)


def elsewhere(values: np.ndarray) -> dict[str, pd.DataFrame]:
    """The same predictions as others write them."""
    names = [CLASSES[k] for k in LABELS]
    ids = [f"{name}/{i}.jpg" for i, name in enumerate(names)]
    p = softmax(values)
    return {
        "logit columns": pd.DataFrame({"id": ids, "label": names, "logit_with_mask": values[:, 0]}).assign(
            logit_without_mask=values[:, 1]
        ),
        "class columns": pd.DataFrame({"path": ids, "label": names, "without_mask": p[:, 1], "with_mask": p[:, 0]}),
        "indices": pd.DataFrame({"filename": ["/data/set/" + i for i in ids], "target": LABELS}).assign(
            prob_0=p[:, 0], prob_1=p[:, 1]
        ),
        "one column": pd.DataFrame({"image": ["./" + i for i in ids], "y_true": LABELS, "probability": p[:, 1]}),
        "named column": pd.DataFrame({"id": ids, "label": names, "prob_with_mask": p[:, 0]}),
        "lists": pd.DataFrame({"id": ids, "label": LABELS, "logits": [str(list(map(float, row))) for row in values]}),
        "timm, topk 0": pd.DataFrame({"filename": ids, "prob": [str(row) for row in p]}),
        "no labels": pd.DataFrame({"id": ids, "output_0": values[:, 0], "output_1": values[:, 1]}),
        "ours as csv": pd.DataFrame({"id": ids, "split": "test", "group": ids, "label": names}).assign(
            **{f"logit/head/{c}": values[:, k] for k, c in enumerate(CLASSES)}
        ),
    }


@pytest.mark.parametrize("form", list(elsewhere(np.zeros((100, 2)))))
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_from_elsewhere_are_understood(tmp_path, form, suffix):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 2)) + np.eye(2)[LABELS]
    a = run(tmp_path / "a", logits(errors(100, 3), LABELS), LABELS)
    table, path = elsewhere(values)[form], tmp_path / f"b.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path, index=False)
    for first, second, sign in ((a, path, 1), (path, a, -1)):
        (row,) = compare([first, second], "nll")["weights"]
        expected = scalar_metrics(values, LABELS, resamples=2)["nll"]["value"] - np.log(1 + np.exp(-2)) - 2 / 100
        assert row["difference"] == pytest.approx(sign * expected, abs=1e-6)
        assert row["n"] == 100


def test_what_was_understood_is_said(tmp_path, two):
    elsewhere(logits(errors(100), LABELS))["indices"].to_csv(tmp_path / "x.csv", index=False)
    said = compare([two[0], tmp_path / "x.csv"])["arms"][1]["understood"]
    assert "id = filename, label = target; probabilities = prob_0, prob_1 for 0, 1" in said
    assert "classes 0, 1 taken for with_mask, without_mask" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.drop(columns="id"), "no column that names the picture"),
        (lambda f: f.drop(columns=["logit_with_mask", "logit_without_mask"]), "no scores that can be understood"),
        (lambda f: pd.concat([f, f.iloc[:1]]), "with_mask/0.jpg occurs twice"),
        (lambda f: f.assign(logit_with_mask=np.nan), "100 rows have no finite scores"),
        (
            lambda f: f.assign(label=f["label"][::-1].to_numpy()),
            "label 100 of 100 pictures differently: with_mask/0.jpg",
        ),
        (lambda f: f.assign(label=["masked"] + ["with_mask"] * 99), "masked"),
        (lambda f: f.assign(id="x/" + f["id"].str.replace("/", "_")), "no picture in common"),
        (lambda f: f.rename(columns={"logit_with_mask": "logit_cat", "logit_without_mask": "logit_dog"}), "cat"),
        (lambda f: f.rename(columns=lambda c: c.replace("logit", "prob")), "not between 0 and 1"),
        (lambda f: f.iloc[:0], "has no rows"),
        (
            lambda f: f.assign(index_0=1).rename(columns={"logit_with_mask": "prob_0", "logit_without_mask": "prob_1"}),
            "best",
        ),
    ],
)
def test_what_cannot_be_understood_is_named(tmp_path, two, change, sentence):
    change(elsewhere(logits(errors(100, 2), LABELS))["logit columns"]).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(UserError, match=sentence):
        compare([two[0], tmp_path / "x.csv"])


def test_other_bad_input_is_named(tmp_path, two):
    (tmp_path / "cut.parquet").write_bytes((two[0] / "predictions.parquet").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    for paths, options, sentence in [
        ([two[0]], {}, "name 2 to 26"),
        ([two[0], tmp_path / "cut.parquet"], {}, "cut.parquet is not a readable"),
        ([two[0], tmp_path / "none.csv"], {}, "none.csv does not exist"),
        ([two[0], tmp_path / "empty"], {}, "holds no predictions"),
        (two, {"metric": "acc"}, "choose one of accuracy"),
        (two, {"heads": ["teacher"]}, "no head 'teacher'"),
        (two, {"heads": ["head"] * 3}, "3 heads for 2 arms"),
        (two, {"split": "val"}, "no split 'val'"),
        ([seeds(tmp_path / "p", {0: 1, 1: 1}), seeds(tmp_path / "q", {2: 1, 3: 1})], {}, "none is in both"),
        (
            [two[0], run(tmp_path / "r", logits(errors(4), LABELS[:4] * 0), LABELS[:4] * 0)],
            {"metric": "auroc"},
            "one class",
        ),
    ]:
        with pytest.raises(UserError, match=sentence):
            compare(paths, **options)


def test_other_pictures_are_left_out_and_counted(two, tmp_path):
    table = elsewhere(logits(errors(100, 5), LABELS))["logit columns"].iloc[3:]
    extra = table.iloc[:2].assign(id=["with_mask/x.jpg", "with_mask/y.jpg"])
    pd.concat([table, extra]).to_csv(tmp_path / "x.csv", index=False)
    (row,) = compare([two[0], tmp_path / "x.csv"])["weights"]
    assert (row["n"], row["lost"]) == (97, {"A": 3, "B": 2})


def test_the_command_prints_and_writes(two, tmp_path):
    out = tmp_path / "compare.html"
    found = CliRunner().invoke(app, ["compare", *map(str, two), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "90.00" in found.output
    assert "+6.00" in found.output
    assert "B seed 0: no difference shown" in found.output
    text = out.read_text()
    assert text.count("<svg") == 1
    assert all(f"{CLASSES[i % 2]}/{i}.jpg" in text for i in (0, 7, 10, 11))
    CliRunner().invoke(app, ["compare", *map(str, two), "--out", str(tmp_path / "c.json")])
    assert json.loads((tmp_path / "c.json").read_text())["weights"][0]["differing"] == 10
    done = CliRunner().invoke(app, ["compare", *map(str, two), "--out", str(tmp_path / "c.pdf")])
    assert isinstance(done.exception, UserError)
    assert page(compare(two)).render() == page(compare(two)).render()


def test_torch_is_not_imported(two):
    code = "import sys; from facemask.runs.compare import compare; from pathlib import Path\n"
    code += f"compare([Path({str(two[0])!r}), Path({str(two[1])!r})]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
