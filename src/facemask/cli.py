"""The command `facemask`: what is done with folders of pictures and with finished runs."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from facemask.errors import DISK_FULL, UserError, is_disk_full

if TYPE_CHECKING:
    from rich.console import Console

    from facemask.runs.page import Page

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Folders of pictures: scan, split, audit.")
bench = typer.Typer(no_args_is_help=True, help="Measured on this machine, what is compared in turn.")
sweep = typer.Typer(no_args_is_help=True, help="Searches that python sweep.py made: show, finish.")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(sweep, name="sweep")

Manifest = Annotated[
    Path | None, Option(help="CSV or Parquet with path, dup_group and any columns, instead of an own search.")
]
GroupBy = Annotated[list[str] | None, Option(help="Column of the manifest to keep together; may be repeated.")]
CacheDir = Annotated[Path, Option(help="As cache_dir in training.", envvar="FACEMASK_CACHE")]
Rounds = Annotated[int, Option(min=1, help="Pairs of measurements per comparison.")]
Side = Annotated[int, Option(min=32, help="Pixels; a multiple of 16.")]
Pictures = Annotated[
    Path | None, Option(help="One sub-folder per class; else faces are drawn.", envvar="FACEMASK_DATA")
]
Size = Annotated[str, Option(help="tiny, small or base.")]
Batch = Annotated[int, Option(min=1, help="Pictures in a step.")]
Steps = Annotated[int, Option(min=2, help="Training steps that are measured at a time.")]
BenchOut = Annotated[Path, Option(help="Parent of bench/MACHINE/NAME.json.")]
Experiments = Annotated[Path, Option(help="Parent of all records.")]
Folder = Annotated[Path, Argument(metavar="DIR", help="One sub-folder of pictures per class.")]
Run = Annotated[Path, Argument(help="Folder of a finished run.")]
Model = Annotated[Path, Argument(help="Folder of a run, a checkpoint, or a record with --checkpoint.")]
Checkpoint = Annotated[Path | None, Option(help="The record's best.ckpt, where RUN is a record.")]
Target = Annotated[Path | None, Option("--out", metavar="DIR", help="Default: a folder in RUN.")]
Split = Annotated[Literal["val", "test"], Option(help="A look at test is counted in the ledger.")]
AllowDirty = Annotated[bool, Option("--allow-dirty", help="Record runs of uncommitted code, and the changes.")]
StorageUrl = Annotated[
    str | None, Option(help="As sweep.storage then; default: SQLite in runs/sweeps/NAME.", envvar="SWEEP_STORAGE")
]
EXPERIMENTS = Path("experiments")
CACHE = Path(".cache/facemask")


def _console(width: int = 120) -> "Console":
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def _show(page: "Page", **options: Any) -> None:
    from facemask.runs.page import show

    show(page, _console(), **options)


def _check_file(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out} cannot be written: name a file in a folder that exists")


def _list(lines: Sequence[str], most: int = 20) -> None:
    for line in lines[:most]:
        typer.echo(line, err=True)
    if len(lines) > most:
        typer.echo(f"and {len(lines) - most:,} more", err=True)


def _written(path: object) -> None:
    typer.echo(f"written {path}")


@app.command()
def record(
    runs: Annotated[list[Path], Argument(help="Folders of finished runs that differ only in seed or data.fold.")],
    name: Annotated[str, Option(help="Name of the record, as in conf/experiment/NAME.yaml where there is one.")],
    allow_dirty: AllowDirty = False,
    experiments: Experiments = EXPERIMENTS,
) -> None:
    """Publish runs: what their numbers are computed from, without pictures, weights or paths of this machine."""
    from facemask.data.splits import fingerprint
    from facemask.runs.record import record as write_record

    typer.echo(f"recorded in {write_record(runs, name, experiments, fingerprint, allow_dirty)}")


@app.command()
def reproduce(
    names: Annotated[list[str] | None, Argument(help="Names of records.")] = None,
    tier: Annotated[
        Literal["metrics", "predict", "train"],
        Option(help="metrics: from the stored predictions; predict: from a checkpoint; train: one seed again."),
    ] = "metrics",
    every: Annotated[bool, Option("--all", help="Every record there is.")] = False,
    full: Annotated[bool, Option("--full", help="Hash every picture (predict and train do).")] = False,
    checkpoint: Annotated[Path | None, Option(help="The recorded best.ckpt, for tier predict.")] = None,
    run: Annotated[str | None, Option(help="The run that tier train repeats, such as seed1; the first.")] = None,
    data_root: Annotated[Path | None, Option("--data", help="The pictures, instead of FACEMASK_DATA.")] = None,
    experiments: Experiments = EXPERIMENTS,
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
            options: dict[str, Any] = {"full": full, "checkpoint": checkpoint, "run": run, "data_root": data_root}
            results.append(check_record(path, tier, typer.echo, **options))
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            results.append("ERROR")
    raise typer.Exit(EXIT_CODES[next(name for name in EXIT_CODES if name in results)])


@app.command()
def report(
    check: Annotated[bool, Option("--check", help="Write nothing; exit with 1 where a table is stale.")] = False,
    readme: Annotated[Path, Option(help="File with the markers of the results table.")] = Path("README.md"),
    experiments: Experiments = EXPERIMENTS,
) -> None:
    """Write the README's results and the leaderboard (CSV, HTML, here) from all records."""
    from facemask.runs.leaderboard import terminal, update

    stale = update(experiments, readme, check)
    console = _console()
    console.width = max(console.width, 120)
    console.print(terminal(experiments))
    for path in stale:
        typer.echo(f"{path} is stale: facemask report writes it anew" if check else f"written {path}")
    raise typer.Exit(1 if check and stale else 0)


