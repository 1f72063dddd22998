"""All records in one table: in the README between markers, as CSV, as one HTML page, and in the terminal. Beside it the
pages of the benches."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from facemask.errors import UserError
from facemask.files import write_text
from facemask.runs.bench_page import bench_page
from facemask.runs.page import Page, markdown, text_table
from facemask.runs.record import Record, all_records, cell, changed_files

if TYPE_CHECKING:
    from rich.table import Table

START, END = "<!-- facemask:results -->", "<!-- facemask:end -->"
# Column -> (head, metric) of test; None is the record's reported head.
COLUMNS = {
    "test accuracy": (None, "accuracy"),
    "balanced": (None, "balanced_accuracy"),
    "NLL": (None, "nll"),
    "teacher": ("teacher", "accuracy"),
    "no pixels": ("no_pixels", "accuracy"),
    "majority": ("majority", "accuracy"),
}
HEADER = ["record", *COLUMNS, "n"]
NOTE = (
    "Accuracies in %. In brackets 95 % intervals: over seeds or folds (t) where a record has several, else over "
    "pictures; none where all are equal. Runs on different pictures are not comparable: see each record."
)


def update(experiments: Path, readme: Path, check: bool = False) -> list[Path]:
    """Write leaderboard, README's table and the benches' pages; returns the files that were (`check`: are) stale.

    Raises:
        UserError: a record was changed by hand, or the README has no markers.
    """
    records = sorted(all_records(experiments), key=_order)
    for record in records:
        if broken := changed_files(record.path):
            raise UserError(f"{record.path}: {broken[0]}; see `facemask reproduce {record.name}`")
    text = readme.read_text() if readme.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{readme} needs the lines {START} and {END} once, in this order")
    wanted = {
        readme: f"{text[: text.index(START)]}{START}\n{_readme(experiments, records)}\n{text[text.index(END) :]}",
        experiments / "leaderboard.csv": _csv(records),
        experiments / "leaderboard.html": _page(records).render(),
    }
    for machine in sorted(path for path in experiments.glob("bench/*") if path.is_dir()):
        wanted[machine / "README.md"] = bench_page(machine)
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    for path in [] if check else stale:
        write_text(path, wanted[path])
    return stale


def _readme(experiments: Path, records: Sequence[Record]) -> str:
    """The README's results: what each study found, by its own page, and a table of all records of no study."""
    lines, alone = [], list(records)
    for page in sorted(p for p in experiments.glob("*/README.md") if p.with_name("contrasts.json").exists()):
        name = page.parent.name
        mine = [record for record in alone if record.name.startswith(f"{name}-")]
        alone = [record for record in alone if record not in mine]
        found = [line for line in page.read_text().splitlines() if line.startswith("- ")]
        about = f"[{name}]({experiments.name}/{name}/README.md), records under one protocol:"
        lines += [about, "", *found, ""]
    links = [f"[{record.name}]({experiments.name}/{record.path.name}/README.md)" for record in alone]
    rows = [[link, *_row(record)[1:]] for link, record in zip(links, alone, strict=True)]
    return "\n".join([*lines, *markdown(HEADER, rows), "", NOTE])


def terminal(experiments: Path) -> "Table":
    rows = [_row(record) for record in sorted(all_records(experiments), key=_order)]
    # Of 100 columns there are enough for one interval.
    shown = [[*row[:2], *(figure.partition(" [")[0] for figure in row[2:])] for row in rows]
    return text_table(HEADER, shown, NOTE)


def _claims(record: Record) -> list[dict[str, Any] | None]:
    known = {claim["claim"]: claim for claim in record.claims}
    return [known.get(f"test/{head or record.info['reported_head']}/{metric}") for head, metric in COLUMNS.values()]


def _order(record: Record) -> tuple[str, float]:
    """Records of the same pictures together, best first."""
    first = _claims(record)[0]
    fingerprint = next(iter(record.info["runs"].values()))["fingerprint"] if record.info["over"] != "fold" else ""
    return fingerprint, -first["value"] if first else 0.0


def _row(record: Record) -> list[str]:
    over = record.info["over"]
    cells = [cell(claim, metric) for claim, (_, metric) in zip(_claims(record), COLUMNS.values(), strict=True)]
    return [record.name, *cells, f"{len(record.runs)} {over}s" if over else "1 run"]


def _csv(records: Sequence[Record]) -> str:
    """One line per claim of the table, with all its digits."""
    names = ["claim", "value", "std", "low", "high"]
    lines = [
        [record.name, *map(claim.get, names), len(record.runs), record.info["over"]]
        for record in records
        for claim in filter(None, _claims(record))
    ]
    return pd.DataFrame(lines, columns=["record", *names, "n", "over"]).to_csv(index=False, lineterminator="\n")


def _page(records: Sequence[Record]) -> Page:
    page = Page("Records", "facemask reproduce checks each")
    page.heading("Leaderboard")
    page.table(HEADER, [_row(record) for record in records], NOTE)
    for record in records:
        page.heading(record.name)
        page.code("\n".join(dict.fromkeys(run["command"] for run in record.info["runs"].values())))
        page.table([], [["commit", record.info["git"]["commit"]], ["test opened", str(record.info["test_opened"])]])
    return page
