"""The study of a sweep: every trial is counted once, whatever is killed.

A trial is created whole (parameters and options of train.py) and claimed under one lock, by a worker that renews its
heartbeat while it trains. A trial whose worker is gone is claimed again under its own number and goes on in its run
folder, so a study never has more trials than asked for and none twice. Optuna's own loop would give a retry another
number, create more than asked for beside other workers, and lose what is killed between two of its steps.
"""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
import yaml
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState

from facemask.config import as_plain
from facemask.errors import UserError
from facemask.files import write_text
from facemask.runs.storage import hidden, open_storage, patiently
from facemask.space import Space

DEFAULT_STORAGE = "sqlite:///runs/sweeps/{}/study.db"  # as in conf/sweep/_base.yaml
HEARTBEAT, GRACE = 10, 60  # seconds


@contextmanager
def _locked(url: str, name: str) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    parsed = sqlalchemy.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        with FileLock(f"{parsed.database}.lock"):
            yield
    else:
        with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
            yield


def _here() -> str:
    """This machine, or container, within which process numbers mean something."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Study:
    """The Optuna study of a sweep, opened by one process.

    Raises:
        UserError: the storage cannot be reached, or holds another sweep of this name.
    """

    def __init__(self, cfg: DictConfig) -> None:
        sweep = self.sweep = as_plain(cfg.sweep)
        self.name, self.url, self.n_workers = sweep["name"], sweep["storage"], cfg.n_workers
        self.shown = hidden(self.url)
        backend = sqlalchemy.make_url(self.url).get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UserError(f"sweep.storage={self.shown}: choose sqlite:///FILE or postgresql+psycopg://...")
        self.folder = Path(sweep["folder"])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.space = Space(sweep["space"], sweep["when"])
        self.overrides = [*sweep["overrides"], f"name={self.name}", "evaluate.splits=[val]", "resume=true"]
        if not any(override.startswith("augment.seed=") for override in self.overrides):
            self.overrides.append(f"augment.seed={sweep['seed']}")
        self.first = self.space.first(self.overrides)
        self.total = sweep["trials"] or math.inf
        self.mine: set[int] = set()  # numbers of the trials that this process trains
        patiently(self._open, self.shown, 60)
        write_text(self.folder / "sweep.yaml", yaml.safe_dump({**sweep, "storage": self.shown}, sort_keys=False))

    def _open(self) -> None:
        same = ("overrides", "space", "when", "objectives", "directions", "seeds", "seed", "sampler", "pruner")
        asked = {key: self.sweep[key] for key in same}
        with _locked(self.url, self.name):
            self.storage = open_storage(self.url, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            directions = self.sweep["directions"]
            self.study = optuna.create_study(
                study_name=self.name, storage=self.storage, directions=directions, load_if_exists=True
            )
            self.study.set_metric_names(self.sweep["objectives"])
            stored = self.study.user_attrs.get("sweep")
            if stored is None:
                self.study.set_user_attr("sweep", asked)
                self.study.set_user_attr("folder", str(self.folder))
        changes = [f"{key}: {stored[key]} -> {asked[key]}" for key in same if stored and stored[key] != asked[key]]
        if changes:
            raise UserError(
                f"{self.name} is another sweep ({'; '.join(changes)}): give its options, or a new sweep.name"
            )

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def claim(self, may_start: bool) -> FrozenTrial | None:
        """A trial for this process to train: one whose worker is gone, one that waits, or a new one.

        Returns None where there is none now: then all are finished, or others train them.
        """
        with _locked(self.url, self.name):
            trials = self.trials()
            stale = set(self.storage._get_stale_trial_ids(self.study._study_id))
            free = [t for t in trials if t.state == TrialState.WAITING or self._is_lost(t, stale)]
            if not may_start or (not free and len(trials) >= self.total):
                return None
            if free:
                trial = free[0]
            else:
                self.study.add_trial(self._propose(trials))
                trial = self.trials()[len(trials)]
            # A worker that is killed between two of these steps leaves a trial that the next one claims.
            self.storage.set_trial_user_attr(trial._trial_id, "owner", [_here(), os.getpid()])
            self.storage.record_heartbeat(trial._trial_id)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            self.mine.add(trial.number)
            return self.storage.get_trial(trial._trial_id)

    def _is_lost(self, trial: FrozenTrial, stale: set[int]) -> bool:
        if trial.state != TrialState.RUNNING or trial.number in self.mine:
            return False
        host, pid = trial.user_attrs["owner"]
        return trial._trial_id in stale or (host == _here() and (pid == os.getpid() or not _lives(pid)))

    def _propose(self, trials: list[FrozenTrial]) -> FrozenTrial:
        """The next trial: in a copy of the study, by a sampler that knows its number, so that it can be created whole
        and is the same whenever it is proposed after the same trials."""
        number = len(trials)
        config = dict(self.sweep["sampler"])
        if "seed" not in config:
            config["seed"] = int(np.random.SeedSequence([self.sweep["seed"], number]).generate_state(1)[0])
        copy = optuna.create_study(directions=self.study.directions, sampler=instantiate(config))
        copy.add_trials(trials)
        if number == 0:
            copy.enqueue_trial(self.first)
        asked = copy.ask()
        self.space.suggest(asked)
        proposed = copy.trials[number]
        params = [f"{key}={value}" for key, value in proposed.params.items()]
        return optuna.create_trial(
            state=TrialState.WAITING,
            params=proposed.params,
            distributions=proposed.distributions,
            system_attrs={k: v for k, v in proposed.system_attrs.items() if k != "fixed_params"},
            user_attrs={"options": [*self.overrides, *params, *self._threads()], "kills": 0},
        )

    def _threads(self) -> list[str]:
        """Workers that run beside each other share the cores."""
        given = any(override.startswith("threads=") for override in self.overrides)
        if given or self.n_workers == 1:
            return []
        return [f"threads={max(1, len(os.sched_getaffinity(0)) // self.n_workers)}"]

    def beat(self, trial: FrozenTrial) -> bool:
        """Renew the heartbeat; False where the trial was taken for lost and belongs to another worker now."""
        self.storage.record_heartbeat(trial._trial_id)
        return self.storage.get_trial(trial._trial_id).user_attrs["owner"] == [_here(), os.getpid()]

    def tell(self, trial: FrozenTrial, state: TrialState, values: list[float] | None = None, reason: str = "") -> None:
        with _locked(self.url, self.name):  # else one that claims could take it for a trial that nobody trains
            if reason and not self.storage.get_trial(trial._trial_id).state.is_finished():
                self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.study.tell(trial.number, values, state, skip_if_finished=True)


def finished(trials: list[FrozenTrial]) -> int:
    return sum(trial.state.is_finished() for trial in trials)


def status(study: optuna.Study, trials: list[FrozenTrial]) -> str:
    """One line: how many in which state, and the best."""
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    parts = [f"{count} {state.name.lower()}" for state, count in counts.items() if count]
    if counts[TrialState.COMPLETE]:
        best = study.best_trials
        values = " ".join(f"{value:.4g}" for value in best[0].values)
        parts.append(
            f"best {values} (trial {best[0].number})" if len(study.directions) == 1 else f"{len(best)} on front"
        )
    return ", ".join(parts)


def open_study(name: str, storage: str | None) -> optuna.Study:
    """The study of a sweep that there is; without a storage, the one that sweep.py makes by default.

    Raises:
        UserError: there is none of this name.
    """
    url = storage or DEFAULT_STORAGE.format(name)
    database = sqlalchemy.make_url(url).database if hidden(url).startswith("sqlite") else None
    if database is None or Path(database).exists():
        opened = patiently(lambda: open_storage(url), hidden(url), 0)
        names = optuna.get_all_study_names(opened)
        if name in names:
            return optuna.load_study(study_name=name, storage=opened)
    raise UserError(f"{hidden(url)} holds no sweep {name}: give the name of one, and --storage as sweep.storage then")
