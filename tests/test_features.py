"""Embeddings of drawn faces by a network that nobody trained."""

import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_predict import write_run
from typer.testing import CliRunner

from facemask.cli import app
from facemask.data import synthetic
from facemask.errors import UserError
from facemask.features import embed, features, scores, seen
from facemask.predict import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("features")
    write_run(place / "run")
    synthetic.write_folder(place / "faces", 24, 3)
    return place


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "run", device="cpu")


def test_tokens_are_those_that_the_heads_read(place, model):
    views = np.stack([model.view(file) for file in sorted((place / "faces").glob("*/*"))[:3]])
    found = embed(model, views)
    network = model.module
    with torch.inference_mode():
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
        tokens = network.forward_features((pixels / 255 - mean) / std)
    expected = {"cls": tokens[:, 0], "dist": tokens[:, 1], "patch_mean": tokens[:, 2:].mean(dim=1)}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    logits = model.logits(views)
    for head, token in (("head", "cls"), ("head_dist", "dist")):
        read = getattr(network, head)(torch.from_numpy(found[token])).detach()
        np.testing.assert_allclose(read, logits[head], atol=1e-5)


def test_a_labelled_folder(place, model, tmp_path):
    root = shutil.copytree(place / "faces", tmp_path / "faces")
    (root / "with_mask" / "broken.jpg").write_text("no picture")
    out = tmp_path / "f.parquet"
    arguments = [str(place / "run"), str(root), "--out", str(out), "--cache-dir", str(tmp_path)]
    result = CliRunner().invoke(app, ["features", *arguments])
    assert result.exit_code == 1, result.output
    assert "problem: 'with_mask/broken.jpg': not a JPEG, PNG, WEBP or GIF picture" in result.output
    assert "24 pictures, 1 left out" in result.output
    assert "linear probe" in result.output
    table = pd.read_parquet(out)
    assert table.columns.tolist() == ["path", "label", "group", "sha256", "cls", "dist", "patch_mean"]
    assert table["path"].is_unique
    row = table.iloc[5]
    expected = embed(model, model.view(root / row["path"])[None])
    for name, values in expected.items():
        np.testing.assert_allclose(row[name], values[0], atol=1e-5)
    assert model.weights_sha256.encode() in pq.read_schema(out).metadata[b"facemask"]
    again = CliRunner().invoke(app, ["features", *arguments])
    assert "exists already and is not overwritten" in str(again.exception)


def test_pictures_without_classes(place, model, tmp_path):
    table, problems, scored = features(model, place / "faces" / "with_mask", tmp_path / "f.parquet", tmp_path)
    assert (len(table), problems, scored) == (12, {}, None)
    assert pd.read_parquet(tmp_path / "f.parquet").columns.tolist() == ["path", "cls", "dist", "patch_mean"]


def test_scores_of_embeddings_that_tell_the_class_and_of_noise(model):
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 60)
    groups = [f"{i // 3}" for i in range(120)]  # three pictures that look alike, whose noise is the same
    noise = np.repeat(rng.normal(size=(40, 8)), 3, axis=0)
    signal = noise + np.where(labels == "a", 10.0, 0.0)[:, None]
    table = pd.DataFrame({"path": [f"{i}" for i in range(120)], "label": labels, "group": groups, "sha256": groups})
    found = scores(table, {"good": signal, "noise": noise}, model).set_index(["embedding", "method"])
    assert found.loc[("good", "linear probe"), "accuracy"] == 1
    assert found.loc[("good", "5 nearest neighbours"), "accuracy"] > 0.9
    # a neighbour of one's own group would always be right
    assert (found.loc["noise"]["accuracy"] < 0.75).all()
    assert found.loc[("–", "majority class"), "accuracy"] <= 0.5
    assert found["groups"].tolist() == [40] * 5
    assert scores(table.assign(label="a"), {"noise": noise}, model) is None


def test_training_pictures_are_not_counted(place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    rows = [("x.jpg", "train", "0"), ("y.jpg", "train", "1"), ("z.jpg", "test", "2")]
    pd.DataFrame(rows, columns=["path", "split", "sha256"]).to_csv(run / "split.csv", index=False)
    model = load_model(run, device="cpu")
    digests = [str(i) for i in range(40)]
    labels = ["a", "b"] * 20
    table = pd.DataFrame({"path": digests, "label": labels, "group": digests, "sha256": digests})
    assert seen(table, model).tolist() == [True, True] + [False] * 38
    vectors = np.random.default_rng(0).normal(size=(40, 4))
    assert set(scores(table, {"x": vectors}, model)["n"]) == {38}
    assert scores(table[:2].assign(group="x"), {"x": vectors[:2]}, model) is None


def test_outputs_that_cannot_be_and_no_pictures(place, model, tmp_path):
    for out in ("f.csv", "nowhere/f.parquet"):
        with pytest.raises(UserError, match=r"name a \.parquet file in a folder that exists"):
            features(model, place / "faces", tmp_path / out, tmp_path)
    with pytest.raises(UserError, match="is no folder with pictures"):
        features(model, tmp_path, tmp_path / "f.parquet", tmp_path)