@app.command()
def evaluate(
    run: Run,
    overrides: Annotated[list[str] | None, Argument(help="As of train.py: data=folder data.root=OTHER.")] = None,
    exclude_duplicates: Annotated[
        bool, Option("--exclude-duplicates", help="Leave out copies of training pictures.")
    ] = False,
    classes: Annotated[str, Option(help="What other labels mean to the run: masked=with_mask,bare=without_mask.")] = "",
    name: Annotated[str | None, Option(help="Of the new folder below RUN/evaluations.")] = None,
    cost: Annotated[str, Option(metavar="MISS:ALARM", help="What a miss and a false alarm cost.")] = "1:1",
    positive: Annotated[str | None, Option(help="The class that is missed or falsely called; the last.")] = None,
    attributes: Annotated[Path | None, Option(help="CSV with path and any columns: worst groups.")] = None,
) -> None:
    """Evaluate a run's checkpoint on its own splits again, or on other pictures, and tell how much is lost there.

    With calibration (temperature from validation), risk at every coverage, a threshold for given costs, and the worst
    groups by attribute, source, size and brightness: a table here, a page and the figures in RUN/evaluations.
    """
    from facemask.evaluate import evaluate as evaluate_run

    pairs = [pair.split("=") for pair in classes.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--classes {classes}: give LABEL=CLASS pairs with commas between them")
    options: dict[str, Any] = {"cost": cost, "positive": positive, "attributes": attributes, "name": name}
    evaluate_run(run, overrides or [], exclude_duplicates=exclude_duplicates, names=dict(pairs), **options)


@app.command()
def predict(
    run: Model,
    paths: Annotated[list[str], Argument(metavar="PATH...", help="Pictures, folders, globs; - for a list on stdin.")],
    out: Annotated[Path | None, Option(help="New file: .csv or .jsonl (JSON lines).")] = None,
    kind: Annotated[
        Literal["table", "csv", "jsonl"] | None,
        Option("--format", help="Default: by --out's suffix; table on a terminal, csv in a pipe."),
    ] = None,
    head: Annotated[str | None, Option(help="Which decides: head, head_dist or mean; the reported one.")] = None,
    unsure: Annotated[float, Option(min=0, max=1, help="A decision of lower calibrated probability is unsure.")] = 0.8,
    batch_size: Annotated[int, Option(min=1, help="Pictures in a forward pass.")] = 32,
    precision: Annotated[
        Literal["auto", "fp32"],
        Option(help="auto: bf16 where it is native, and fp32 again where bf16 leaves a doubt."),
    ] = "auto",
    checkpoint: Checkpoint = None,
) -> None:
    """Say what pictures show: decision, calibrated probability, both heads; unsure where the probability is low.

    Files that give no picture are named with the reason and do not stop the rest. Ctrl-C keeps the rows written so far.
    Exit codes: 0 all predicted, 1 some files gave no picture, 2 nothing was done, 130 stopped by Ctrl-C.
    """
    if kind is None and out is not None and out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out {out}: give a name that ends in .csv or .jsonl, or --format")
    rows = kind or (out.suffix[1:] if out else "table" if sys.stdout.isatty() else "csv")
    try:
        from facemask.predict import expand, load_model, predict_files

        files = expand(paths, sys.stdin.buffer.read() if "-" in paths else b"")
        if not files:
            raise UserError("the list on standard input names no file")
        model = load_model(run, checkpoint, precision=precision)
        typer.echo(f"{run}: {model.calibration}", err=True)
        failed = predict_files(model, files, out, rows, head, unsure, batch_size)
    except KeyboardInterrupt:
        typer.echo("stopped: the rows written so far are whole", err=True)
        raise typer.Exit(130) from None
    _list([f"problem: {row.source!a}: {row.problem}" for row in failed])
    typer.echo(f"{len(files) - len(failed):,} of {len(files):,} files predicted{f', {out}' if out else ''}", err=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def features(
    run: Model,
    root: Annotated[Path, Argument(metavar="DIR", help="Pictures; sub-folders name classes of any kind.")],
    out: Annotated[Path, Option(help="New Parquet file.")] = Path("features.parquet"),
    checkpoint: Checkpoint = None,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Embed pictures for a task of your own: [CLS], distillation token and mean patch, with the accuracy they give.

    With sub-folders as classes, a linear probe and nearest neighbours are cross-validated with near-duplicates kept
    together. Exit codes: 0 all embedded, 1 some files gave no picture, 2 nothing was done.
    """
    from rich.table import Table

    from facemask.features import features as embed_pictures
    from facemask.features import seen
    from facemask.predict import load_model

    model = load_model(run, checkpoint)
    table, problems, scores = embed_pictures(model, root, out, cache_dir)
    _list([f"problem: {path!a}: {problem}" for path, problem in problems.items()])
    if scores is not None:
        shown = Table("embedding", "classifier", "pictures", "accuracy, %", box=None, pad_edge=False)
        for row in scores.to_dict("records"):
            accuracy, low, high = (100 * row[key] for key in ("accuracy", "low", "high"))
            shown.add_row(row["embedding"], row["method"], f"{row['n']:,}", f"{accuracy:.1f} [{low:.1f}, {high:.1f}]")
        _console().print(shown)
        known = int(seen(table, model).sum())
        left = "; they are not counted in the accuracies" if known < len(table) else ", all of them"
        typer.echo("cross-validated with near-duplicates together; 95 % intervals")
        if known:
            typer.echo(f"the encoder was trained on {known:,} of these pictures{left}")
    typer.echo(f"written {out}: {len(table):,} pictures, {len(problems)} left out")
    raise typer.Exit(1 if problems else 0)


@app.command()
def compare(
    arms: Annotated[list[Path], Argument(help="Runs, folders of runs, records, CSV, Parquet; the reference first.")],
    metric: Annotated[str, Option(help="Any metric of a run's report.")] = "accuracy",
    head: Annotated[list[str] | None, Option(help="Once for all arms, or once per arm.")] = None,
    split: Annotated[str | None, Option(help="Default: test, where there is one.")] = None,
    out: Annotated[Path | None, Option(help="Write a page (.html) or all figures (.json).")] = None,
) -> None:
    """Do models differ on the same pictures: these weights, and this recipe?"""
    from facemask.runs import compare as comparison

    if out is not None:
        comparison.check_out(out)
    result = comparison.compare(arms, metric, head or [], split)
    page = comparison.page(result)
    _show(page, rows=10)
    if out is not None:
        comparison.write(result, page, out)
        _written(out)


@data.command()
def scan(
    root: Folder,
    out: Annotated[Path | None, Option(help="CSV or Parquet file; default: manifest.csv in DIR.")] = None,
    thorough: Annotated[bool, Option("--thorough", help="Find rotated and edited copies too (minutes).")] = False,
    full: Annotated[bool, Option("--full", help="Read every file again, whatever its size and time.")] = False,
    cache_dir: CacheDir = CACHE,
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
    table = scan_pictures(root, out, cache_dir=cache_dir, embed=embed, full=full)
    bad = table[table["problem"] != ""]
    _list([f"problem: {path!r}: {problem}" for path, problem in zip(bad["path"], bad["problem"], strict=True)])
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
    root: Pictures = None,
    rounds: Rounds = 7,
    pictures: Annotated[int, Option(min=64, help="At most so many pictures per measurement.")] = 512,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Loading of training batches: decoded cache and our transforms against torchvision's, in turn, on one core."""
    from facemask.bench_data import bench_data as run_bench

    _written(run_bench(root, rounds, pictures, out))


@bench.command("scan")
def bench_scan(
    sizes: Annotated[str, Option(help="How many pictures to make and scan.")] = "1000,4000,16000",
    out: BenchOut = EXPERIMENTS,
) -> None:
    """A first and a second scan of made pictures, and which of their copies are found."""
    from facemask.bench_scan import bench_scan as run_bench

    _written(run_bench(_whole_numbers("--sizes", sizes, 2), out))


@bench.command("duplicates")
def bench_duplicates(
    root: Folder,
    reference: Annotated[Path, Option(exists=True, dir_okay=False, help="Has path and the true dup_group.")],
    thorough: Annotated[bool, Option("--thorough", help="As in facemask data scan; both are measured.")] = False,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Precision and recall of the search for near-duplicates, pair by pair, and its seconds."""
    from facemask.bench_scan import bench_duplicates as run_bench

    _written(run_bench(root, reference, thorough, out))


@bench.command("teacher")
def bench_teacher(rounds: Rounds = 9, side: Side = 224, batch: Batch = 32, out: BenchOut = EXPERIMENTS) -> None:
    """A distilled step on saved logits against one without a teacher and one that asks it, in turn, on the CPU."""
    from facemask.bench_step import bench_teacher as run_bench

    _written(run_bench(rounds, side, batch, out))


@bench.command("train")
def bench_train(
    root: Pictures = None,
    at: Annotated[list[str] | None, Option(metavar="SIZE/PIXELS", help="Such as tiny/224; again for more.")] = None,
    batch: Batch = 32,
    precision: Annotated[Literal["bf16", "fp32"] | None, Option(help="As train.py chooses, unless given.")] = None,
    rounds: Rounds = 7,
    steps: Steps = 4,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Our training step against the bare limit, timm's loop and Hugging Face's Trainer, in turn, as ratios."""
    from facemask.bench_train import bench_train as run_bench

    cases = at or ["tiny/224", "small/224", "tiny/112"]
    for case in cases:
        if not re.fullmatch(r"(tiny|small|base)/[1-9]\d*", case):
            raise UserError(f"--at {case}: give tiny, small or base, a slash and pixels, such as tiny/224")
    _written(run_bench(root, cases, batch, precision, rounds, steps, out))


@bench.command("profile")
def bench_profile(
    root: Pictures = None,
    size: Size = "tiny",
    side: Side = 224,
    batch: Batch = 32,
    steps: Steps = 20,
    distill: Annotated[str, Option(help="As in training: none, soft, hard, logit, feature.")] = "none",
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Where a training step's time goes: data, teacher, forward, backward, optimizer, logging, Lightning."""
    from facemask.bench_train import bench_profile as run_bench

    _written(run_bench(root, size, side, batch, steps, distill, out))


@bench.command("memory")
def bench_memory(
    root: Pictures = None,
    size: Size = "base",
    side: Side = 224,
    batch: Batch = 16,
    steps: Steps = 4,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Peak memory of training: ours, timm's loop and Hugging Face's Trainer."""
    from facemask.bench_train import bench_memory as run_bench

    _written(run_bench(root, size, side, batch, steps, out))


@bench.command("growth")
def bench_growth(root: Pictures = None, batch: Batch = 32, steps: Steps = 10, out: BenchOut = EXPERIMENTS) -> None:
    """Time and memory of training with size, pixels and ranks."""
    from facemask.bench_train import bench_growth as run_bench

    _written(run_bench(root, batch, steps, out))


@bench.command("startup")
def bench_startup(rounds: Rounds = 5, out: BenchOut = EXPERIMENTS) -> None:
    """From a command to its first training step, against the imports alone; and commands that need no torch."""
    from facemask.bench_train import bench_startup as run_bench

    _written(run_bench(rounds, out))


@bench.command("sweep")
def bench_sweep(
    root: Pictures = None,
    trials: Annotated[int, Option(min=2, help="Of the sweep.")] = 24,
    epochs: Annotated[int, Option(min=1, help="Of a trial that is not pruned.")] = 12,
    side: Side = 64,
    workers: Annotated[int, Option(min=1, help="Trials at a time.")] = 2,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """Trials per hour of sweep.py, which shares work and prunes, against a loop of train.py: some 20 minutes."""
    from facemask.bench_sweep import bench_sweep as run_bench

    _written(run_bench(root, trials, epochs, side, workers, out))


@bench.command("recipes")
def bench_recipes(
    root: Pictures = None,
    epochs: Annotated[int, Option(min=3, help="Of the plain recipe.")] = 20,
    side: Side = 112,
    seeds: Annotated[str, Option(help="Whole numbers with commas between them.")] = "0,1,2",
    out: BenchOut = EXPERIMENTS,
) -> None:
    """How much sooner recipe=fast is as accurate as the plain recipe in the end, by seed: some 20 minutes."""
    from facemask.bench_recipes import bench_recipes as run_bench

    _written(run_bench(root, epochs, side, _whole_numbers("--seeds", seeds), out))


@bench.command("limit")
def bench_limit(rounds: Rounds = 9, side: Side = 224, batch: Batch = 32, out: BenchOut = EXPERIMENTS) -> None:
    """How near an eager bf16 step is to the processor's own rate; bf16 weights and torch.compile against it."""
    from facemask.bench_step import bench_limit as run_bench

    _written(run_bench(rounds, side, batch, out))


@bench.command("determinism")
def bench_determinism(rounds: Rounds = 21, side: Side = 112, batch: Batch = 32, out: BenchOut = EXPERIMENTS) -> None:
    """What it costs that a command gives the same bits twice: a deterministic step against another, in turn."""
    from facemask.bench_step import bench_determinism as run_bench

    _written(run_bench(rounds, side, batch, out))


@bench.command("gpu")
def bench_gpu(size: Size = "tiny", side: Side = 224, batch: Batch = 64, out: BenchOut = EXPERIMENTS) -> None:
    """Do the GPU paths hold here: speed against the bare limit, determinism, 16 bits against fp32, 2 GPUs against 1."""
    from facemask.gpu_check import gpu_check

    file, holds = gpu_check(out, "gpu", size, side, batch)
    _written(file)
    raise typer.Exit(0 if holds else 1)


@bench.command("inference")
def bench_inference(
    run: Annotated[Path, Argument(help="Folder of a run.")],
    root: Annotated[Path, Argument(metavar="DIR", help="Pictures.")],
    pictures: Annotated[int, Option(min=64, help="At most so many files.")] = 256,
    rounds: Rounds = 7,
    latencies: Annotated[int, Option(min=20, help="Calls of each engine with one picture.")] = 200,
    out: BenchOut = EXPERIMENTS,
) -> None:
    """facemask predict against transformers.pipeline with the same weights, and latency by torch and ONNX Runtime."""
    from facemask.bench_inference import bench_inference as run_bench

    _written(run_bench(run, root, pictures, rounds, latencies, out))


@data.command("split")
def data_split(
    root: Folder,
    out: Annotated[Path, Option(help="File to write: path,label,split.")],
    manifest: Manifest = None,
    group_by: GroupBy = None,
    seed: Annotated[int, Option(help="As data.split_seed in training.")] = 0,
    ratios: Annotated[tuple[float, float, float], Option(help="Shares of train, val, test.")] = (0.7, 0.1, 0.2),
    fold: Annotated[str | None, Option(metavar="I/K", help="Fold I of K, from 0, is test.")] = None,
    fraction: Annotated[float, Option(help="Part of train to keep; 0.1 is contained in 0.25.")] = 1.0,
    force: Annotated[bool, Option("--force", help="Replace another split in the file.")] = False,
    cache_dir: CacheDir = CACHE,
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
    _written(out)


@data.command("audit")
def data_audit(
    root: Annotated[
        Path | None, Argument(metavar="[DIR]", help="One sub-folder of pictures per class.", show_default=False)
    ] = None,
    split: Annotated[Path | None, Option(help="CSV with path,label,split; the default split without.")] = None,
    manifest: Manifest = None,
    group_by: GroupBy = None,
    synthetic: Annotated[int | None, Option(metavar="N", help="Instead of DIR: drawn faces.")] = None,
    degrade: Annotated[float, Option(min=0, max=1, help="The augment.degrade to measure.")] = 0.5,
    out: Annotated[Path, Option(help="The page.")] = Path("audit.html"),
    cache_dir: CacheDir = CACHE,
) -> None:
    """What a data set gives away: leaks between splits, labels in conflict, and accuracies without seeing a mask."""
    if (root is None) == (synthetic is None):
        raise UserError("give a folder of pictures, or --synthetic N for drawn faces")
    _check_file(out)
    from facemask import audit
    from facemask.data.datamodule import FolderData, ImageData, SyntheticData
    from facemask.data.transforms import Augmentation

    size = 64 if synthetic is not None else 224
    common: dict[str, Any] = {"augmentation": Augmentation(0, size), "img_size": size, "cache_dir": cache_dir}
    pictures: ImageData
    if synthetic is not None:
        source, pictures = f"{synthetic:,} drawn faces", SyntheticData(num_images=synthetic, **common)
    else:
        source = str(root)
        common |= {"split": split and str(split), "manifest": manifest and str(manifest), "group_by": group_by}
        pictures = FolderData(root=source, on_bad_file="skip", **common)
    pictures.prepare(("test",))
    page = audit.audit(pictures, degrade, f"{source} · {f'split {split}' if split else 'default split'}")
    _show(page)
    _written(page.write(out))


@sweep.command("show")
def sweep_show(
    name: Annotated[str, Argument(help="Of the sweep (sweep.name).")],
    storage: StorageUrl = None,
    out: Annotated[Path | None, Option(help="Folder of the page and its figures; default: the sweep's.")] = None,
) -> None:
    """Trials of a sweep, importance of parameters, slices, parallel coordinates and Pareto front."""
    from facemask.runs.sweep_page import show
    from facemask.study import open_study

    study = open_study(name, storage)
    folder = out or Path(study.user_attrs["folder"])
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder here: give --out")
    _written(show(study, folder, _console(200)))


@sweep.command("finish")
def sweep_finish(
    name: Annotated[str, Argument(help="Of the sweep (sweep.name).")],
    k: Annotated[int, Option(min=1, help="So many of the best are trained again; validation chooses.")] = 1,
    seeds: Annotated[str, Option(help="Fresh seeds, such as 11,12,13; default: three.")] = "",
    record_name: Annotated[str | None, Option("--record", help="Name of the record; default: NAME.")] = None,
    storage: StorageUrl = None,
    allow_dirty: AllowDirty = False,
    experiments: Experiments = EXPERIMENTS,
) -> None:
    """Train the best parameters with fresh seeds, open the test split, and write a record that tells of the search."""
    from facemask.sweep import finish

    fresh = _whole_numbers("--seeds", seeds) if seeds else []
    path = finish(name, storage, k, fresh, record_name or name, experiments, allow_dirty)
    typer.echo(f"recorded in {path}")


@app.command()
def stress(
    run: Run,
    split: Split = "val",
    pictures: Annotated[int, Option(min=20, help="At most so many.")] = 500,
    out: Target = None,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Accuracy and calibration under blur, noise and seven other stresses; and does the decision follow the mask?"""
    from facemask.stress import stress as run_stress

    target = out or run / "stress"
    _show(run_stress(run, split, pictures, target, cache_dir))
    typer.echo(f"written {target} (stress.html, stress.svg, stress.csv, shortcuts.csv)")


@app.command()
def export(
    run: Run,
    to: Annotated[
        Literal["timm", "hf", "onnx", "onnx-int8"],
        Option(help="timm; hf: transformers; onnx: one file; onnx-int8: smaller and faster."),
    ],
    out: Annotated[Path, Option(help="New folder.")],
    overrides: Annotated[list[str] | None, Argument(help="data=folder data.root=OTHER: compare on these.")] = None,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Write a run's model for another library and compare it with the run on every picture that the run evaluates.

    Exit code 1, and no folder, where it differs too much: in fp32 by more than 1e-4 in a logit or in any decision; in
    more than 0.5 % of the decisions from files through the library's own preprocessing, or of int8.
    """
    from facemask.export import export as export_run

    raise typer.Exit(0 if export_run(run, to, out, [f"cache_dir={cache_dir}", *(overrides or [])]) else 1)


@app.command()
def card(
    source: Annotated[Path, Argument(metavar="RUN|RECORD", help="Folder of a finished run, or of a record.")],
    out: Annotated[Path | None, Option(help="The file; without it the card is printed.")] = None,
    cache_dir: CacheDir = CACHE,
) -> None:
    """Write a Hugging Face model card; every number is computed from the stored predictions."""
    from facemask.card import card as model_card
    from facemask.files import write_text

    text = model_card(source, cache_dir)
    if out is None:
        typer.echo(text, nl=False)
        return
    _check_file(out)
    write_text(out, text)
    _written(out)


@app.command()
def explain(
    run: Annotated[Path, Argument(help="Folder of a finished run, or a record.")],
    images: Annotated[list[str] | None, Argument(metavar="[IMAGE]...", help="Pictures, folders, globs.")] = None,
    split: Split = "val",
    errors: Annotated[int, Option(min=0, help="So many of the worst errors; 0: none.")] = 12,
    check: Annotated[int, Option(min=0, help="Pictures for the check of the maps; 0: none.")] = 50,
    out: Target = None,
    cache_dir: CacheDir = CACHE,
    checkpoint: Checkpoint = None,
) -> None:
    """What decisions rest on: attention and occlusion maps of pictures (IMAGE.png) and of the worst errors."""
    from facemask.explain import explain as run_explain
    from facemask.predict import expand

    target = out or run / "explain"
    page, problems = run_explain(run, expand(images or []), target, split, errors, check, cache_dir, checkpoint)
    _show(page)
    _list([f"left out: {path}: {problem}" for path, problem in problems.items()])
    _written(target / "explain.html")
    raise typer.Exit(1 if problems else 0)


@app.command()
def demo(
    run: Annotated[Path, Argument(help="Folder of a finished run, or its checkpoint.")],
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 7860,
    host: Annotated[str, Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
) -> None:
    """Serve a page on this machine: drop a picture or use the webcam, see the decision and where the model looks."""
    from facemask.demo import serve
    from facemask.predict import load_model

    serve(lambda: load_model(run), host, port, typer.echo)


@app.command()
def dashboard(
    runs: Annotated[list[Path] | None, Argument(help="Folders of finished runs, beside the records.")] = None,
    sweeps: Annotated[list[str] | None, Option("--sweep", help="Name of a sweep; may be repeated.")] = None,
    storage: StorageUrl = None,
    spec: Annotated[Path | None, Option(help="Default: conf/dashboard.yaml.")] = None,
    wandb: Annotated[str | None, Option(metavar="ENTITY/PROJECT", help="Save workspace and report there.")] = None,
    out: Annotated[Path, Option(help="The page.")] = Path("dashboard.html"),
    experiments: Experiments = EXPERIMENTS,
) -> None:
    """All arms on one page: ablation table, forest plots, curves, confusion matrices, sweeps; the same for W&B."""
    from facemask import dashboard as board
    from facemask.study import open_study

    _check_file(out)
    entity, _, project = (wandb or "").partition("/")
    if wandb is not None and not (entity and project):
        raise UserError(f"--wandb {wandb}: give ENTITY/PROJECT")
    wanted = board.read_spec(spec or board.SPEC)
    arms = board.arms_of(experiments, runs or [])
    if not arms:
        raise UserError(f"{experiments} holds no record: name --experiments, or run folders")
    studies = [open_study(name, storage) for name in sweeps or []]
    _written(board.build_page(arms, studies, wanted).write(out))
    for url in board.publish(wanted, entity, project) if wandb else []:
        typer.echo(f"saved {url}")


@app.command()
def study(
    root: Annotated[Path | None, Argument(metavar="[DIR]", help="One sub-folder of pictures per class.")] = None,
    tier: Annotated[
        Literal["ablation", "best", "full"] | None,
        Option(help="ablation or best alone; full: all, larger, for a GPU. Default: ablation and best."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan alone: runs left, CPU-hours.")] = False,
    tables: Annotated[bool, Option("--tables", help="Train nothing; tables of the records there are.")] = False,
    workers: Annotated[int, Option(min=1, help="Runs side by side; each has one thread.")] = 2,
    missing: Annotated[bool, Option("--missing", help="Leave out what has a record, whoever trained it.")] = False,
    spec: Annotated[Path | None, Option(help="Another list of runs than conf/study.yaml.")] = None,
    allow_dirty: AllowDirty = False,
    experiments: Experiments = EXPERIMENTS,
) -> None:
    """Train the runs of the study in experiments/PROTOCOL.md, record and compare them; goes on after a kill."""
    from facemask import protocol

    if root is not None and not root.is_dir():
        raise UserError(f"{root} is no folder of pictures")
    full = tier == "full"
    driver = protocol.Driver(spec or protocol.SPEC, full, experiments, workers, allow_dirty, missing)
    driver.study(root, None if full else tier, dry_run, tables)


def _whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) >= least for number in numbers):
        raise UserError(f"{option} {text}: give whole numbers{f' from {least}' * bool(least)} with commas between them")
    return [int(number) for number in numbers]


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    try:
        app()
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if not is_disk_full(error):
                raise
            # What standard output still holds would fail once more when Python flushes it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"error: {DISK_FULL if isinstance(error, OSError) else error}", err=True)
        sys.exit(2)
