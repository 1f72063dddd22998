"""The command `facemask`: what is done with folders of pictures and with finished runs."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from facemask.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


data = typer.Typer(no_args_is_help=True, help="Folders of pictures: scan, split, audit.")
bench = typer.Typer(no_args_is_help=True, help="Measured on this machine, what is compared in turn.")
sweep = typer.Typer(no_args_is_help=True, help="Searches that python sweep.py made: show, finish.")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(sweep, name="sweep")

Manifest = Annotated[
    Path | None, typer.Option(help="CSV or Parquet with path, dup_group and any columns, instead of an own search.")
]
GroupBy = Annotated[list[str] | None, typer.Option(help="Column of the manifest to keep together; may be repeated.")]
CacheDir = Annotated[Path, typer.Option(help="As cache_dir in training.", envvar="FACEMASK_CACHE")]
Rounds = Annotated[int, typer.Option(min=1, help="Pairs of measurements per comparison.")]
Side = Annotated[int, typer.Option(min=32, help="Pixels; a multiple of 16.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures in a step.")]


@app.command()
def record(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs that differ only in seed or data.fold.")],
    name: Annotated[str, typer.Option(help="Name of the record, as in conf/experiment/NAME.yaml where there is one.")],
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Record runs of uncommitted code; the changes are recorded too.")
    ] = False,
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """Publish runs: what their numbers are computed from, without pictures, weights or paths of this machine."""
    from facemask.data.splits import fingerprint
    from facemask.runs.record import record as write_record

    typer.echo(f"recorded in {write_record(runs, name, experiments, fingerprint, allow_dirty)}")


class Tier(StrEnum):
    metrics = "metrics"
    predict = "predict"
    train = "train"


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Names of records.")] = None,
    tier: Annotated[
        Tier,
        typer.Option(help="metrics: from the stored predictions; predict: from a checkpoint; train: one seed again."),
    ] = Tier.metrics,
    every: Annotated[bool, typer.Option("--all", help="Every record there is.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Hash every picture, not only sizes and the newest (predict and train do).")
    ] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="The recorded best.ckpt, for tier predict.")] = None,
    run: Annotated[str | None, typer.Option(help="The run that tier train repeats, such as seed1; the first.")] = None,
    data_root: Annotated[Path | None, typer.Option("--data", help="The pictures, instead of FACEMASK_DATA.")] = None,
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """Check that records hold, claim by claim: PASS, DRIFT or FAIL.

    DRIFT: another number, explained by other hardware, versions or code, and within what the record allows. Exit codes:
    0 all PASS, 3 at least one DRIFT, 1 at least one FAIL, 2 not checked (such as other pictures, or no such record).
    """
    from facemask.reproduce import reproduce as check_record
    from facemask.runs.record import record_paths
    from facemask.runs.reproduce import EXIT_CODES

    paths = record_paths(experiments) if every else [experiments / name for name in names or []]
    if not paths:
        raise UserError("name one or more records, or give --all")
    results = []
    for path in paths:  # one that cannot be checked does not hide the others
        try:
            found = check_record(
                path, tier.value, typer.echo, full=full, checkpoint=checkpoint, run=run, data_root=data_root
            )
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            found = "ERROR"
        results.append(found)
    raise typer.Exit(EXIT_CODES[next(name for name in EXIT_CODES if name in results)])


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where a table is stale.")] = False,
    readme: Annotated[Path, typer.Option(help="File with the markers of the results table.")] = Path("README.md"),
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """Write the README's results and the leaderboard (CSV, HTML, here) from all records."""
    from rich.console import Console

    from facemask.runs.leaderboard import terminal, update

    stale = update(experiments, readme, check)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(terminal(experiments))
    for path in stale:
        typer.echo(f"{path} is stale: facemask report writes it anew" if check else f"written {path}")
    raise typer.Exit(1 if check and stale else 0)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options as of train.py, such as data=folder data.root=OTHER.")
    ] = None,
    exclude_duplicates: Annotated[
        bool, typer.Option("--exclude-duplicates", help="Leave out near-duplicates of the run's training pictures.")
    ] = False,
    classes: Annotated[
        str, typer.Option(help="What other labels mean to the run: masked=with_mask,bare=without_mask.")
    ] = "",
    name: Annotated[str | None, typer.Option(help="Of the new folder below RUN/evaluations.")] = None,
) -> None:
    """Evaluate a run's checkpoint on its own splits again, or on other pictures, and tell how much is lost there."""
    from facemask.evaluate import evaluate as evaluate_run

    pairs = [pair.split("=") for pair in classes.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--classes {classes}: give LABEL=CLASS pairs with commas between them")
    evaluate_run(run, overrides or [], exclude_duplicates=exclude_duplicates, names=dict(pairs), name=name)


@app.command()
def compare(
    arms: Annotated[
        list[Path], typer.Argument(help="Run folders, folders of runs, records, CSV or Parquet; first the reference.")
    ],
    metric: Annotated[str, typer.Option(help="Any metric of a run's report.")] = "accuracy",
    head: Annotated[list[str] | None, typer.Option(help="Once for all arms, or once per arm.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: test, where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page (.html) or all figures (.json).")] = None,
) -> None:
    """Do models differ on the same pictures: these weights, and this recipe?"""
    from rich.console import Console

    from facemask.runs import compare as comparison
    from facemask.runs.page import show

    if out is not None:
        comparison.check_out(out)
    result = comparison.compare(arms, metric, head or [], split)
    page = comparison.page(result)
    show(page, Console(highlight=False, width=None if sys.stdout.isatty() else 120), rows=10)
    if out is not None:
        comparison.write(result, page, out)
        typer.echo(f"written {out}")


@data.command()
def scan(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="One sub-folder of pictures per class.")],
    out: Annotated[Path | None, typer.Option(help="CSV or Parquet file; default: manifest.csv in DIR.")] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Find rotated, noisy and edited copies too (minutes, not seconds).")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Read every file again, whatever its size and time.")] = False,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Write the manifest of a folder: its pictures, what is wrong with them, and which show the same photograph."""
    import time

    from facemask.data.manifest import near_conflicts
    from facemask.data.manifest import scan as scan_pictures

    start = time.monotonic()
    embed = None
    if thorough:
        from facemask.embedding import build_embedder

        embed = build_embedder()
    table = scan_pictures(root, out, cache_dir=cache_dir, thorough=thorough, embed=embed, full=full)
    bad = table[table["problem"] != ""]
    for path, problem in zip(bad["path"][:20], bad["problem"], strict=False):
        typer.echo(f"problem: {path!r}: {problem}")
    if len(bad) > 20:
        typer.echo(f"problem: {len(bad) - 20} more in the manifest")
    sizes = table["dup_group"].value_counts()
    sizes = sizes[sizes > 1]
    conflicts = near_conflicts(table)
    typer.echo(
        f"{len(table)} pictures of {table['label'].nunique()} classes, {len(bad)} with problems; "
        f"{sizes.sum()} pictures in {len(sizes)} groups of near-duplicates (largest {max(sizes, default=0)}), "
        f"{conflicts['dup_group'].nunique()} groups with more than one label; {time.monotonic() - start:.1f} s"
    )
    typer.echo(f"written {out or root / 'manifest.csv'}")


@bench.command("data")
def bench_data(
    root: Annotated[
        Path | None, typer.Option(help="One sub-folder per class; without it faces are drawn.", envvar="FACEMASK_DATA")
    ] = None,
    rounds: Rounds = 7,
    pictures: Annotated[int, typer.Option(min=64, help="At most so many pictures per measurement.")] = 512,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/data.json.")] = Path("experiments"),
) -> None:
    """Loading of training batches: decoded cache and our transforms against torchvision's, in turn, on one core."""
    from facemask.bench import bench_data as run_bench

    typer.echo(f"written {run_bench(root, rounds, pictures, out)}")


