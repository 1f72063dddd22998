"""A record: what the published numbers of one or several runs are computed from, and where they come from.

record.json        format, runs (command, seed, hardware, checkpoints, teacher, training), git, data, summary
config.yaml        resolved config of the first run; paths are $FACEMASK_DATA, $RUN_DIR, $CACHE_DIR, $LEDGER, $FILE
claims.yaml        the numbers that the README prints, each with its tier and the tolerance of every tier
versions.txt       every installed package, as pip reads it        diff.patch   uncommitted changes, if any
pictures.parquet   path, label, group, sha256, bytes and one column split/<run> for each run
runs/<run>/        predictions.parquet, metrics.json, curves.csv
README.md          written from claims.yaml                        SHA256SUMS   of every other file

A record holds no pictures, no weights and no path of a machine. It is untrusted input: reading one builds nothing.
"""

import json
import re
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from facemask.errors import UserError
from facemask.files import read_yaml, write_json, write_text
from facemask.runs import predictions
from facemask.runs.folder import RunFolder, file_sha256, flat
from facemask.runs.metrics import SCALARS, evaluate
from facemask.runs.page import markdown
from facemask.runs.report import ROWS, number, title

FORMAT = 1
NAME = r"\w[\w.-]*"
MOST_BYTES = 1_000_000
MOST_RESAMPLES = 100_000
ROOT = Path(__file__).resolve().parents[3]
SUMS = "SHA256SUMS"
FILES = ("README.md", "claims.yaml", "config.yaml", "pictures.parquet", "record.json", "versions.txt")
OF_RUN = ("predictions.parquet", "metrics.json", "curves.csv")
FACTS = ["path", "label", "group", "sha256", "bytes"]
CLAIMED = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "nll": "NLL"}
FROM_CURVES = ("train/teacher_label_disagreement", "train/student_teacher_agreement")
# How far a number may lie from the recorded one: computed again from the same predictions; predicted again by the same
# weights on another machine; trained again where one recorded seed cannot tell how far seeds lie apart.
TOLERANCE = {"metrics": 1e-9, "predict": 0.005, "train": 0.02}
TOLERANCE_NLL = {"metrics": 1e-9, "predict": 0.01, "train": 0.1}
# Where runs of one record may differ; augment.seed follows seed unless it is set.
MAY_DIFFER = {"seed", "augment.seed", "data.fold", "resume"}


@dataclass(frozen=True)
class Record:
    """A record as it is stored; `info` is record.json."""

    path: Path
    info: dict[str, Any]
    config: dict[str, Any]
    claims: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def runs(self) -> list[str]:
        return list(self.info["runs"])

    def predictions(self, run: str) -> tuple[pd.DataFrame, list[str]]:
        return predictions.read_predictions(self.path / "runs" / run / "predictions.parquet")

    def metrics(self, run: str) -> dict[str, Any]:
        return _part(self.path / "runs" / run / "metrics.json", lambda file: json.loads(file.read_text()))

    def curves(self, run: str) -> pd.DataFrame:
        return _part(self.path / "runs" / run / "curves.csv", pd.read_csv)

    def pictures(self) -> pd.DataFrame:
        return _part(self.path / "pictures.parquet", pd.read_parquet)

    def text(self, name: str) -> str:
        return _part(self.path / name, Path.read_text)


def _part(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: take the whole record") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a readable {file.suffix[1:].title()} file (cut off?)") from error


