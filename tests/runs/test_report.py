import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from facemask.runs.metrics import evaluate
from facemask.runs.page import SERIES, Page, format_cell, plot, show, text_table
from facemask.runs.predictions import add_mean_head, assemble, heads, write_predictions
from facemask.runs.report import hugging_face_metrics, run_report, terminal_table

CLASSES = ["with_mask", "without_mask"]


def predictions_of(distilled: bool = True) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 90)
    signal = np.stack([-labels, labels], 1) * 4.0

    def head(noise: float) -> np.ndarray:
        return signal + rng.normal(0, noise, (90, 2))

    arrays = {"head": head(3), "majority": np.tile([0.1, 0.0], (90, 1)), "no_pixels": head(5)}
    if distilled:
        arrays |= {"head_dist": head(3), "teacher": head(1)}
    ids = [f"{CLASSES[y]}/<{i}>.jpg" for i, y in enumerate(labels)]
    splits = ["val"] * 30 + ["test"] * 60
    frame = assemble(ids, splits, [f"g{i // 2}" for i in range(90)], [CLASSES[y] for y in labels], arrays, CLASSES)
    return add_mean_head(frame, CLASSES)


SUMMARY = {
    "name": "a run",
    "reported_head": "mean",
    "test_opened": 1,
    "data": {
        "fingerprint": "ab12" * 16,
        "classes": CLASSES,
        "counts": {split: dict.fromkeys(CLASSES, 4) for split in ("train", "val", "test")},
        "left_out": {},
        "not_in_split_file": 0,
    },
    "distillation": {},
    "training": {"epoch": 3.0, "precision": "32-true"},
    "notes": [],
}


def make_run(folder: Path, **summary) -> pd.DataFrame:
    frame = predictions_of()
    write_predictions(folder / "predictions.parquet", frame, CLASSES)
    (folder / "metrics.json").write_text(json.dumps(evaluate(frame, CLASSES)))
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **summary}))
    provenance = {"command": "python train.py seed=0", "seeds": {"run": 12345}, "git": {"commit": "c" * 40}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "curves.csv").write_text("epoch,step,train/loss_epoch\n0,9,1.0\n1,19,0.5\n")
    return frame