@bench.command("scan")
def bench_scan(
    sizes: Annotated[str, typer.Option(help="How many pictures to make and scan.")] = "1000,4000,16000",
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/scan.json.")] = Path("experiments"),
) -> None:
    """A first and a second scan of made pictures, and which of their copies are found."""
    from facemask.bench_scan import bench_scan as run_bench

    counts = sizes.split(",")
    if not all(count.isdecimal() and int(count) >= 2 for count in counts):
        raise UserError(f"--sizes {sizes}: give whole numbers from 2 with commas between them")
    typer.echo(f"written {run_bench([int(count) for count in counts], out)}")


@bench.command("duplicates")
def bench_duplicates(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="One sub-folder of pictures per class.")],
    reference: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="CSV or Parquet with path and the true dup_group.")
    ],
    thorough: Annotated[bool, typer.Option("--thorough", help="As in facemask data scan; both are measured.")] = False,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/duplicates.json.")] = Path("experiments"),
) -> None:
    """Precision and recall of the search for near-duplicates, pair by pair, and its seconds."""
    from facemask.bench_scan import bench_duplicates as run_bench

    typer.echo(f"written {run_bench(root, reference, thorough, out)}")


@bench.command("teacher")
def bench_teacher(
    rounds: Rounds = 9,
    side: Side = 224,
    batch: Batch = 32,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/teacher.json.")] = Path("experiments"),
) -> None:
    """A distilled step on saved logits against one without a teacher and one that asks it, in turn, on the CPU."""
    from facemask.bench import bench_teacher as run_bench

    typer.echo(f"written {run_bench(rounds, side, batch, out)}")


@bench.command("determinism")
def bench_determinism(
    rounds: Rounds = 21,
    side: Side = 112,
    batch: Batch = 32,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/determinism.json.")] = Path("experiments"),
) -> None:
    """What it costs that a command gives the same bits twice: a deterministic step against another, in turn."""
    from facemask.bench import bench_determinism as run_bench

    typer.echo(f"written {run_bench(rounds, side, batch, out)}")