def read_record(path: Path) -> Record:
    """Read a record; nothing it names is built.

    Raises:
        UserError: no record, of a newer format, not readable, or its config names a target that is not allowed.
    """
    from facemask.config import read_config

    if not (path / "record.json").exists():
        raise UserError(f"{path} holds no record.json: give a folder that `facemask record` wrote")
    info = _part(path / "record.json", lambda file: json.loads(file.read_text()))
    version = info.get("format") if isinstance(info, dict) else None
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{path / 'record.json'} names no format: it was not written by `facemask record`")
    if version > FORMAT:
        raise UserError(f"{path} is a record of format {version}, facemask here reads up to {FORMAT}: update facemask")
    config = read_config(path / "config.yaml")
    claims, runs, resamples = read_yaml(path / "claims.yaml"), info.get("runs"), flat(config).get("evaluate.resamples")
    named = re.fullmatch(NAME, str(info.get("name"))) and isinstance(runs, dict) and runs
    # names become paths, and must not lead out of the folder
    if not (named and all(map(_is_run, runs, runs.values())) and isinstance(claims, list)):
        raise UserError(f"{path} has no name, runs or claims in the form that `facemask record` writes")
    if odd := [claim for claim in claims if not _is_claim(claim)]:
        raise UserError(f"{path / 'claims.yaml'} holds {str(odd[0])[:100]}, which is no claim")
    if not (isinstance(resamples, int) and 1 <= resamples <= MOST_RESAMPLES):
        raise UserError(
            f"{path / 'config.yaml'}: evaluate.resamples={resamples}, but at most {MOST_RESAMPLES:,} are drawn"
        )
    return Record(path, info, config, claims)


def _is_run(name: str, facts: Any) -> bool:
    right = isinstance(facts, dict) and name in (f"seed{facts.get('seed')}", f"fold{facts.get('fold')}")
    return right and re.fullmatch(r"(seed|fold)\d+", name) is not None


def _is_claim(claim: Any) -> bool:
    name = claim.get("claim") if isinstance(claim, dict) else None
    return isinstance(name, str) and isinstance(claim.get("value"), str if name.startswith("weights/") else float)


def record_paths(experiments: Path) -> list[Path]:
    """The folders of all records, by name; one without SHA256SUMS and record.json is none."""
    return [path for path in sorted(experiments.glob("*")) if any((path / n).exists() for n in (SUMS, "record.json"))]


def all_records(experiments: Path) -> list[Record]:
    """Every record below `experiments`, by name."""
    return [read_record(path) for path in record_paths(experiments)]


def changed_files(path: Path) -> list[str]:
    """What SHA256SUMS says about the files of a record: one sentence for each that is changed, gone or new."""
    try:
        pairs = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
        expected = {name: digest for digest, name in pairs}
    except (OSError, ValueError):
        return [f"{SUMS} is missing or cannot be read"]
    files = [file for file in path.rglob("*") if not file.is_dir() and file != path / SUMS]
    found = {file.relative_to(path).as_posix(): file_sha256(file) for file in files}
    return [
        *(f"{name} was changed: its sha256 is not the recorded one"
          for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]),
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is no part of the record" for name in sorted(found.keys() - expected.keys())),
    ]  # fmt: skip


# -- numbers ----------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and the 95 % t-interval of the mean; no interval of one value, or of equals."""
    from scipy.special import stdtrit

    n = len(values)
    if min(values) == max(values):
        return {"mean": values[0], "std": 0.0 if n > 1 else None, "low": None, "high": None, "n": n}
    mean, std = statistics.mean(values), statistics.stdev(values)
    half = float(stdtrit(n - 1, 0.975)) * std / n**0.5
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half, "n": n}


def audit(pictures: pd.DataFrame, run: str) -> dict[str, Any]:
    """What a run's splits hold: pictures of each class, and test pictures of a group that train has too."""
    split = pictures[f"split/{run}"]
    counts = pd.crosstab(split, pictures["label"])
    shared = (split == "test") & pictures["group"].isin(pictures["group"][split == "train"])
    return {"counts": counts.to_dict("index"), "test_with_a_copy_in_train": int(shared.sum())}


