"""Whether a record holds: each claim recomputed from the stored predictions, or judged against new ones; no torch.

PASS    the number is the recorded one (to 1e-9; a hash: exactly)
DRIFT   it is not, but other hardware, versions or code explain it: it lies within the claim's tolerance (tier predict)
        or within the 95 % prediction interval that the recorded seeds or folds give for one more (tier train)
FAIL    anything else; also a number that moved although nothing else differs: the same command gives the same bits
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from facemask.errors import UserError
from facemask.runs.metrics import evaluate
from facemask.runs.record import (
    FILES,
    OF_RUN,
    SUMS,
    Record,
    audit,
    make_claims,
    mean_interval,
    readme,
    summarise,
)

EXACT = 1e-9
EXIT_CODES = {"FAIL": 1, "ERROR": 2, "DRIFT": 3, "PASS": 0}  # the worst first


@dataclass(frozen=True)
class Verdict:
    claim: str
    verdict: str
    text: str


def worst(verdicts: Sequence[Verdict]) -> str:
    found = {verdict.verdict for verdict in verdicts}
    return next(name for name in EXIT_CODES if name in found or name == "PASS")


def same(first: Any, second: Any) -> bool:
    """Whether two values of JSON agree, numbers to an absolute tolerance of `EXACT`."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second)]
    return abs(first - second) <= EXACT if all(numbers) else type(first) is type(second) and first == second


# -- tier metrics -----------------------------------------------------------------------------------------------


def recompute(record: Record) -> dict[str, dict[str, Any]]:
    """Metrics of every run from its stored predictions."""
    tables = {run: record.predictions(run) for run in record.runs}
    columns = set(next(iter(tables.values()))[0].columns.astype(str))
    for run, (frame, _) in tables.items():
        if odd := columns ^ set(frame.columns.astype(str)):
            raise UserError(f"{record.path}: the predictions of {run} and others do not agree on {sorted(odd)[0]!r}")
    resamples = record.config["evaluate"]["resamples"]
    return {run: evaluate(*table, resamples=resamples) for run, table in tables.items()}


def check_claims(record: Record, metrics: Mapping[str, Any]) -> list[Verdict]:
    """Every claim, with its tier and tolerances, against what follows from predictions, curves and runs."""
    curves = {run: record.curves(run) for run in record.runs}
    weights = {run: facts["weights_sha256"] for run, facts in record.info["runs"].items()}
    expected = {claim["claim"]: claim for claim in make_claims(metrics, curves, weights)}
    verdicts, seen = [], set()
    for claim in record.claims:
        name = claim["claim"]
        if name not in expected or name in seen:
            verdicts.append(Verdict(name, "FAIL", "claimed twice" if name in seen else "nothing here supports it"))
            continue
        seen.add(name)
        wrong = _differing(claim, expected[name], " in claims.yaml")
        value = expected[name]["value"]
        text = "; ".join(wrong) or (value if isinstance(value, str) else f"{value:.6f}")
        verdicts.append(Verdict(name, "FAIL" if wrong else "PASS", text))
    gone = "the README prints it and claims.yaml lacks it"
    return verdicts + [Verdict(name, "FAIL", gone) for name in expected if name not in seen]


