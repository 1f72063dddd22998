"""The dashboard: its figures from a record and a run folder, its page, and what it would send to W&B."""

import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import yaml
from typer.testing import CliRunner

from facemask import dashboard
from facemask.cli import app
from facemask.config import ROOT
from facemask.errors import UserError
from facemask.runs.record import mean_interval, read_record

EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="module")
def smoke():
    return next(arm for arm in dashboard.arms_of(EXPERIMENTS) if arm.name == "smoke")


@pytest.fixture
def spec():
    return dashboard.read_spec()


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="tiny", sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: (trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True) - 1e-3) ** 2, 6)
    return study


def entry(value: float, confusion: list[list[int]]) -> dict:
    accuracy = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"test": {"head": {"accuracy": accuracy, "confusion": confusion}}}


def arm(name: str, *runs: dict, over: str | None = None, **config) -> dashboard.Arm:
    return dashboard.Arm(name, "head", ["a", "b"], config, list(runs), [], over)


def test_estimates_are_over_runs_or_over_pictures():
    one = arm("one", entry(0.8, [[4, 1], [1, 4]]))
    assert one.estimate("test", "accuracy") == {"value": 0.8, "low": pytest.approx(0.7), "high": pytest.approx(0.9)}
    two = arm("two", entry(0.8, [[4, 1], [1, 4]]), entry(0.9, [[5, 0], [1, 4]]))
    found = two.estimate("test", "accuracy")
    # t of one degree of freedom, 12.706, times 0.0707 / sqrt(2)
    assert (found["value"], found["high"]) == (pytest.approx(0.85), pytest.approx(0.85 + 12.7062 * 0.05, abs=1e-4))
    assert two.confusion("test").tolist() == [[9, 1], [2, 8]]
    assert two.confusion("val").tolist() == [[0, 0], [0, 0]]
    assert two.estimate("test", "nll") is None
    assert two.estimate("val", "accuracy") is None


def test_the_table_says_what_the_record_claims(smoke, spec):
    columns, [row] = dashboard.ablation([smoke], spec)
    [claim] = [c["value"] for c in read_record(EXPERIMENTS / "smoke").claims if c["claim"] == "test/mean/accuracy"]
    assert row[columns.index("accuracy, %")].startswith(f"{100 * claim:.1f} [")
    assert row[columns.index("runs")] == 3
    values = [run["test"]["mean"]["accuracy"]["value"] for run in smoke.metrics]
    assert mean_interval(values)["mean"] == pytest.approx(claim)


def test_groups_arms_that_differ_in_the_fraction_and_their_epochs_alone():
    facts = {"seed": 0, "model": {"name": "vit"}}
    whole = arm("whole", **facts, data={"fraction": 1.0}, trainer={"max_epochs": 20})
    tenth = arm("tenth", **{**facts, "seed": 1}, data={"fraction": 0.1}, trainer={"max_epochs": 80})
    folds = arm("folds", over="fold", **facts, data={"fraction": 1.0})
    other = arm("other", **{**facts, "model": {"name": "deit"}}, data={"fraction": 0.1})
    tenth.config["augment"] = {"later": 0.0}  # an option that there was not when the other was made
    parts = arm("parts", **facts, data={"fraction": 0.1}, callbacks={"ema": {"_target_": "EMA"}})
    [group] = dashboard.by_fraction([whole, folds, parts, other, tenth])
    assert [(fraction, found.name) for fraction, found in group] == [(0.1, "tenth"), (1.0, "whole")]