def summarise(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{split: {head: {metric: `mean_interval` over the runs}}}; of one run its own interval over pictures."""
    first, *others = metrics.values()
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for split, heads in first.items():
        for head, entry in heads.items():
            for metric in SCALARS:
                entries = [entry[metric], *(other[split][head][metric] for other in others)]
                if any(e["value"] is None for e in entries):
                    continue
                result: dict[str, Any] = mean_interval([e["value"] for e in entries])
                if not others:
                    result |= {"low": entry[metric]["low"], "high": entry[metric]["high"]}
                summary.setdefault(split, {}).setdefault(head, {})[metric] = result
    return summary


def make_claims(
    metrics: Mapping[str, Mapping[str, Any]], curves: Mapping[str, pd.DataFrame], weights: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The claims of a record from its runs' metrics and curves, and from the sha256 of their weights."""
    entries = {
        f"{split}/{head}/{metric}": entry[metric]
        for split, heads in summarise(metrics).items()
        for head, entry in heads.items()
        for metric in CLAIMED
        if metric in entry
    }
    for column in FROM_CURVES:
        if all(column in table for table in curves.values()):
            entries[column] = mean_interval([float(table[column].mean()) for table in curves.values()])
    claims: list[dict[str, Any]] = []
    for name, entry in entries.items():
        numbers = {key: entry[key] for key in ("std", "low", "high") if entry[key] is not None}
        tolerance = dict(TOLERANCE_NLL if name.endswith("/nll") else TOLERANCE)
        claims.append({"claim": name, "value": entry["mean"], **numbers, "tier": "metrics", "tolerance": tolerance})
    return claims + [{"claim": f"weights/{run}", "value": digest, "tier": "train"} for run, digest in weights.items()]


# -- writing ----------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A finished run folder, with the paths of this machine replaced."""

    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    summary: dict[str, Any]
    checkpoints: dict[str, Any]
    split: pd.DataFrame
    frame: pd.DataFrame
    classes: list[str]
    diff: str

    @property
    def fold(self) -> int | None:
        return self.config["data"].get("fold")


def record(
    run_dirs: Sequence[Path],
    name: str,
    experiments: Path,
    fingerprint: Callable[[pd.DataFrame], str],
    allow_dirty: bool = False,
    selection: str = "",
) -> Path:
    """Write `experiments/<name>/` from finished runs that differ in their seed or in their fold; returns it.

    Args:
        fingerprint: of a table with path, label, split, sha256 (`facemask.data.splits.fingerprint`).
        allow_dirty: record runs of uncommitted code, and their changes with them.
        selection: how the options of the runs were found, in a sentence.

    Raises:
        UserError: a run is not finished or was changed, runs do not belong together, the code was not committed, or
            there is a record of this name already.
    """
    target = experiments / name
    if not re.fullmatch(NAME, name):
        raise UserError(f"--name {name} must be one word of letters, digits, _, - and .")
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: remove it first, or choose another --name")
    runs = _named([_read_run(path, fingerprint) for path in run_dirs])
    first = next(iter(runs.values()))
    git = first.provenance["git"]
    if git["commit"] is None or (git["dirty"] and not allow_dirty):
        nobody = f"{first.path} was trained by code that is in no commit, so nobody else has it"
        raise UserError(f"{nobody}: commit and train again, or record the changes, too, with --allow-dirty")
    if (ROOT / f"conf/experiment/{name}.yaml").exists() and f"experiment={name}" not in first.provenance["overrides"]:
        raise UserError(f"--name {name} is for runs of experiment={name}, and {first.path} is none: choose another")
    resamples = first.config["evaluate"]["resamples"]
    metrics = {run: evaluate(part.frame, part.classes, resamples=resamples) for run, part in runs.items()}
    experiments.mkdir(parents=True, exist_ok=True)
    for leftover in experiments.glob(f".{name}.*.part"):  # of one that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=experiments, prefix=f".{name}.", suffix=".part") as made:
        scratch = Path(made) / name
        for run, part in runs.items():
            folder = scratch / "runs" / run
            folder.mkdir(parents=True)
            predictions.write_predictions(folder / "predictions.parquet", part.frame, part.classes)
            write_text(folder / "metrics.json", json.dumps(metrics[run]) + "\n")
            shutil.copyfile(part.path / "curves.csv", folder / "curves.csv")
        write_text(scratch / "config.yaml", yaml.safe_dump(first.config, sort_keys=False, allow_unicode=True))
        versions = first.provenance["versions"]
        write_text(scratch / "versions.txt", "".join(f"{key}=={value}\n" for key, value in versions.items()))
        if git["dirty"]:
            write_text(scratch / "diff.patch", first.diff)
        pictures = _pictures(runs)
        pictures.to_parquet(scratch / "pictures.parquet", index=False, compression="zstd", compression_level=19)
        write_json(scratch / "record.json", _info(name, runs, metrics, pictures, selection))
        weights = {run: part.summary["weights_sha256"] for run, part in runs.items()}
        curves = {run: pd.read_csv(part.path / "curves.csv") for run, part in runs.items()}
        text = "# Every number that README.md prints; `facemask reproduce` checks them.\n"
        claims = make_claims(metrics, curves, weights)
        write_text(scratch / "claims.yaml", text + yaml.safe_dump(claims, sort_keys=False))
        write_text(scratch / "README.md", readme(read_record(scratch)))
        files = sorted(file.relative_to(scratch).as_posix() for file in scratch.rglob("*") if file.is_file())
        if (size := sum((scratch / file).stat().st_size for file in files)) > MOST_BYTES:
            largest = max(files, key=lambda file: (scratch / file).stat().st_size)
            much = f"the record would take {size:,} bytes (most of them {largest}) and may take {MOST_BYTES:,}"
            raise UserError(f"{much}: record fewer runs under one name, or runs with evaluate.splits=[test]")
        write_text(scratch / SUMS, "".join(f"{file_sha256(scratch / file)}  {file}\n" for file in files))
        scratch.replace(target)  # whole or not at all
    return target


def describe_run(
    path: Path, fingerprint: Callable[[pd.DataFrame], str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What record.json, config.yaml and the metrics of each run would be in a record of one finished run.

    Raises:
        UserError: the run is not finished, or was changed.
    """
    runs = _named([_read_run(path, fingerprint)])
    ((name, part),) = runs.items()
    metrics = {name: evaluate(part.frame, part.classes, resamples=part.config["evaluate"]["resamples"])}
    return _info(part.summary["name"], runs, metrics, _pictures(runs), ""), part.config, metrics


def _read_run(path: Path, fingerprint: Callable[[pd.DataFrame], str]) -> _Run:
    if RunFolder(path).status().get("state") != "finished":
        raise UserError(f"{path} holds no finished run: finish it with resume=true, or name another folder")
    from facemask.config import read_config

    config = read_config(path / "config.yaml")
    try:
        files = [json.loads((path / f"{name}.json").read_text()) for name in ("provenance", "summary", "checkpoints")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} lacks a file of a finished run, or it is broken ({error})") from error
    provenance, summary, checkpoints = files
    split = pd.read_csv(path / "split.csv", dtype={"path": str, "label": str, "group": str}, keep_default_na=False)
    if not set(FACTS) <= set(split) or "weights_sha256" not in summary or "overrides" not in provenance:
        raise UserError(f"{path} was made by an older facemask that kept too little: train it again")
    if fingerprint(split) != provenance["fingerprint"]:
        raise UserError(f"{path / 'split.csv'} is not the split that the run was trained on: train it again")
    for name, digests in checkpoints.items():
        file = path / "checkpoints" / name
        if file.exists() and file_sha256(file) != digests["sha256"]:
            raise UserError(f"{file} was changed since the run ended (its sha256 differs): train it again")
    frame, classes = predictions.read_predictions(path / "predictions.parquet")
    short = split["group"].str[:12]  # sha256, mostly: 12 characters tell groups apart in a quarter of the space
    if short.nunique() == split["group"].nunique():
        frame, split = frame.assign(group=frame["group"].str[:12]), split.assign(group=short)
    places = places_of(path, config)
    provenance["command"] = " ".join(_quoted(neutral(token, places)) for token in shlex.split(provenance["command"]))
    provenance["overrides"] = [neutral(token, places) for token in provenance["overrides"]]
    provenance["environment"] = neutral(provenance["environment"], places)
    summary["notes"] = [" ".join(neutral(note.split(" "), places)) for note in summary["notes"]]
    diff = (path / "diff.patch").read_text() if provenance["git"]["dirty"] else ""
    return _Run(path, neutral(config, places), provenance, summary, checkpoints, split, frame, classes, diff)


def _named(parts: list[_Run]) -> dict[str, _Run]:
    """The runs by name, in order. Raises UserError where they do not belong to one record."""
    first, *others = parts
    for part in others:
        keys = set(config_differences(first.config, part.config)) - MAY_DIFFER
        keys |= {f"git.{key}" for key in config_differences(first.provenance["git"], part.provenance["git"])}
        if {"git.commit"} == {key for key in keys if key.startswith("git.")} and first.provenance["git"].get("trees"):
            keys -= {"git.commit"}  # a commit of records or tests, between two runs of the same code
        # a package that joined the environment between two runs is no other version
        old, new = first.provenance["versions"], part.provenance["versions"]
        keys |= {f"versions.{name}" for name in old.keys() & new.keys() if old[name] != new[name]}
        keys |= {name for name in ("classes", "diff") if getattr(part, name) != getattr(first, name)}
        if keys:
            odd = f"{part.path} and {first.path} differ in {', '.join(sorted(keys)[:5])}"
            raise UserError(f"{odd}: runs of one record may differ in seed or data.fold alone; use several names")
    seeds, folds = {part.config["seed"] for part in parts}, {part.fold for part in parts}
    if len(seeds) > 1 and len(folds) > 1:
        raise UserError("the runs differ in seed and in data.fold: a record is over seeds or over folds, not both")
    over_folds = None not in folds and len(seeds) == 1
    named = {f"fold{part.fold}" if over_folds else f"seed{part.config['seed']}": part for part in parts}
    if len(named) < len(parts):
        raise UserError("two of the runs have the same seed and fold: name each run once")
    return dict(sorted(named.items(), key=lambda item: int(item[0][4:])))


def _info(
    name: str,
    runs: Mapping[str, _Run],
    metrics: Mapping[str, Mapping[str, Any]],
    pictures: pd.DataFrame,
    selection: str,
) -> dict[str, Any]:
    first = next(iter(runs.values()))
    return {
        "format": FORMAT,
        "name": name,
        "selection": selection,
        "over": None if len(runs) == 1 else next(iter(runs))[:4],
        "classes": first.classes,
        "reported_head": first.summary["reported_head"],
        "git": first.provenance["git"],
        "platform": first.provenance["platform"],
        "data": {key: first.summary["data"][key] for key in ("left_out", "not_in_split_file")},
        "test_opened": max(part.summary["test_opened"] for part in runs.values()),
        "runs": {
            run: {
                **{key: part.provenance[key] for key in ("command", "overrides", "hardware", "environment")},
                **{key: part.summary[key] for key in ("weights_sha256", "training", "test_opened", "notes")},
                "seed": part.config["seed"],
                "fold": part.fold,
                "fingerprint": part.provenance["fingerprint"],
                "audit": audit(pictures, run),
                "checkpoints": part.checkpoints,
                "teacher": part.summary["distillation"],
            }
            for run, part in runs.items()
        },
        "summary": summarise(metrics),
    }


def _pictures(runs: Mapping[str, _Run]) -> pd.DataFrame:
    facts = pd.concat([part.split[FACTS] for part in runs.values()]).drop_duplicates("path")
    for run, part in runs.items():
        column = part.split.set_index("path")["split"].rename(f"split/{run}")
        facts = facts.join(column, on="path")
    return facts.sort_values("path", ignore_index=True)


def readme(record: Record) -> str:
    """README.md of a record; every result in it is a claim."""
    info = record.info
    n, first = len(record.runs), next(iter(info["runs"].values()))
    many = f"Mean over {n} {info['over']}s and its 95 % t-interval (none where all are equal)"
    spread = many if n > 1 else "One run; 95 % intervals over pictures"
    lines = [
        f"# {record.name}",
        "",
        f"Written by `facemask record`; checked by `facemask reproduce {record.name}`. Nothing here is typed by hand.",
        "",
        *dict.fromkeys(f"    {run['command']}" for run in info["runs"].values()),
        "",
        *_table(record),
        "",
        f"{spread}. Accuracies in %. \\* the reported head.",
        *_data_lines(record),
        f"The test split had been opened {info['test_opened']} time(s), these runs included, by the ledger of the "
        "clone that made the record.",
        *([info["selection"]] if info.get("selection") else []),
    ]
    facts = {claim["claim"]: claim["value"] for claim in record.claims}
    if set(FROM_CURVES) <= facts.keys():
        differed, agreed = (facts[name] for name in FROM_CURVES)
        lines.append(
            f"On the training views the teacher's decision differed from the label on {differed:.2%}; student and "
            f"teacher agreed on {agreed:.2%}."
        )
    dirty = ", with the changes in diff.patch" if info["git"]["dirty"] else ""
    hardware = f"{first['hardware']['processor']}, {first['hardware']['torch_threads']} thread(s)"
    lines += [
        "",
        f"Trained on {hardware}, {first['training']['precision']}, by commit {info['git']['commit']}{dirty}. "
        "sha256 of the weights:",
        "",
        *(f"- {name.split('/')[1]}: `{facts[name]}`" for name in facts if name.startswith("weights/")),
        "",
    ]
    return "\n".join(lines)


def _data_lines(record: Record) -> list[str]:
    """Splits and their leaks, one line for all runs that are alike."""
    lines = []
    for run in record.info["runs"].values():
        counts = {split: sum(labels.values()) for split, labels in run["audit"]["counts"].items()}
        sizes = ", ".join(f"{split} {counts[split]:,}" for split in ("train", "val", "test") if split in counts)
        leaked = run["audit"]["test_with_a_copy_in_train"]
        lines.append(f"Pictures: {sizes}; {leaked:,} test pictures have a near-duplicate in train.")
    return list(dict.fromkeys(lines))


def _table(record: Record) -> list[str]:
    claims = {claim["claim"]: claim for claim in record.claims}
    heads = [head for head in ROWS if any(name.split("/")[1:2] == [head] for name in claims)]
    splits = [split for split in ("train", "val", "test") if any(f"{split}/{head}/nll" in claims for head in heads)]
    names = [(split, metric) for split in splits for metric in CLAIMED]
    marks = {head: " \\*" if head == record.info["reported_head"] else "" for head in heads}
    cells = {head: [cell(claims.get(f"{split}/{head}/{metric}"), metric) for split, metric in names] for head in heads}
    rows = [[title(head, heads) + marks[head], *cells[head]] for head in heads]
    return markdown(["", *(f"{split} {CLAIMED[metric]}" for split, metric in names)], rows)


def cell(claim: Mapping[str, Any] | None, metric: str) -> str:
    """A claim as the README prints it: ``98.7 [97.9, 99.3]``; a t-interval ends where accuracies do."""
    if claim is None or metric == "nll" or "low" not in claim:
        return number(claim and {"low": None, **claim}, percent=metric != "nll")
    return number({**claim, "low": max(0.0, claim["low"]), "high": min(1.0, claim["high"])}, percent=True)


# -- paths of this machine --------------------------------------------------------------------------------------


def places_of(run_dir: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Paths of this machine and what stands for them, longest first."""
    names = [
        (str(run_dir), "$RUN_DIR"),
        (config["run_dir"], "$RUN_DIR"),
        (config["cache_dir"], "$CACHE_DIR"),
        (config["ledger"], "$LEDGER"),
        (config["data"].get("root"), "$FACEMASK_DATA"),
    ]
    both = {form: name for path, name in names if path for form in (str(path).rstrip("/"), str(Path(path).absolute()))}
    return sorted([*both.items(), (str(Path.cwd()), ".")], key=lambda item: -len(item[0]))


def neutral(value: Any, places: Sequence[tuple[str, str]]) -> Any:
    """A config, or a command's argument, without paths of this machine: of an unknown one its last part stays."""
    if isinstance(value, dict):
        return {key: neutral(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [neutral(part, places) for part in value]
    if not isinstance(value, str):
        return value
    for path, name in places:
        value = re.sub(rf"(?<![^\s=,'\"\[(]){re.escape(path)}(?=$|[/\s,'\")\]])", name, value)
    return re.sub(r"(?<![^\s=,'\"\[(:])(?:file://)?/(?:[^/,'\"=]+/)+([^/,'\"\])]+)", r"$FILE/\1", value)


def _quoted(token: str) -> str:
    return f'"{token}"' if "$" in token else shlex.quote(token)


def config_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Keys at which two configs differ."""
    a, b = flat(first), flat(second)
    return sorted(key for key in a | b if a.get(key, flat) != b.get(key, flat))