def contradictions(record: Record, metrics: Mapping[str, Any], fingerprint: Callable[[pd.DataFrame], str]) -> list[str]:
    """Where the files of a record contradict each other, one sentence each: found even if every sum was redone."""
    found, pictures, info = [], record.pictures(), record.info
    known = {*FILES, SUMS, *(f"runs/{run}/{name}" for run in info["runs"] for name in OF_RUN)}
    known |= {"diff.patch"} if info["git"]["dirty"] else set()
    files = (file for file in record.path.rglob("*") if file.is_symlink() or not file.is_dir())
    there = {file.relative_to(record.path).as_posix() for file in files}
    found += [f"{name} is no part of a record" for name in sorted(there - known)]
    for run, facts in info["runs"].items():
        place = f"runs/{run}/predictions.parquet"
        used = pictures[pictures[f"split/{run}"].notna()].rename(columns={f"split/{run}": "split"})
        if fingerprint(used) != facts["fingerprint"]:
            found.append(f"pictures.parquet: pictures, labels or splits are not those of the fingerprint of {run}")
        if facts["weights_sha256"] not in {file["weights_sha256"] for file in facts["checkpoints"].values()}:
            found.append(f"record.json: no checkpoint of {run} has its weights_sha256")
        frame, classes = record.predictions(run)
        if classes != info["classes"]:
            found.append(f"{place}: the classes {', '.join(classes)} are not those of record.json")
        wanted = used[used["split"].isin(record.config["evaluate"]["splits"])].rename(columns={"path": "id"})
        rows, expected = (pd.MultiIndex.from_frame(t[["id", "split", "label", "group"]]) for t in (frame, wanted))
        for text, few in (("lacks", expected.difference(rows)), ("has no picture for", rows.difference(expected))):
            if len(few):
                found.append(f"{place} {text} {len(few)} prediction(s), such as {', '.join(map(str, few[0]))}")
        if (twice := frame["id"][frame["id"].duplicated()]).size:
            found.append(f"{place} has two predictions for {twice.iloc[0]}")
        found += [f"runs/{run}/metrics.json: {text}" for text in _differing(record.metrics(run), metrics[run])]
        found += [f"record.json: {run}.audit.{text}" for text in _differing(facts["audit"], audit(pictures, run))]
    follows = {"summary": summarise(metrics), "test_opened": max(run["test_opened"] for run in info["runs"].values())}
    found += [f"record.json: {text}" for text in _differing({key: info[key] for key in follows}, follows)]
    if record.text("README.md") != readme(record):
        found.append("README.md is not what follows from claims.yaml and record.json")
    return found


