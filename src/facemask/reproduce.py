"""`facemask reproduce`: does a published record still hold, here and now?

Tier metrics recomputes every claim from the stored predictions and needs no torch; predict makes the predictions again
from the checkpoint; train trains one seed again. A record is untrusted: what it names is checked before it is built.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from facemask.config import ROOT, as_plain, check_targets, composed, user_sentence
from facemask.data.images import SUFFIXES
from facemask.data.splits import fingerprint
from facemask.errors import UserError
from facemask.runs import reproduce as judging
from facemask.runs.folder import file_sha256
from facemask.runs.provenance import code_and_versions
from facemask.runs.record import Record, changed_files, config_differences, neutral, places_of, read_record

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from facemask.data.datamodule import ImageData

QUICK = 0.5  # seconds of hashing in the quick check
Say = Callable[[str], None]


def reproduce(
    path: Path,
    tier: str,
    say: Say,
    *,
    full: bool = False,
    checkpoint: Path | None = None,
    run: str | None = None,
    data_root: Path | None = None,
) -> str:
    """Check one record and say what was found; returns PASS, DRIFT or FAIL.

    Raises:
        UserError: it cannot be checked: no or a newer record, other pictures, no checkpoint, a target not allowed.
    """
    broken = changed_files(path) if path.is_dir() else []
    for text in broken:
        say(f"FAIL   {text}")
    try:
        record = read_record(path)
        run = run or record.runs[0]
        if run not in record.runs:
            raise UserError(f"{path} has no run {run}: choose one of {', '.join(record.runs)}")
        say(f"record {record.name}: {', '.join(record.runs)}; tier {tier}")
        root = _data_root(record, data_root)
        if root is not None:
            check_pictures(record, root, full or tier != "metrics")
            hashed = "" if full or tier != "metrics" else " (quick check)"
            say(f"data   the {len(record.pictures()):,} pictures of the record{hashed}")
        elif "root" not in record.config["data"]:
            say("data   drawn by the project, or from a hub: compared when they are made (tiers predict and train)")
        elif tier == "metrics":
            say("data   not here (no --data and no FACEMASK_DATA), so not compared; this tier needs none")
        else:
            raise UserError(f"tier {tier} needs the pictures: give their folder with --data or FACEMASK_DATA")
        if tier == "predict" and checkpoint is None:
            raise UserError(
                "a record holds no weights: tier predict needs --checkpoint PATH; --tier train makes it anew"
            )
        software = judging.software_differences(record, code_and_versions()[0])
        _say_some(say, software)
        metrics = judging.recompute(record)
        broken += (found := judging.contradictions(record, metrics, fingerprint))
        for text in found:
            say(f"FAIL   {text}")
        verdicts = judging.check_claims(record, metrics)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): take the whole record") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not in the form that `facemask record` writes ({error!r})") from error
    if tier != "metrics" and not broken and judging.worst(verdicts) == "PASS":
        again = _predict(record, run, checkpoint, root, say) if checkpoint else _train(record, run, root, software, say)
        verdicts = [*again, *(v for v in verdicts if v.claim not in {new.claim for new in again})]
    for verdict in verdicts:
        say(f"{verdict.verdict:<6} {verdict.claim}: {verdict.text}")
    result = "FAIL" if broken else judging.worst(verdicts)
    counts = {name: sum(v.verdict == name for v in verdicts) for name in reversed(judging.EXIT_CODES)}
    numbers = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    say(f"{result:<6} {record.name}, tier {tier}: {numbers}{f'; {len(broken)} contradiction(s)' if broken else ''}")
    return result


def _say_some(say: Say, lines: Sequence[str], most: int = 12) -> None:
    for line in lines[:most]:
        say(f"differs {line}")
    if len(lines) > most:
        say(f"differs ... and {len(lines) - most} more")


# -- pictures ---------------------------------------------------------------------------------------------------


def _data_root(record: Record, given: Path | None) -> Path | None:
    if "root" not in record.config["data"]:
        return None
    named = given or os.environ.get("FACEMASK_DATA")
    if named is not None and not Path(named).is_dir():
        raise UserError(f"the picture folder {named} does not exist: give another with --data or FACEMASK_DATA")
    return Path(named) if named else None


def check_pictures(record: Record, root: Path, full: bool) -> None:
    """Compare a folder with a record's pictures: names, sizes, and the sha256 of all (`full`) or of as many as half a
    second allows, the newest first: a picture that was replaced since is among them.

    Raises:
        UserError: pictures are gone, replaced or new; names some.
    """
    pictures, data = record.pictures(), record.info["data"]
    extra = len(data["left_out"]) + data["not_in_split_file"]  # files of the folder that are no part of the record
    missing, replaced, times = [], [], []
    for path, size, sha256 in pictures[["path", "bytes", "sha256"]].to_records(index=False).tolist():
        try:
            facts = (root / path).stat()
        except OSError:
            missing.append(path)
            continue
        if facts.st_size != size:
            replaced.append(path)
        else:
            times.append((facts.st_mtime_ns, path, sha256))
    start = time.monotonic()
    for _, path, sha256 in sorted(times, reverse=True):
        if not full and time.monotonic() - start > QUICK:
            break
        if file_sha256(root / path) != sha256:
            replaced.append(path)
    known = set(pictures["path"])
    found = {file.relative_to(root).as_posix() for file in root.glob("*/**/*") if file.suffix.lower() in SUFFIXES}
    new = sorted(path for path in found - known if not any(part.startswith(".") for part in path.split("/")))
    if record.config["data"]["fraction"] != 1 or len(new) == extra:  # a part of train is no part of the record
        new = []
    groups = {"missing": missing, "replaced": replaced, "unknown": new}
    parts = [
        f"{len(paths)} {what} ({', '.join(sorted(paths)[:3])}{', ...' if len(paths) > 3 else ''})"
        for what, paths in groups.items()
        if paths
    ]
    if parts:
        other = f"the pictures in {root} are not those of the record: {'; '.join(parts)}; nothing was computed"
        raise UserError(f"{other}. Give the record's pictures with --data")


# -- tier predict -----------------------------------------------------------------------------------------------


def _predict(record: Record, run: str, checkpoint: Path, root: Path | None, say: Say) -> list[judging.Verdict]:
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist: give the checkpoint of {record.name}, or take --tier train")
    digest = file_sha256(checkpoint)
    known = {
        file["sha256"]: name
        for name, facts in record.info["runs"].items()
        for file in facts["checkpoints"].values()
        if file["weights_sha256"] == facts["weights_sha256"]  # best.ckpt; last.ckpt where nothing was validated
    }
    if digest not in known:
        other = f"{checkpoint} is not the recorded checkpoint (its sha256 {digest[:12]}... is none of the record's)"
        raise UserError(f"{other}: it was changed or is of another run; --tier train makes one anew")
    import torch

    from facemask.evaluate import find_teacher, load_run, predict_splits
    from facemask.runs.ledger import record_opening
    from facemask.train import build_data

    run = known[digest]
    facts = record.info["runs"][run]
    torch.set_num_threads(facts["hardware"]["torch_threads"])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = _local(record.config, {"$FACEMASK_DATA": str(root), "$RUN_DIR": made})
        config["seed"], config["data"]["fold"] = facts["seed"], facts["fold"]
        if root is not None:  # the recorded split itself, which needs neither its file nor a manifest
            _write_split(record, run, folder / "split.csv")
            config["data"] |= {"manifest": None, "group_by": [], "fold": None, "fraction": 1.0}
            config["data"]["split"] = str(folder / "split.csv")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "best.ckpt").symlink_to(checkpoint.absolute())
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text(json.dumps({"distillation": facts["teacher"]}))
        cfg, classifier, classes = load_run(folder)
        data = build_data(cfg)
        data.prepare(config["evaluate"]["splits"])
        _check_fingerprint(data, record, run)
        teacher = find_teacher(folder, cfg, Path(cfg.cache_dir), classes)
        if "test" in config["evaluate"]["splits"]:
            opening = f"facemask reproduce {record.name} --tier predict"
            record_opening(Path(cfg.ledger), data.test_fingerprint, record.path, opening)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        frame, _ = predict_splits(
            classifier, teacher, data, config["evaluate"]["splits"], config["evaluate"]["batch_size"], device
        )
    say(f"weights of {run}, sha256 {digest}")
    _say_flips(record, run, frame, say)
    return judging.judge(record, run, frame, "predict", must_be_equal=False)


def _say_flips(record: Record, run: str, frame: pd.DataFrame, say: Say) -> bool:
    """Whether the logits are the recorded ones, bit for bit."""
    gap, flips = judging.compare_predictions(record, run, frame)
    differ = f"differ by at most {gap:.3g}" if gap else "are equal, bit for bit"
    say(f"logits of {run} {differ}; {len(flips)} decision(s) flipped")
    for flip in flips:
        say(f"flip   {flip}")
    return gap == 0


# -- tier train -------------------------------------------------------------------------------------------------


def _train(record: Record, run: str, root: Path | None, differences: Sequence[str], say: Say) -> list[judging.Verdict]:
    from facemask.runs.predictions import read_predictions

    script, facts = ROOT / "train.py", record.info["runs"][run]
    if not script.is_file():
        raise UserError(f"--tier train runs train.py, and {ROOT} has none: use an editable clone of the repository")
    target = Path("runs") / "reproduce" / f"{record.name}_{run}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    split = target.parent / f"{target.name}.csv"
    own = ("run_dir=", "cache_dir=", "ledger=", "resume=", "threads=")
    kept = [override for override in facts["overrides"] if not override.startswith(own)]
    outside = [override for override in kept if re.match(r"data\.split=[\"']?\$FILE/", override)]
    if outside:
        split.parent.mkdir(parents=True, exist_ok=True)
        _write_split(record, run, split)
        kept = [*(override for override in kept if override not in outside), f"data.split={split}"]
    for name in re.findall(r"\$FILE/([^,'\"\])\n]+)", "\n".join(kept)):
        if not Path(name).exists():
            raise UserError(f"the command names {name} from outside the data set: put that file into this folder")
    kept = [re.sub(r"=(\$.*)", r"='\1'", override) for override in kept]  # a folder's name may hold anything
    places = {"$FACEMASK_DATA": str(root), "$FILE": "."}
    overrides = _local([*kept, f"run_dir={target}", f"threads={facts['hardware']['torch_threads']}"], places)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.pop(name, None)
        if (recorded := facts["environment"].get(name, "")).isdigit():
            os.environ[name] = recorded
    if root is not None:
        os.environ["FACEMASK_DATA"] = str(root)
    cfg = _compose(record, overrides)
    changed = _config_changes(record, run, as_plain(cfg), {"data.split"} if outside else set())
    _say_some(say, changed)

    from facemask.train import build_data

    data = build_data(cfg)
    data.prepare(cfg.evaluate.splits)
    _check_fingerprint(data, record, run)
    command = [sys.executable, str(script), *overrides]
    say(f"command python train.py {shlex.join(overrides)}")
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise UserError(f"the training ended with exit code {code}; what it said is above")
    provenance, summary = (json.loads((target / f"{name}.json").read_text()) for name in ("provenance", "summary"))
    hardware = judging.hardware_differences(record, run, provenance)
    _say_some(say, hardware)
    fitted, teacher = (part.get("teacher_sha256") for part in (summary["distillation"], facts["teacher"]))
    if fitted != teacher:
        say(f"differs teacher: sha256 {fitted} here, {teacher} in the record")
    frame, _ = read_predictions(target / "predictions.parquet")
    alike = not (differences or changed or hardware)
    if not _say_flips(record, run, frame, say) and alike:
        say("FAIL   the same command, code, versions, data and hardware gave other bits")
    return judging.judge(record, run, frame, "train", alike, summary["weights_sha256"])


def _write_split(record: Record, run: str, file: Path) -> None:
    table = record.pictures().rename(columns={f"split/{run}": "split"}).dropna(subset="split")
    table[["path", "label", "split"]].to_csv(file, index=False)


def _check_fingerprint(data: "ImageData", record: Record, run: str) -> None:
    if data.fingerprint != record.info["runs"][run]["fingerprint"]:
        raise UserError(f"pictures, labels or splits here are not those of {run} (fingerprint); nothing was computed")


def _compose(record: Record, overrides: Sequence[str]) -> "DictConfig":
    """What the recorded overrides compose to here.

    Raises:
        UserError: they do not compose, or to a config that names a target which is not allowed.
    """
    known = r"[+~]{0,2}(?!(.*@)?hydra\b)[a-z]\w*[\w.@/]*(=|$)"
    if odd := [override for override in overrides if not re.match(known, override)]:
        raise UserError(f"{record.path}: {odd[0]!r} is no override of train.py, so it is not run")
    try:
        cfg = composed(*overrides)
        check_targets(as_plain(cfg), f"{record.path / 'record.json'} (overrides)")
    except UserError:
        raise
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        raise UserError(f"the recorded command does not fit this version of the project: {sentence}") from error
    return cfg


def _config_changes(record: Record, run: str, config: dict[str, Any], ignored: set[str]) -> list[str]:
    """Where a composed config is not the recorded one."""
    here = neutral(config, places_of(Path(config["run_dir"]), config))
    facts = record.info["runs"][run]
    recorded = {**record.config, "seed": facts["seed"], "threads": config["threads"], "resume": config["resume"]}
    recorded["data"] = {**recorded["data"], "fold": facts["fold"]} if facts["fold"] is not None else recorded["data"]
    ignored |= {"augment.seed"} if recorded["seed"] != record.config["seed"] else set()
    return [f"config: {key} is not as recorded" for key in config_differences(recorded, here) if key not in ignored]


def _local(value: Any, places: dict[str, str]) -> Any:
    """A stored config or override with the places of this machine."""
    if isinstance(value, dict):
        return {key: _local(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [_local(part, places) for part in value]
    if not isinstance(value, str):
        return value
    cache = os.environ.get("FACEMASK_CACHE", ".cache/facemask")
    for name, path in {**places, "$CACHE_DIR": cache, "$LEDGER": "runs/test_openings.jsonl"}.items():
        value = value.replace(name, path)
    return value
