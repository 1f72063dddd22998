import json
import multiprocessing
from pathlib import Path

import pytest

from facemask.errors import UserError
from facemask.runs.ledger import openings, record_opening


def test_every_opening_counts_per_fingerprint_and_split(tmp_path):
    ledger = tmp_path / "new" / "openings.jsonl"
    assert openings(ledger, "f1") == 0
    assert record_opening(ledger, "f1", tmp_path / "run", "facemask evaluate run") == 1
    assert record_opening(ledger, "f1", tmp_path / "run", "facemask evaluate run") == 2  # the same run again
    assert record_opening(ledger, "f2", tmp_path / "run", "facemask evaluate run") == 1
    assert record_opening(ledger, "f1", tmp_path / "run", "x", split="holdout") == 1
    assert (openings(ledger, "f1"), openings(ledger, "f2"), openings(ledger, "f1", "holdout")) == (2, 1, 1)
    entry = json.loads(ledger.read_text().splitlines()[0])
    assert entry["fingerprint"] == "f1"
    assert entry["split"] == "test"
    assert entry["run_dir"] == str(tmp_path / "run")
    assert entry["command"] == "facemask evaluate run"
    assert entry["time"].endswith("+00:00")


def test_a_torn_last_line_is_kept_not_counted_and_not_joined(tmp_path):
    ledger = tmp_path / "openings.jsonl"
    record_opening(ledger, "f1", "run", "line one\nline two")
    torn = ledger.read_text()[:-9]
    ledger.write_text(torn)
    assert openings(ledger, "f1") == 0
    assert record_opening(ledger, "f1", "run", "c") == 1
    assert record_opening(ledger, "f1", "run", "c") == 2
    lines = ledger.read_text().splitlines()
    assert lines[0] == torn
    assert len(lines) == 3


def test_lines_of_another_kind_are_passed_over(tmp_path):
    ledger = tmp_path / "openings.jsonl"
    ledger.write_bytes(b'[1]\n"x"\nnull\n\xff\xfe\n{"split": "test"}\n\n')
    assert record_opening(ledger, "f1", "run", "c") == 1


def _write(ledger: Path, times: int, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put([record_opening(ledger, "f", "run", "x" * 9000) for _ in range(times)])


def test_concurrent_writers_get_each_number_once(tmp_path):
    ledger = tmp_path / "openings.jsonl"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    writers = [context.Process(target=_write, args=(ledger, 25, queue)) for _ in range(4)]
    for writer in writers:
        writer.start()
    numbers = [n for _ in writers for n in queue.get(timeout=60)]
    for writer in writers:
        writer.join(timeout=60)
    assert sorted(numbers) == list(range(1, 101))
    assert openings(ledger, "f") == 100
    assert len(ledger.read_text().splitlines()) == 100


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "openings.jsonl").mkdir()
    with pytest.raises(UserError, match=r"the ledger .*openings\.jsonl cannot be written"):
        record_opening(tmp_path / "openings.jsonl", "f", "run", "c")
    with pytest.raises(UserError, match=r"the ledger .*openings\.jsonl cannot be read"):
        openings(tmp_path / "openings.jsonl", "f")