def _differing(stored: Any, expected: Any, where: str = "", key: str = "", most: int = 5) -> list[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        names = sorted(stored.keys() | expected.keys())
        parts = [_differing(stored.get(name), expected.get(name), where, f"{key}.{name}") for name in names]
        return [text for part in parts for text in part][:most]
    if isinstance(stored, list) and isinstance(expected, list) and len(stored) == len(expected):
        return _differing(dict(enumerate(stored)), dict(enumerate(expected)), where, key)
    return [] if same(stored, expected) else [f"{key[1:]} is {stored}{where}, and {expected} follows from the rest"]


# -- tiers predict and train ------------------------------------------------------------------------------------


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval for one further value of a normal sample: mean ± t(n-1) s sqrt(1 + 1/n) (Hahn & Meeker 1991).

    None where the sample cannot tell: a single value, or all alike.
    """
    entry = mean_interval(values)
    if entry["low"] is None:
        return None
    mean, high = entry["mean"], entry["high"]
    half = (high - mean) * (len(values) + 1) ** 0.5
    return mean - half, mean + half


def judge(
    record: Record, run: str, frame: pd.DataFrame, tier: str, must_be_equal: bool, weights: str | None = None
) -> list[Verdict]:
    """The claims of one run against new predictions of it.

    Args:
        frame: new predictions; claims on heads that it lacks are left out.
        tier: predict or train.
        must_be_equal: nothing but the numbers differs, so any other number is a FAIL.
        weights: sha256 of the weights that were trained.
    """
    found = evaluate(frame, record.info["classes"], resamples=100)  # values do not depend on the number of resamples
    stored = {name: record.metrics(name) for name in record.runs}
    verdicts = []
    for claim in record.claims:
        split, _, rest = claim["claim"].partition("/")
        if split == "weights" and rest == run and weights is not None:
            equal = claim["value"] == weights
            verdict = "PASS" if equal else "FAIL" if must_be_equal else "DRIFT"
            verdicts.append(Verdict(claim["claim"], verdict, weights if equal else f"{weights}, not {claim['value']}"))
        head, _, metric = rest.partition("/")
        if head not in found.get(split, {}):
            continue
        new, old = (numbers[split][head][metric]["value"] for numbers in (found, stored[run]))
        interval = prediction_interval([numbers[split][head][metric]["value"] for numbers in stored.values()])
        if tier == "predict" or interval is None:
            tolerance = claim["tolerance"][tier]
            inside, why = abs(new - old) <= tolerance, f"tolerance {tolerance}"
        else:
            inside = interval[0] <= new <= interval[1]
            why = f"prediction interval {interval[0]:.6f} to {interval[1]:.6f}"
        if inside and must_be_equal:
            why = "nothing else differs, so it must be equal"
        verdict = "PASS" if same(new, old) else "DRIFT" if inside and not must_be_equal else "FAIL"
        more = "" if verdict == "PASS" else f" (recorded {old:.6f}; {why})"
        verdicts.append(Verdict(claim["claim"], verdict, f"{new:.6f}{more}"))
    return verdicts


def compare_predictions(record: Record, run: str, frame: pd.DataFrame) -> tuple[float, list[str]]:
    """Largest difference of any logit of the shared heads, and the pictures whose decision flipped (reported head).

    Raises:
        UserError: other pictures were predicted.
    """
    old, classes = record.predictions(run)
    both = old.merge(frame, on=["id", "split", "label"], how="outer", suffixes=("", ":new"), indicator=True)
    if (both["_merge"] != "both").any():
        raise UserError(f"{(both['_merge'] != 'both').sum()} predictions are of other pictures than those of {run}")
    shared = [name for name in old.columns if name.startswith("logit/") and f"{name}:new" in both]
    names = [f"logit/{record.info['reported_head']}/{name}" for name in classes]
    if not set(names) <= set(shared):
        raise UserError(f"{names[0]} was not predicted: the checkpoint is of another model than {record.path}")
    gap = max(float((both[name] - both[f"{name}:new"]).abs().max()) for name in shared)
    before, after = (both[[n + end for n in names]].to_numpy().argmax(axis=1) for end in ("", ":new"))
    flips = [
        f"{row.id} ({row.split}, {row.label}): {classes[a]} -> {classes[b]}"
        for row, a, b in zip(both.itertuples(), before, after, strict=True)
        if a != b
    ]
    return gap, flips


# -- what differs -----------------------------------------------------------------------------------------------


def software_differences(record: Record, here: Mapping[str, Any]) -> list[str]:
    """Code and versions that differ from `facemask.runs.provenance.code_and_versions`, one line each."""
    lines, git = [], record.info["git"]
    if here["git"]["trees"] != git["trees"] or here["git"]["dirty"] or git["dirty"]:
        state = " with uncommitted changes" if here["git"]["dirty"] else ""
        lines.append(f"code: commit {here['git']['commit']}{state} here, {git['commit']} in the record")
    stored = record.text("versions.txt").splitlines()
    versions = {"python": record.info["platform"]["python"], **dict(line.partition("==")[::2] for line in stored)}
    now = {"python": here["platform"]["python"], **here["versions"]}
    other = [(name, now.get(name, "not installed"), old) for name, old in versions.items() if now.get(name) != old]
    return lines + [f"versions: {name} {new} here, {old} in the record" for name, new, old in other]


def hardware_differences(record: Record, run: str, here: Mapping[str, Any]) -> list[str]:
    """Hardware and environment that differ from a run's provenance, one line each."""
    facts = record.info["runs"][run]
    lines = []
    for part, keys in (("hardware", ("processor", "capability", "torch_threads", "gpus")), ("environment", None)):
        old, new = facts[part], here[part]
        for key in keys or sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and new.get(key) != "set" and old.get(key) != "set":
                lines.append(f"{part}: {key} {new.get(key)} here, {old.get(key)} in the record")
    return lines
