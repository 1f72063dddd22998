"""The study of experiments/PROTOCOL.md, from conf/study.yaml: runs in order of importance, each an ordinary train.py in
runs/<study>/<arm>/<run>; and records of them. The page made of these: `runs/study_page.py`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from facemask.config import ROOT, as_plain, check, composed, distills, user_sentence
from facemask.errors import UserError
from facemask.files import read_yaml, write_json
from facemask.parent import followed
from facemask.runs.folder import RunFolder
from facemask.runs.record import read_record, record
from facemask.runs.study_page import kept, own_base, own_options, write_page

SPEC = ROOT / "conf" / "study.yaml"
console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Entry:
    """The runs of one record: name -> fold and seed."""

    record: str
    arm: str
    tier: str
    options: list[str]
    runs: dict[str, tuple[int | None, int]]
    about: dict[str, Any]
    last: list[str]  # of the options, those of the GPU edition


def read_study(spec: dict[str, Any], full: bool = False) -> list[Entry]:
    """All entries, most important first; `full`: with the options of the GPU edition, as another study."""
    found = []
    for part in spec["runs"]:
        folds, seeds = part.get("folds", [None]), part.get("seeds", [0])
        runs = {f"fold{f}_seed{s}" if f is not None else f"seed{s}": (f, s) for f in folds for s in seeds}
        suffix = "-seeds" if folds == [0] else ""
        for arm in part["arms"]:
            base, own = own_base(spec, arm), own_options(spec, arm)
            larger = spec["full"].get(base, []) if full else []
            last = spec["full_arms"].get(arm, []) if full else []
            options = [*spec["bases"][base], *larger, *own, *last]
            if any(option.startswith("data.split=") for option in own) and folds != [None]:
                raise UserError(f"{arm} has a split of its own: give it seeds, and no folds")
            name = f"{_name(spec, full)}-{arm}{suffix}"
            found.append(Entry(name, arm, part["tier"], options, runs, spec["arms"][arm], [*larger, *last]))
    return found


def _name(spec: dict[str, Any], full: bool) -> str:
    return f"{spec['name']}_full" if full else spec["name"]


def config(options: Sequence[str]) -> DictConfig:
    """What options of train.py compose to, checked. Raises UserError where train.py would stop."""
    try:
        cfg = composed(*options)
        check(cfg)
    except HydraException as error:
        raise UserError(f"{' '.join(options)}: {user_sentence(error)}") from error
    return cfg


def matched_smoothing(entropy: float, classes: int) -> float:
    """The label smoothing whose targets, (1 - s) * one-hot + s / C, have this entropy in nats."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import entr

    def missing(s: float) -> float:
        return float(entr(np.array([1 - s + s / classes, *[s / classes] * (classes - 1)])).sum()) - entropy

    return float(brentq(missing, 0, 1)) if missing(1 - 1e-6) > 0 else 1 - 1e-6


def planned(cfg: DictConfig, runs: Sequence[Any], plan: dict[str, Any], asked: set[str]) -> float:
    """CPU-hours of runs, named by fold and seed, of one config; a teacher is fitted and asked once for views that
    several runs share (`asked`), but for its feature maps, which are not kept."""
    pictures = cfg.data.fraction * (0.7 * cfg.data.num_images if "num_images" in cfg.data else plan["pictures"])
    epochs, taught, seconds = cfg.trainer.max_epochs, distills(cfg), 0.0
    for run in runs:
        small = min(cfg.augment.get("small_epochs", 0), epochs)
        each = (epochs - small) * plan["student"][cfg.model.img_size]
        each += small * plan["student"][cfg.augment.small_size] if small else 0
        if taught:
            teacher, said = plan["teacher"][cfg.teacher.img_size], [cfg.data, cfg.augment, cfg.teacher]
            views = json.dumps([*map(as_plain, said), run], sort_keys=True)
            each += epochs * teacher if "Feature" in cfg.distill._target_ or views not in asked else 0
            each += 3 * cfg.teacher.epochs * teacher if cfg.teacher.train != "frozen" and views not in asked else 0
            asked.add(views)
        seconds += plan["start"] + pictures * each / 1000
    return seconds / 3600


