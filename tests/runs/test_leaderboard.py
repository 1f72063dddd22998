import csv

import pytest
from typer.testing import CliRunner

from facemask.cli import app
from facemask.errors import UserError
from facemask.runs.leaderboard import END, START, update
from facemask.runs.record import read_record


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# a\n\n{START}\nto be replaced\n{END}\n\nrest\n")
    return path


def test_tables_follow_the_records(make_record, readme):
    first = make_record("first")
    make_record("single", seeds=(5,))
    experiments = first.parent
    stale = update(experiments, readme)
    assert [path.name for path in stale] == ["README.md", "leaderboard.csv", "leaderboard.html"]
    claims = {claim["claim"]: claim for claim in read_record(first).claims}
    claim = claims["test/head/accuracy"]
    text = readme.read_text()
    assert text.startswith(f"# a\n\n{START}\n| record | test accuracy |")
    assert text.endswith(f"{END}\n\nrest\n")
    assert "to be replaced" not in text
    assert claim["high"] > 1  # three seeds far apart; no accuracy lies there
    numbers = [f"{100 * claim[key]:.1f}" for key in ("value", "low")] + ["100.0"]
    assert f"| [first](experiments/first/README.md) | {numbers[0]} [{numbers[1]}, {numbers[2]}] |" in text
    assert "| 3 seeds |" in text
    assert "| 1 run |" in text
    with (experiments / "leaderboard.csv").open() as file:
        rows = {(row["record"], row["claim"]): row for row in csv.DictReader(file)}
    assert float(rows["first", "test/head/accuracy"]["value"]) == claim["value"]
    assert rows["first", "test/head/accuracy"]["n"] == "3"
    assert rows["single", "test/head/nll"]["std"] == ""
    html = (experiments / "leaderboard.html").read_text()
    assert f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" in html
    assert "<script" not in html
    assert update(experiments, readme) == []


def test_the_readme_says_what_a_study_found_and_tables_the_others_alone(make_record, readme):
    experiments = make_record("first").parent
    make_record("trial-one")
    (experiments / "trial").mkdir()
    (experiments / "trial" / "contrasts.json").write_text("[]\n")
    found = "# trial\n\n- Primary. One is +1.00 points.\n- 1 of 1 records are made.\n\n## Arms\n"
    (experiments / "trial" / "README.md").write_text(found)
    update(experiments, readme)
    text = readme.read_text()
    assert "[trial](experiments/trial/README.md), records under one protocol:\n\n- Primary. One is +1.00" in text
    assert "- 1 of 1 records are made.\n\n| record | test accuracy |" in text
    assert "| [first](" in text
    assert "trial-one" not in text
    assert "trial-one" in (experiments / "leaderboard.csv").read_text()
    assert update(experiments, readme) == []


def test_check_says_what_is_stale_and_writes_nothing(make_record, readme):
    experiments = make_record("first").parent
    options = ["--experiments", str(experiments), "--readme", str(readme)]
    before = readme.read_text()
    result = CliRunner().invoke(app, ["report", "--check", *options])
    assert result.exit_code == 1
    assert f"{readme} is stale" in result.output.replace("\n", "")
    assert readme.read_text() == before
    assert not (experiments / "leaderboard.csv").exists()
    assert CliRunner().invoke(app, ["report", *options]).exit_code == 0
    assert CliRunner().invoke(app, ["report", "--check", *options]).exit_code == 0
    readme.write_text(readme.read_text().replace("| 3 seeds |", "| 4 seeds |"))
    assert CliRunner().invoke(app, ["report", "--check", *options]).exit_code == 1


def test_records_of_the_same_pictures_are_ordered_by_accuracy(make_record, readme):
    experiments = make_record("a", seeds=(0,)).parent
    make_record("b", seeds=(1,))
    update(experiments, readme)
    with (experiments / "leaderboard.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["claim"] == "test/head/accuracy"]
    values = [float(row["value"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 2


def test_what_stops_it(make_record, readme):
    path = make_record()
    readme.write_text("no markers")
    with pytest.raises(UserError, match="needs the lines"):
        update(path.parent, readme)
    (path / "claims.yaml").write_text((path / "claims.yaml").read_text().replace("0.", "0.1", 1))
    with pytest.raises(UserError, match=r"claims\.yaml was changed: its sha256.*facemask reproduce mine"):
        update(path.parent, readme)
