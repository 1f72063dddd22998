"""Maps of a model in which one patch decides, curves by hand, and the command on a run."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from drawn_run import drawn_run
from PIL import Image
from typer.testing import CliRunner

from facemask.cli import app
from facemask.errors import UserError
from facemask.evaluate import load_run, own_pictures
from facemask.explain import (
    GREY,
    STEPS,
    Neighbours,
    _files,
    areas,
    curves,
    explain,
    gain,
    log_odds,
    maps,
    occlusion,
    overlay,
)
from facemask.predict import load_model
from facemask.runs.metrics import Z


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return drawn_run(tmp_path_factory.mktemp("explain"), "model=deit_distilled", "model.img_size=48")


@pytest.fixture(scope="module")
def model(run):
    return load_model(run, device="cpu")


def test_log_odds_by_hand():
    logits = np.log([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    expected = np.log([0.2 / 0.8, 0.8 / 0.2])
    np.testing.assert_allclose(log_odds(logits, np.array([0, 2])), expected)


def test_occlusion_finds_the_one_cell_that_counts_and_averages_over_windows():
    view = np.full((28, 28, 3), 200, np.uint8)

    def score(views):
        return views[:, 9, 21, 0].astype(float)  # row 2, column 5 of a 7 x 7 grid

    found = occlusion(view, score, (7, 7))
    assert np.argwhere(found).tolist() == [[2, 5]]
    assert found[2, 5] == 200 - GREY
    found = occlusion(view, score, (14, 14))  # windows of 2 x 2 cells; the pixel is in row 4, column 10
    assert found[4, 10] == 200 - GREY
    assert found[5, 11] == found[3, 9] == (200 - GREY) / 4  # one of four windows
    assert np.count_nonzero(found) == 9


def one_patch_model(run, row, column):
    """All tokens attend to one position alone, whose value vector is the only one that reaches the heads."""
    model = load_model(run, device="cpu")
    network = model.module
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        block, token = network.blocks[0], 2 + 3 * row + column
        network.norm.weight.fill_(1)
        block.norm1.weight.fill_(1)
        width = network.embed_dim
        # A picture's brightness goes into channel 0 of every patch; channel 1 marks the place.
        network.patch_embed.proj.weight[0] = 1 / (3 * 16 * 16)
        network.pos_embed[0, :, 2::2], network.pos_embed[0, :, 3::2] = 1, -1  # something for the norm to divide by
        network.pos_embed[0, token, 1] = 20
        qkv, head = block.attn.qkv, block.attn.head_dim
        for h in range(3):
            qkv.bias[h * head] = 40  # every query asks for channel 1
            qkv.weight[width + h * head, 1] = 1
        qkv.weight[2 * width, 0] = 1  # the value: brightness
        block.attn.proj.weight[0, 0] = 1
        for classifier in (network.head, network.head_dist):
            classifier.weight[0, 0], classifier.weight[1, 0] = 1, -1
    return model


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 1)])
def test_the_one_patch_that_decides_is_what_the_maps_show(run, row, column):
    model = one_patch_model(run, row, column)
    view = np.random.default_rng(3).integers(100, 255, (48, 48, 3), dtype=np.uint8)
    found = maps(model, view)
    assert {method for method, _ in found} == {"rollout", "gradient", "occlusion"}
    assert {head for method, head in found if method != "occlusion"} == {"head", "head_dist"}
    for kind, heat in found.items():
        assert heat.shape == (3, 3)
        assert np.unravel_index(np.abs(heat).argmax(), heat.shape) == (row, column), kind
        others = np.delete(np.abs(heat).ravel(), 3 * row + column)
        assert others.max() <= 1e-3 * np.abs(heat).max(), kind


def test_curves_start_and_end_as_they_should_and_change_the_highest_cell_first():
    view = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    heat = np.array([[0.1, 0.9], [0.3, 0.2]])
    deletion, insertion = curves(view, heat)
    assert deletion.shape == (STEPS + 1, 20, 20, 3)
    assert np.array_equal(deletion[0], view)
    assert (deletion[-1] == GREY).all()
    assert np.array_equal(insertion[-1], view)
    assert np.array_equal(insertion[0], cv2.GaussianBlur(view, (0, 0), 2))
    # 3 of 10 steps are one of four cells: the upper right one
    grey = (deletion[3] == GREY).all(axis=2)
    assert grey[:10, 10:].all()
    assert grey.sum() == 100
    assert np.array_equal(insertion[3][:10, 10:], view[:10, 10:])


def test_areas_of_a_model_in_which_one_patch_decides_beat_random_ones(run):
    model = one_patch_model(run, 1, 2)
    table = pd.DataFrame(
        [
            line
            for number in range(12)
            for line in areas(
                model, np.random.default_rng(number).integers(150, 255, (48, 48, 3), dtype=np.uint8), f"{number}.jpg"
            )
        ]
    )
    assert len(table) == 12 * 5
    of = table[(table["method"] == "gradient") & (table["head"] == "head")]
    assert (of["deletion"] <= of["random_deletion"] + 1e-9).all()
    found = gain(of, np.arange(12))
    less, more = of["random_deletion"] - of["deletion"], of["insertion"] - of["random_insertion"]
    assert found.difference == pytest.approx(float((less + more).mean() / 2))
    assert found.high - found.difference == pytest.approx(Z * found.error)
    assert found.low > 0


def test_an_overlay_is_bright_where_the_map_is_high_and_a_flat_map_is_dark():
    view = np.zeros((32, 32, 3), np.uint8)
    laid = overlay(view, np.array([[0.0, 0.0], [0.0, 5.0]]))
    assert laid[-1, -1].sum() > 300 > laid[0, 0].sum()
    assert np.ptp(overlay(view, np.full((2, 2), 3.0)).reshape(-1, 3), axis=0).tolist() == [0, 0, 0]
    signed = overlay(view, np.array([[-9.0, 0.0], [0.0, 1.0]]))
    assert np.array_equal(signed[0, 0], signed[0, -1])


def test_a_training_picture_is_nearest_to_itself(run, model):
    cfg = load_run(run)[0]
    data = own_pictures(run, cfg, cfg, ["val"])
    path = data.table["path"].iloc[data.rows("train")[5]]
    nearest = Neighbours(model, data)(data.picture(path))
    assert next(caption.splitlines()[1:] for _, caption in nearest) == [path, "cosine 1.000"]
    assert len(nearest) == 3
    assert np.array_equal(nearest[0][0], data.picture(path))


def test_names_of_files_are_told_apart_and_no_picture_is_written_over(tmp_path):
    files = _files(["a/x.jpg", "b/x.png", "c.jpg"], tmp_path)
    assert [file.name for file in files.values()] == ["x.png", "x_1.png", "c.png"]
    with pytest.raises(UserError, match=r"would be written over .*x\.png: name another folder"):
        _files([str(tmp_path / "x.png")], tmp_path)


def test_the_command_explains_pictures_and_errors_and_checks_its_maps(run, tmp_path):
    cache = run.parent / "cache"
    pictures = sorted(next(cache.glob("synthetic/*/faces")).rglob("with_mask/*"))[:2]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    arguments = ["explain", str(run), *map(str, pictures), str(broken), "--cache-dir", str(cache)]
    options = ["--out", str(tmp_path / "out"), "--errors", "2", "--check", "4"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 1, result.output
    assert f"left out: {broken}: not a JPEG, PNG, WEBP or GIF picture" in result.output
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["areas.csv", "explain.html", *(f"{picture.stem}.png" for picture in pictures)]
    )
    with Image.open(out / f"{pictures[0].stem}.png") as png:
        assert png.size[0] > 4 * png.size[1]  # the view and five maps
    page = (out / "explain.html").read_text()
    assert page.count("<img ") == (2 + 2) * (1 + 5 + 3)
    assert page.count("gradient-weighted attention, distillation token") >= 4
    assert "cosine 1.000" in page or "cosine 0.9" in page
    assert "of 5 methods, on 4 pictures" in page
    assert len(pd.read_csv(out / "areas.csv")) == 4 * 5


def test_without_the_data_pictures_are_explained_all_the_same(run, tmp_path):
    cache = run.parent / "cache"
    picture = str(next(next(cache.glob("synthetic/*/faces")).rglob("with_mask/*")))
    moved = tmp_path / "run"
    moved.mkdir()
    for name in ("config.yaml", "checkpoints", "checkpoints.json", "predictions.parquet", "summary.json", "split.csv"):
        (moved / name).symlink_to(run / name)
    (moved / "provenance.json").write_text('{"fingerprint": "of other pictures"}')
    with pytest.raises(UserError, match="the pictures, their labels or the code that draws them changed since"):
        explain(moved, [], tmp_path / "out", "val", 2, 2, cache)
    assert not (tmp_path / "out").exists()
    page, problems = explain(moved, [picture], tmp_path / "out", "val", 2, 2, cache)
    assert problems == {}
    assert "No errors, training pictures or check are shown" in page.render()
    assert page.render().count("<img ") == 6


def test_a_cnn_has_an_occlusion_map_alone(tmp_path):
    run = drawn_run(tmp_path, "model=vit", "model.name=resnet10t", "model.depth=null", "data.num_images=40")
    found = maps(load_model(run, device="cpu"), np.zeros((32, 32, 3), np.uint8))
    assert {kind: heat.shape for kind, heat in found.items()} == {("occlusion", "head"): (7, 7)}