def spent(folder: Path) -> float | None:
    """CPU-hours that a finished run trained for, by its own summary; None where it is not finished."""
    if RunFolder(folder).status().get("state") != "finished":
        return None
    threads = RunFolder(folder).provenance()["hardware"]["torch_threads"]
    return json.loads((folder / "summary.json").read_text())["training"]["train_runtime"] * threads / 3600


# -- training ---------------------------------------------------------------------------------------------------


@dataclass
class Driver:
    """Trains and records what is missing."""

    spec_file: Path
    full: bool
    experiments: Path
    workers: int = 2
    allow_dirty: bool = False
    missing_alone: bool = False

    def __post_init__(self) -> None:
        self.spec = read_yaml(self.spec_file)
        self.name = _name(self.spec, self.full)
        self.folder = Path("runs") / self.name
        self.entries = read_study(self.spec, self.full)

    def study(self, data: Path | None, tier: str | None, dry_run: bool = False, tables: bool = False) -> None:
        """Train, record and compare what is missing; the same command goes on after a kill.

        Args:
            data: the pictures, for options that name `data.root`.
            tier: these entries alone.
            dry_run: print the plan alone.
            tables: train nothing; tables of the records there are.

        Raises:
            UserError: uncommitted code; entries whose runs failed, or whose options have changed since they were
                trained, after all others are done.
        """
        from facemask.runs.provenance import code_and_versions

        start = time.monotonic()
        if data is not None:
            os.environ["FACEMASK_DATA"] = str(data.absolute())
        entries = [entry for entry in self.entries if tier in (None, entry.tier) and not tables]
        if self.missing_alone:
            entries = [entry for entry in entries if not (self.experiments / entry.record / "record.json").exists()]
        if entries:
            self.print_plan(entries)
        if dry_run:
            return
        if entries and not self.allow_dirty and code_and_versions()[0]["git"]["dirty"]:
            raise UserError("the code has changes that are in no commit: commit them first, or give --allow-dirty")
        pool, started = ThreadPoolExecutor(self.workers), dict[Path, Future[None]]()
        failed = []
        try:
            for place, entry in enumerate(entries):
                for next_one in takewhile(_plain, entries[place:]):  # so that no worker waits for the last of an entry
                    for folder, at in self.missing(next_one).items():
                        if folder not in started:
                            started[folder] = pool.submit(self.train, folder, next_one.options, *at)
                try:
                    self.entry(entry, started)
                except UserError as error:  # an arm that diverges, say, must not keep the others from being trained
                    failed.append(entry.record)
                    console.print(f"failed    {entry.record}: {error}")
        finally:
            pool.shutdown(cancel_futures=True)
        every = [entry.record for entry in self.entries]
        console.print(f"written   {write_page(self.spec, self.name, every, self.experiments, self.curves)}")
        if entries:
            hours = sum(spent(folder) or 0.0 for folder in {f for entry in entries for f in self.runs(entry)})
            took = (time.monotonic() - start) / 3600
            console.print(f"took      {took:.2f} hours now; {hours:.1f} CPU-hours of training in all finished runs")
        if failed:
            raise UserError(f"{', '.join(failed)}: not recorded, see above; the same command tries them again")

    def print_plan(self, entries: Sequence[Entry]) -> None:
        """Runs left, and CPU-hours planned and spent; a run that two records share is counted once."""
        hours: dict[str, float] = {}
        done, asked, seen = 0.0, set[str](), set[Path]()
        for entry in entries:
            folders = {folder: at for folder, at in self.runs(entry).items() if folder not in seen}
            seen |= folders.keys()
            took = [spent(folder) for folder in folders]
            expected = _planned(entry, list(folders.values()), self.spec["plan"], asked)
            hours[entry.tier] = hours.get(entry.tier, 0.0) + expected
            done += sum(hour or 0.0 for hour in took)
            left = f"{took.count(None)} of {len(took)} runs left"
            cost = "" if self.full else f", {expected:5.2f} CPU-hours"  # known for tiny networks alone
            console.print(f"plan      {entry.tier:9s} {entry.record:32s} {left}{cost}")
        if not self.full:
            console.print("planned   " + ", ".join(f"{tier} {hour:.1f}" for tier, hour in hours.items()) + " CPU-hours")
        console.print(f"spent     {done:.1f} CPU-hours of training in the runs that are finished")

    def runs(self, entry: Entry) -> dict[Path, tuple[int | None, int]]:
        return {self.folder / entry.arm / name: at for name, at in entry.runs.items()}

    def missing(self, entry: Entry) -> dict[Path, tuple[int | None, int]]:
        return {folder: at for folder, at in self.runs(entry).items() if spent(folder) is None}

    def entry(self, entry: Entry, started: Mapping[Path, Future[None]]) -> None:
        """Train an entry's missing runs, or wait for those that are `started`, and record it."""
        missing = self.missing(entry)
        options = [*entry.options, *self.found(entry, bool(missing))]
        cfg = config(options)
        for folder, (fold, seed) in self.runs(entry).items():
            if folder not in missing and folder not in started:  # raises where the list has changed since
                OmegaConf.update(cfg, "seed", seed)
                OmegaConf.update(cfg, "data.fold", fold)
                RunFolder(folder).resume(as_plain(cfg))
        with ThreadPoolExecutor(self.workers) as pool:
            alone = {folder: at for folder, at in missing.items() if folder not in started}
            list(pool.map(lambda folder: self.train(folder, options, *alone[folder]), alone))
        for folder in self.runs(entry):
            if folder in started:
                started[folder].result()
        self.record(entry, list(self.runs(entry)))

    def train(self, folder: Path, options: Sequence[str], fold: int | None, seed: int) -> None:
        own = [f"seed={seed}", *([] if fold is None else [f"data.fold={fold}"]), f"run_dir={folder}", "resume=true"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{folder.name}.log"
        console.print(f"train     {folder}")
        with log.open("ab") as file:
            code = _run([str(ROOT / "train.py"), *options, *own], stdout=file, stderr=subprocess.STDOUT)
        if code != 0:
            raise UserError(f"{folder} was not trained (exit code {code}, see {log}): the same command goes on from it")
        console.print(f"finished  {folder}, {60 * (spent(folder) or 0):.1f} CPU-minutes")

    def found(self, entry: Entry, missing: bool) -> list[str]:
        """Options that earlier runs tell: an arm's own best ones, and a smoothing matched to a teacher."""
        if like := entry.about.get("smooth_as"):
            runs = read_record(self.experiments / f"{self.name}-{like}").info["runs"].values()
            entropy = sum(run["teacher"]["teacher_entropy"] for run in runs) / len(runs)
            return [f"optim.label_smoothing={matched_smoothing(entropy, 2):.6f}"]
        if (search := entry.about.get("sweep")) is None:
            return []
        from facemask.runs.sweep_page import ranked
        from facemask.study import open_study

        name, folder = f"{self.name}_{entry.arm}", self.folder / "sweeps" / entry.arm
        if missing:
            own = [option for option in entry.options if not option.startswith("evaluate.splits=")]
            own += ["data.fold=0"] if any(fold == 0 for fold, _ in entry.runs.values()) else []
            own += [*search.get("space", []), *search.get("options", []), *entry.last]
            # in a sweep's config ${data.root} would stand for something of its own
            own = [option.replace("${data.root}", os.environ.get("FACEMASK_DATA", "")) for option in own]
            place = [f"sweep.name={name}", f"sweep.folder={folder}", f"sweep.trials={search['trials']}"]
            code = _run([str(ROOT / "sweep.py"), "sweep=study", f"n_workers={self.workers}", *place, *own])
            if code != 0:
                raise UserError(f"the sweep in {folder} ended with exit code {code}: the same command goes on from it")
        searched = open_study(name, f"sqlite:///{folder}/study.db")
        clocks = [trial.duration.total_seconds() for trial in searched.trials if trial.duration]
        threads = config(entry.options).threads or len(os.sched_getaffinity(0))
        cost = {"trials": len(clocks), "cpu_hours": sum(clocks) * threads / 3600}
        complete = {trial.number: trial.values[0] for trial in ranked(searched)}
        tried = [{"params": t.params, "value": complete.get(t.number)} for t in searched.trials if t.duration]
        self.keep("searches", {entry.arm: {**cost, "tried": tried}})
        return [f"{key}={value}" for key, value in ranked(searched)[0].params.items()]

    def record(self, entry: Entry, folders: Sequence[Path]) -> None:
        """Write the entry's record, unless there is one: then say whether these runs have its weights."""
        from facemask.data.splits import fingerprint

        target = self.experiments / entry.record
        if not (target / "record.json").exists():
            selection = "Tuned on validation: see PROTOCOL.md." if "sweep" in entry.about else ""
            record(folders, entry.record, self.experiments, fingerprint, self.allow_dirty, selection)
            console.print(f"recorded  {target}")
        weights = {json.loads((folder / "summary.json").read_text())["weights_sha256"] for folder in folders}
        same = weights == {run["weights_sha256"] for run in read_record(target).info["runs"].values()}
        if not same:
            console.print(f"kept      {target}: its weights are others; --experiments DIR makes records of these runs")
        self.small_pictures(folders)

    def small_pictures(self, folders: Sequence[Path]) -> None:
        """Keep the test accuracy of a forest that sees 32 x 32 pixels, for the pictures of every run."""
        from facemask.audit import shortcut_predictions
        from facemask.config import read_config
        from facemask.evaluate import build_data
        from facemask.runs.metrics import evaluate

        for folder in folders:
            fingerprint = RunFolder(folder).provenance()["fingerprint"]
            if fingerprint not in kept(self.experiments / self.name, "pixels32"):
                data = build_data(read_config(folder / "config.yaml")["data"])
                data.prepare(["test"])
                numbers = evaluate(shortcut_predictions(data, 0.0), data.classes, resamples=100)
                self.keep("pixels32", {fingerprint: numbers["test"]["pixels"]["accuracy"]["value"]})

    def curves(self, names: Sequence[str]) -> str:
        """Validation accuracy over epochs of records, as SVG."""
        from facemask.dashboard import arms_of, curves
        from facemask.runs.page import SERIES, plot, standalone

        arms = [arm for arm in arms_of(self.experiments) if arm.name in names]
        return standalone(plot(partial(curves, arms, "val/accuracy", SERIES)))

    def keep(self, what: str, facts: Mapping[str, Any]) -> None:
        """Add to what the tables need and no record holds."""
        folder = self.experiments / self.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{what}.json", {**kept(folder, what), **facts})


def _plain(entry: Entry) -> bool:
    """Whether an entry's options are known before any run."""
    return not entry.about.keys() & {"sweep", "smooth_as"}


def _run(command: Sequence[str], **streams: Any) -> int:
    environment = {**os.environ, **followed()}
    return subprocess.run(
        [sys.executable, *command], stdin=subprocess.DEVNULL, env=environment, check=False, **streams
    ).returncode


def _planned(entry: Entry, runs: Sequence[Any], plan: dict[str, Any], asked: set[str]) -> float:
    if "minutes" in entry.about:
        return entry.about["minutes"] * len(runs) / 60
    hours = planned(config(entry.options), runs, plan, asked) if runs else 0.0
    if search := entry.about.get("sweep"):  # whose trials all have the views of one run
        views = [next(iter(entry.runs.values()))] * search["trials"]
        hours += planned(config([*entry.options, *search.get("options", [])]), views, plan, asked)
    return hours