class Text(HTMLParser):
    """Rows of the tables, ids, and the text of a page; fails where tags do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.images += tag == "img"
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_headline_table_has_every_head_in_order_with_its_interval(tmp_path):
    make_run(tmp_path, reported_head="head", test_opened=3)
    html = run_report(tmp_path, pictures=None).read_text()
    page, metrics = Text(html), json.loads((tmp_path / "metrics.json").read_text())
    first = [row[0] for row in page.rows[1:7]]
    assert first == [
        "teacher",
        "student class head *",
        "student distillation head",
        "student mean of heads",
        "majority class",
        "no pixels",
    ]
    accuracy = metrics["val"]["head"]["accuracy"]
    value, low, high = (f"{100 * accuracy[k]:.1f}" for k in ("value", "low", "high"))
    assert page.rows[2][1] == f"{value} [{low}, {high}]"
    assert page.rows[2][4].startswith(f"{metrics['val']['head']['nll']['value']:.3f} [")
    confusion = metrics["test"]["head"]["confusion"]
    assert ["with_mask", *map(str, confusion[0])] in page.rows
    assert "Test opened 3 times" in html
    floor = metrics["test"]["no_pixels"]["accuracy"]
    assert f"without any pixel {100 * floor['value']:.1f} [" in html


def test_the_page_stands_alone_and_is_the_same_twice(tmp_path):
    make_run(tmp_path, name="a <b> & c", notes=["<script>alert(1)</script>"])
    rows = [{"epoch": e, "step": 10 * e, "train/loss_epoch": 1 / (e + 1), "val/loss": 2 / (e + 1)} for e in range(4)]
    pd.DataFrame(rows).to_csv(tmp_path / "curves.csv", index=False)
    html = run_report(tmp_path, pictures=lambda id: np.zeros((300, 200, 3), np.uint8)).read_text()
    assert html == run_report(tmp_path, pictures=lambda id: np.zeros((300, 200, 3), np.uint8)).read_text()
    assert "<script" not in html
    assert "a &lt;b&gt; &amp; c" in html
    assert not re.findall(r"""(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|@import""", html)
    assert "prefers-color-scheme: dark" in html
    page = Text(html)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert used <= set(page.ids)
    assert html.count("<svg") == 2
    assert not any(colour in html for colour in SERIES)  # every stand-in colour became a variable


def test_worst_errors_come_by_loss_with_pictures_or_as_text(tmp_path):
    frame = make_run(tmp_path, reported_head="head")
    asked: list[str] = []

    def pictures(id: str) -> np.ndarray:
        asked.append(id)
        return np.full((20, 30), 7, np.uint8)

    page = Text(run_report(tmp_path, pictures=pictures).read_text())
    margin = frame["logit/head/without_mask"].astype(float) - frame["logit/head/with_mask"]
    wrong_by = np.where(frame["label"] == "with_mask", margin, -margin)
    test = frame.assign(wrong_by=wrong_by)[(frame["split"] == "test") & (wrong_by > 0)]
    expected = test.sort_values("wrong_by", ascending=False)["id"].head(12).tolist()
    assert len(expected) >= 2
    assert [id for id in asked if id in set(test["id"])] == expected
    assert page.images == len(asked)

    def gone(id: str) -> np.ndarray:
        raise FileNotFoundError(id)

    for without in (None, gone):
        page = Text(run_report(tmp_path, pictures=without).read_text())
        assert page.images == 0
        assert [row[0] for row in page.rows if row[0] in set(test["id"])] == expected


def test_summary_and_provenance_are_shown(tmp_path):
    counts = {"train": {"with_mask": 1512, "without_mask": 1349}, "test": {"with_mask": 4, "without_mask": 0}}
    make_run(
        tmp_path,
        data={**SUMMARY["data"], "counts": counts, "left_out": {"x.jpg": "truncated"}},
        distillation={"teacher_label_disagreement": 0.0049, "teacher_entropy": 0.25, "degenerate": True},
        training={"epoch": 3.0, "train_runtime": 3723.456, "eval_loss": 0.12345, "train_loss": float("nan")},
    )
    html = run_report(tmp_path, pictures=None).read_text()
    rows = Text(html).rows
    assert ["train", "1,512", "1,349", "2,861"] in rows
    assert ["test", "4", "0", "4"] in rows
    assert ["fingerprint", "ab12" * 16] in rows
    assert "x.jpg: truncated" in html
    assert "Degenerate: the teacher&#39;s decisions equal the labels." in html
    assert ["teacher's decision differs from the label", "0.49 %"] in rows
    assert ["seeds.run", "12345"] in rows
    assert "<pre>python train.py seed=0</pre>" in html
    assert "train_runtime = 1:02:03.45" in html
    assert "eval_loss = 0.1235" in html
    assert "seed: 0\n" in html


def test_a_run_without_teacher_has_no_distillation_section(tmp_path):
    make_run(tmp_path)
    html = run_report(tmp_path, pictures=None).read_text()
    shown = re.findall(r"<h2[^>]*>([^<]+)</h2>", html)
    assert shown == [
        "Results", "Training curves", "Confusion matrix", "Reliability", "Per class", "Worst errors", "Data",
        "Training figures", "Provenance",
    ]  # fmt: skip


def test_curves_by_epoch_and_by_step(tmp_path):
    make_run(tmp_path)
    lines = ["epoch,step,train/loss_step,train/loss_epoch,val/accuracy,train/grad_step"]
    for epoch in range(3):
        lines += [f"{epoch},{2 * epoch},0.{9 - epoch},,,1.5", f"{epoch},{2 * epoch + 1},0.8,,,1.25"]
        lines += [f"{epoch},{2 * epoch + 1},,0.{8 - epoch},,", f"{epoch},{2 * epoch + 1},,,0.9{epoch},"]
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    html = run_report(tmp_path, pictures=None).read_text()
    figure = html[html.index("<svg") : html.index("</svg>")]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    titles = [t for t in texts if t in ("loss", "accuracy", "grad")]
    assert titles == ["loss", "accuracy", "grad"]
    assert [t for t in texts if t in ("epoch", "step")] == ["epoch", "epoch", "step"]


def printed(metrics, summary) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(metrics, summary))
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


def test_the_terminal_table_fits_and_says_what_is_measured():
    frame = predictions_of()
    metrics = evaluate(frame, CLASSES)
    assert heads(frame)[:3] == ["head", "head_dist", "mean"]
    lines = printed(metrics, {"reported_head": "mean", "test_opened": 1})
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].split() == ["val", "accuracy", "test", "accuracy", "test", "balanced", "test", "NLL"]
    names = [re.split(r"\s{2,}", line.strip())[0] for line in lines[2:8]]
    assert names == [
        "teacher",
        "student class head",
        "student distillation head",
        "student mean of heads *",
        "majority class",
        "no pixels",
    ]
    entry = metrics["test"]["mean"]
    accuracy = "{value:.1f} [{low:.1f}, ".format(**{k: 100 * entry["accuracy"][k] for k in ("value", "low")})
    assert accuracy in lines[5]
    assert lines[5].endswith(f"{entry['nll']['value']:.3f}")
    assert lines[-2].endswith("pictures: val 30, test 60")
    assert lines[-1] == "test opened once"


def test_the_terminal_table_without_test_or_distillation():
    frame = predictions_of(distilled=False)
    lines = printed(evaluate(frame[frame["split"] == "val"], CLASSES), {"reported_head": "head", "test_opened": 3})
    assert lines[0].split() == ["val", "accuracy", "val", "balanced", "val", "NLL"]
    assert lines[2].startswith(" student *") or lines[2].startswith("student *")
    assert not any("distillation" in line or "opened" in line for line in lines)


def test_hugging_face_layout():
    text = hugging_face_metrics(
        "train", {"train_loss": 0.018449, "epoch": 5.0, "total_flos": 3 * 2**30, "train_runtime": 63.5}
    )
    assert text.splitlines() == [
        "***** train metrics *****",
        "  epoch         =        5.0",
        "  total_flos    =        3GF",
        "  train_loss    =     0.0184",
        "  train_runtime = 0:01:03.50",
    ]


def test_cells_and_alignment():
    cells = [format_cell(v) for v in (None, True, 12345, 0.123456, "x", np.float32(2), np.int64(3))]
    assert cells == ["–", "yes", "12,345", "0.1235", "x", "2", "3"]
    page = Page("t")
    page.table(["name", "value"], [["a", 1.5], ["b", None]])
    assert page.blocks[0]["right"] == [False, True]
    page.note("b [bold]")
    console = Console(width=80, record=True, file=io.StringIO())
    show(page, console)
    console.print(text_table([], [["a [red]x", 1]]))
    printed = console.export_text()
    assert "b [bold]" in printed  # not taken for markup
    assert "a [red]x" in printed


def test_a_users_matplotlib_style_does_not_reach_the_page():
    import matplotlib

    def draw(figure):
        figure.subplots().plot([0, 1], color=SERIES[0])

    plain = plot(draw)
    with matplotlib.rc_context({"axes.linewidth": 9, "lines.linestyle": ":", "backend": "agg"}):
        assert plot(draw) == plain
        assert matplotlib.rcParams["axes.linewidth"] == 9
