"""The command `facemask`: what is done with finished runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from facemask.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """What is done with finished runs (training is `python train.py`)."""


@app.command()
def record(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    name: Annotated[str, typer.Option(help="Name of the record, as in conf/experiment/NAME.yaml where there is one.")],
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """Publish a run: copy what its numbers are computed from, without pictures, weights or paths of this machine."""
    from facemask.runs.record import record as write_record

    typer.echo(f"recorded in {write_record(run, name, experiments)}")


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