@data.command("split")
def data_split(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="One sub-folder of pictures per class.")],
    out: Annotated[Path, typer.Option(help="File to write: path,label,split.")],
    manifest: Manifest = None,
    group_by: GroupBy = None,
    seed: Annotated[int, typer.Option(help="As data.split_seed in training.")] = 0,
    ratios: Annotated[tuple[float, float, float], typer.Option(help="Shares of train, val, test.")] = (0.7, 0.1, 0.2),
    fold: Annotated[
        str | None, typer.Option(metavar="I/K", help="Fold I of K, from 0, is test; val is a tenth of the rest.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Part of train to keep; 0.1 is contained in 0.25.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace another split in the file.")] = False,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Divide a folder into train, val and test: near-duplicates together, classes alike, the same for the same seed."""
    from facemask.data import splits
    from facemask.data.manifest import load_manifest

    number, count = splits.parse_fold(fold) if fold else (None, 5)
    table = load_manifest(root, manifest, group_by=group_by or (), cache_dir=cache_dir)
    usable = table[table["problem"] == ""]
    for path, problem in zip(table["path"], table["problem"], strict=True):
        if problem:
            typer.echo(f"left out: {path!r} ({problem})")
    divided = splits.split_table(usable, seed, ratios, number, count, fraction)
    splits.write_split(out, divided, force=force)
    typer.echo(splits.count(divided).rename_axis(index=None, columns=None).to_string())
    typer.echo(f"{len(divided):,} pictures in {divided['group'].nunique():,} groups that stay together")
    typer.echo(f"fingerprint {splits.fingerprint(divided)}")
    typer.echo(f"written {out}")


@data.command("audit")
def data_audit(
    root: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="One sub-folder of pictures per class.", show_default=False)
    ] = None,
    split: Annotated[Path | None, typer.Option(help="CSV with path,label,split; the default split without.")] = None,
    manifest: Manifest = None,
    group_by: GroupBy = None,
    synthetic: Annotated[
        int | None, typer.Option(metavar="N", help="Instead of DIR: so many drawn faces, as data=synthetic has them.")
    ] = None,
    degrade: Annotated[float, typer.Option(min=0, max=1, help="The augment.degrade to measure.")] = 0.5,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("audit.html"),
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """What a data set gives away: leaks between splits, labels in conflict, and accuracies without seeing a mask."""
    if (root is None) == (synthetic is None):
        raise UserError("give a folder of pictures, or --synthetic N for drawn faces")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out} cannot be written: name a file in a folder that exists")
    from rich.console import Console

    from facemask import audit
    from facemask.data.datamodule import FolderData, ImageData, SyntheticData
    from facemask.data.transforms import Augmentation
    from facemask.runs.page import show

    pictures: ImageData
    if synthetic is not None:
        source, size = f"{synthetic:,} drawn faces", 64
        pictures = SyntheticData(
            num_images=synthetic, augmentation=Augmentation(0, size), img_size=size, cache_dir=cache_dir
        )
    else:
        source, size = str(root), 224
        pictures = FolderData(
            root=str(root),
            split=str(split) if split else None,
            manifest=str(manifest) if manifest else None,
            group_by=group_by or [],
            on_bad_file="skip",
            augmentation=Augmentation(0, size),
            img_size=size,
            cache_dir=cache_dir,
        )
    pictures.prepare(("test",))
    page = audit.audit(pictures, degrade, f"{source} · {f'split {split}' if split else 'default split'}")
    show(page, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    typer.echo(f"written {page.write(out)}")


StorageUrl = Annotated[
    str | None, typer.Option(help="As sweep.storage then; default: SQLite in runs/sweeps/NAME.", envvar="SWEEP_STORAGE")
]


@sweep.command("show")
def sweep_show(
    name: Annotated[str, typer.Argument(help="Of the sweep (sweep.name).")],
    storage: StorageUrl = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the page and its figures; default: the sweep's.")] = None,
) -> None:
    """Trials of a sweep, importance of parameters, slices, parallel coordinates and Pareto front."""
    from rich.console import Console

    from facemask.runs.sweep_page import show
    from facemask.study import open_study

    study = open_study(name, storage)
    folder = out or Path(study.user_attrs["folder"])
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder here: give --out")
    typer.echo(f"written {show(study, folder, Console(highlight=False, width=None if sys.stdout.isatty() else 200))}")


@sweep.command("finish")
def sweep_finish(
    name: Annotated[str, typer.Argument(help="Of the sweep (sweep.name).")],
    k: Annotated[int, typer.Option(min=1, help="So many of the best are trained again; validation chooses.")] = 1,
    seeds: Annotated[str, typer.Option(help="Fresh seeds, such as 11,12,13; default: three.")] = "",
    record_name: Annotated[str | None, typer.Option("--record", help="Name of the record; default: NAME.")] = None,
    storage: StorageUrl = None,
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="As in facemask record.")] = False,
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """Train the best parameters with fresh seeds, open the test split, and write a record that tells of the search."""
    from facemask.sweep import finish

    if any(not seed.isdigit() for seed in seeds.split(",") if seeds):
        raise UserError(f"--seeds {seeds}: give whole numbers with commas between them")
    fresh = [int(seed) for seed in seeds.split(",") if seed]
    path = finish(name, storage, k, fresh, record_name or name, experiments, allow_dirty)
    typer.echo(f"recorded in {path}")


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