def test_the_page_holds_every_figure(smoke, spec, study, tmp_path):
    twin = replace(smoke, name="twin", config={**smoke.config}, metrics=smoke.metrics[:1], curves=smoke.curves[:1])
    twin.config["data"] = {**smoke.config["data"], "fraction": 0.5}
    html = dashboard.build_page([smoke, twin], [study], spec).render()
    headings = ["Ablation", "Data efficiency", "Curves by arm", "Confusion matrices", "Sweep tiny"]
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == headings
    # two forests, efficiency, three curves, parallel coordinates; the one parameter's importance is certain
    assert html.count("<svg ") == 2 + 1 + 3 + 2
    counts = smoke.confusion("test")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html.split("Counts over all runs")[1].split("</table>")[0])
    numbers = [str(count) for count in counts.flatten()]
    first, second = smoke.classes
    assert cells[:10] == ["smoke", "mean", first, *numbers[:2], "", "", second, *numbers[2:]]
    assert cells[10] == "twin"
    assert "http" not in re.sub(r"http://www.w3.org/\S*", "", html)


def test_objects_of_wandb_are_built_without_a_network(spec, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="needs wandb-workspaces")

    def refuse(*arguments):
        raise AssertionError("it wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    workspace, report = dashboard.build_wandb(spec, "me", "facemask")
    panels = {section.name: section.panels for section in workspace.sections}
    assert list(panels) == ["Ablation", "Curves by arm", "Confusion matrices", "Sweeps"]
    assert len(panels["Ablation"]) == len(spec["metrics"]) * len(spec["heads"])
    assert [list(panel.y) for panel in panels["Curves by arm"]] == [[quantity] for quantity in spec["curves"]]
    assert panels["Confusion matrices"][0].query == {"summaryTable": {"tableKey": "test/confusion_matrix_table"}}
    assert len(panels["Sweeps"]) == 2 + len(spec["sweep"]["parameters"])
    sent = workspace._to_model().model_dump_json(by_alias=True)
    assert "config:optim.value.lr" in sent  # W&B keeps {"optim": {"lr": ...}} as optim.value.lr
    assert [block.text for block in report.blocks if type(block).__name__ == "H1"] == list(panels)


def test_what_can_be_wrong(tmp_path, monkeypatch):
    def told(*arguments: str) -> str:
        return str(CliRunner().invoke(app, ["dashboard", *arguments]).exception)

    out = ["--out", str(tmp_path / "d.html")]
    assert "holds no record" in told("--experiments", str(tmp_path), *out)
    assert f"{tmp_path} holds no finished run" in told(str(tmp_path), *out)
    assert "give ENTITY/PROJECT" in told("--wandb", "me", *out)
    assert "cannot be written" in told("--out", str(tmp_path))
    wrong = tmp_path / "spec.yaml"
    wrong.write_text(yaml.safe_dump({"title": "x"}))
    with pytest.raises(UserError, match="must hold the keys title, split, metrics"):
        dashboard.read_spec(wrong)
    assert not (tmp_path / "d.html").exists()

    class Refuses:
        def save(self) -> None:
            raise ValueError("not logged in\nsecond line")

    monkeypatch.setattr(dashboard, "build_wandb", lambda *arguments: (Refuses(), Refuses()))
    with pytest.raises(UserError, match=r"W&B took no dashboard for me/facemask \(not logged in\)$"):
        dashboard.publish({}, "me", "facemask")


def test_the_command_writes_the_page(tmp_path):
    out = tmp_path / "d.html"
    result = CliRunner().invoke(app, ["dashboard", "--experiments", str(EXPERIMENTS), "--out", str(out)])
    assert (result.exit_code, result.output) == (0, f"written {out}\n")
    assert "smoke" in out.read_text()


def test_every_figure_of_curves_has_one_family_and_its_lines_differ():
    arms = [SimpleNamespace(name=name) for name in ("own", "mini-a", "mini-b", "mini-c")]
    found = dashboard.families(arms, {"name": "mini", "curves": {"first": ["b", "a"], "none": ["x"], "second": ["c"]}})
    names = {title: [arm.name for arm in part] for title, part in found.items()}
    assert names == {"arms of no study": ["own"], "first": ["mini-a", "mini-b"], "second": ["mini-c"]}
    assert len({dashboard._look(place, ["C0", "C1"]) for place in range(6)}) == 6
