"""The storage of sweeps: an Optuna database that may be away for a while."""

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from facemask.errors import DISK_FULL, UserError

PRUNED = 4  # exit code of a run that was pruned
TRIAL = "FACEMASK_TRIAL"  # variable with what `facemask.trial.Report` needs; a config would be published
PATIENCE = 300.0  # seconds that a storage may be away
T = TypeVar("T")


def open_storage(url: str, **options: Any) -> Any:
    """The Optuna storage of a URL; `options` as of `optuna.storages.RDBStorage`.

    Raises:
        UserError: the driver is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    engine: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=engine, **options)
    except ImportError as error:
        raise UserError(f"{hidden(url)} needs a driver: pip install 'facemask[postgresql]'") from error


def hidden(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        known = "sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
        raise UserError(f"sweep.storage is no URL of a database: give {known}") from error


def patiently(call: Callable[[], T], what: str, patience: float | None = None) -> T:
    """Call again while the storage cannot be reached; the call must be one that may happen twice.

    Args:
        what: the storage, for the sentence.
        patience: seconds; default: `PATIENCE`.

    Raises:
        UserError: it was away for too long, or its disk is full.
    """
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    start, said = time.monotonic(), False
    while True:
        try:
            return call()
        except (StorageInternalError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
            reason = " ".join(str(error.__cause__ or error).split("\n(Background")[0].split())[:200]
            away = f"{what} cannot be reached ({reason})"
            if "disk is full" in reason or "No space left" in reason:
                raise UserError(f"{what}: {DISK_FULL}") from error
            if time.monotonic() - start >= (PATIENCE if patience is None else patience):
                raise UserError(f"{away}: nothing is lost, give the same command again when it is back") from error
            if not said:
                print(f"note: {away}, trying again", file=sys.stderr, flush=True)
                said = True
            time.sleep(2)
