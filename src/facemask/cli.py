"""The command `facemask`: what is done with folders of pictures and with finished runs."""

import re
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
Pictures = Annotated[
    Path | None, typer.Option(help="One sub-folder per class; without it faces are drawn.", envvar="FACEMASK_DATA")
]
Size = Annotated[str, typer.Option(help="tiny, small or base.")]
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
    cost: Annotated[
        str, typer.Option(metavar="MISS:ALARM", help="Cost of a false negative and a false positive: the threshold.")
    ] = "1:1",
    positive: Annotated[str | None, typer.Option(help="The class that is missed or falsely called; the last.")] = None,
    attributes: Annotated[
        Path | None, typer.Option(help="CSV with path and any columns, to find the worst groups by.")
    ] = None,
) -> None:
    """Evaluate a run's checkpoint on its own splits again, or on other pictures, and tell how much is lost there.

    With calibration (temperature from validation), risk at every coverage, a threshold for given costs, and the worst
    groups by attribute, source, size and brightness: a table here, a page and the figures in RUN/evaluations.
    """
    from facemask.evaluate import evaluate as evaluate_run

    pairs = [pair.split("=") for pair in classes.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--classes {classes}: give LABEL=CLASS pairs with commas between them")
    evaluate_run(
        run,
        overrides or [],
        exclude_duplicates=exclude_duplicates,
        names=dict(pairs),
        name=name,
        cost=cost,
        positive=positive,
        attributes=attributes,
    )


class RowFormat(StrEnum):
    table = "table"
    csv = "csv"
    jsonl = "jsonl"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"


Checkpoint = Annotated[Path | None, typer.Option(help="The record's best.ckpt, where RUN is a record.")]


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a record with --checkpoint.")],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Pictures, folders, globs; - reads a list from stdin.")
    ],
    out: Annotated[Path | None, typer.Option(help="New file: .csv or .jsonl (JSON lines).")] = None,
    kind: Annotated[
        RowFormat | None,
        typer.Option("--format", help="Default: by --out's suffix; table on a terminal, csv in a pipe."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Which head decides: head, head_dist or mean; the run's reported one.")
    ] = None,
    unsure: Annotated[
        float, typer.Option(min=0, max=1, help="A decision of lower calibrated probability is unsure.")
    ] = 0.8,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a forward pass.")] = 32,
    precision: Annotated[
        Precision, typer.Option(help="auto: bf16 where it is native, and fp32 again where bf16 leaves a doubt.")
    ] = Precision.auto,
    checkpoint: Checkpoint = None,
) -> None:
    """Say what pictures show: decision, calibrated probability, both heads; unsure where the probability is low.

    Files that give no picture are named with the reason and do not stop the rest. Ctrl-C keeps the rows written so far.
    Exit codes: 0 all predicted, 1 some files gave no picture, 2 nothing was done, 130 stopped by Ctrl-C.
    """
    if kind is None and out is not None and out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out {out}: give a name that ends in .csv or .jsonl, or --format")
    if kind is None:
        kind = RowFormat(out.suffix[1:]) if out else RowFormat.table if sys.stdout.isatty() else RowFormat.csv
    from facemask.predict import expand, load_model, predict_files

    files = expand(paths, sys.stdin.buffer.read() if "-" in paths else b"")
    if not files:
        raise UserError("the list on standard input names no file")
    model = load_model(run, checkpoint, precision=precision.value)
    typer.echo(f"{run}: {model.calibration}", err=True)
    failed = []
    try:
        failed = predict_files(model, files, out, kind.value, head, unsure, batch_size)
    except KeyboardInterrupt:
        typer.echo("stopped: the rows written so far are whole", err=True)
        raise typer.Exit(130) from None
    for row in failed[:20]:
        typer.echo(f"problem: {row.source!a}: {row.problem}", err=True)
    if len(failed) > 20:
        typer.echo(f"problem: {len(failed) - 20} more, each named in its row", err=True)
    typer.echo(f"{len(files) - len(failed):,} of {len(files):,} files predicted{f', {out}' if out else ''}", err=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def features(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or a record with --checkpoint.")],
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Pictures; sub-folders name classes of any kind.")],
    out: Annotated[Path, typer.Option(help="New Parquet file.")] = Path("features.parquet"),
    checkpoint: Checkpoint = None,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Embed pictures for a task of your own: [CLS], distillation token and mean patch, with the accuracy they give.

    With sub-folders as classes, a linear probe and nearest neighbours are cross-validated with near-duplicates kept
    together. Exit codes: 0 all embedded, 1 some files gave no picture, 2 nothing was done.
    """
    from rich.console import Console
    from rich.table import Table

    from facemask.features import features as embed_pictures
    from facemask.features import seen
    from facemask.predict import load_model

    model = load_model(run, checkpoint)
    table, problems, scores = embed_pictures(model, root, out, cache_dir)
    for path, problem in list(problems.items())[:20]:
        typer.echo(f"problem: {path!a}: {problem}", err=True)
    if len(problems) > 20:
        typer.echo(f"problem: {len(problems) - 20} more", err=True)
    if scores is not None:
        shown = Table("embedding", "classifier", "pictures", "accuracy, %", box=None, pad_edge=False)
        for row in scores.to_dict("records"):
            accuracy, low, high = (100 * row[key] for key in ("accuracy", "low", "high"))
            shown.add_row(row["embedding"], row["method"], f"{row['n']:,}", f"{accuracy:.1f} [{low:.1f}, {high:.1f}]")
        Console(highlight=False).print(shown)
        known = int(seen(table, model).sum())
        left = "; they are not counted in the accuracies" if known < len(table) else ", all of them"
        typer.echo("cross-validated with near-duplicates together; 95 % intervals")
        if known:
            typer.echo(f"the encoder was trained on {known:,} of these pictures{left}")
    typer.echo(f"written {out}: {len(table):,} pictures, {len(problems)} left out")
    raise typer.Exit(1 if problems else 0)


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
    root: Pictures = None,
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


@bench.command("train")
def bench_train(
    root: Pictures = None,
    at: Annotated[
        list[str] | None, typer.Option(metavar="SIZE/PIXELS", help="Such as tiny/224; again for more.")
    ] = None,
    batch: Batch = 32,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32; as train.py chooses, unless given.")] = None,
    rounds: Rounds = 7,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each loop in a round.")] = 4,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/train.json.")] = Path("experiments"),
) -> None:
    """Our training step against the bare limit, timm's loop and Hugging Face's Trainer, in turn, as ratios."""
    from facemask.bench_train import bench_train as run_bench

    cases = at or ["tiny/224", "small/224", "tiny/112"]
    for case in cases:
        if not re.fullmatch(r"(tiny|small|base)/[1-9]\d*", case):
            raise UserError(f"--at {case}: give tiny, small or base, a slash and pixels, such as tiny/224")
    if precision not in (None, "bf16", "fp32"):
        raise UserError(f"--precision {precision} must be bf16 or fp32")
    typer.echo(f"written {run_bench(root, cases, batch, precision, rounds, steps, out)}")


@bench.command("profile")
def bench_profile(
    root: Pictures = None,
    size: Size = "tiny",
    side: Side = 224,
    batch: Batch = 32,
    steps: Annotated[int, typer.Option(min=2, help="Training steps that are measured.")] = 20,
    distill: Annotated[str, typer.Option(help="As in training: none, soft, hard, logit, feature.")] = "none",
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/profile.json.")] = Path("experiments"),
) -> None:
    """Where a training step's time goes: data, teacher, forward, backward, optimizer, logging, Lightning."""
    from facemask.bench_train import bench_profile as run_bench

    typer.echo(f"written {run_bench(root, size, side, batch, steps, distill, out)}")


@bench.command("memory")
def bench_memory(
    root: Pictures = None,
    size: Size = "base",
    side: Side = 224,
    batch: Batch = 16,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 4,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/memory.json.")] = Path("experiments"),
) -> None:
    """Peak memory of training: ours, timm's loop and Hugging Face's Trainer."""
    from facemask.bench_train import bench_memory as run_bench

    typer.echo(f"written {run_bench(root, size, side, batch, steps, out)}")


@bench.command("growth")
def bench_growth(
    root: Pictures = None,
    batch: Batch = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 10,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/growth.json.")] = Path("experiments"),
) -> None:
    """Time and memory of training with size, pixels and ranks."""
    from facemask.bench_train import bench_growth as run_bench

    typer.echo(f"written {run_bench(root, batch, steps, out)}")


@bench.command("startup")
def bench_startup(
    rounds: Rounds = 5,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/startup.json.")] = Path("experiments"),
) -> None:
    """From a command to its first training step, against the imports alone; and commands that need no torch."""
    from facemask.bench_train import bench_startup as run_bench

    typer.echo(f"written {run_bench(rounds, out)}")


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


@bench.command("gpu")
def bench_gpu(
    size: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    side: Side = 224,
    batch: Batch = 64,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/gpu.json.")] = Path("experiments"),
) -> None:
    """Do the GPU paths hold here: speed against the bare limit, determinism, 16 bits against fp32, 2 GPUs against 1."""
    from facemask.gpu_check import gpu_check

    file, holds = gpu_check(out, "gpu", size, side, batch)
    typer.echo(f"written {file}")
    raise typer.Exit(0 if holds else 1)


@bench.command("inference")
def bench_inference(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Pictures.")],
    pictures: Annotated[int, typer.Option(min=64, help="At most so many files.")] = 256,
    rounds: Rounds = 7,
    latencies: Annotated[int, typer.Option(min=20, help="Calls of each engine with one picture.")] = 200,
    out: Annotated[Path, typer.Option(help="Parent of bench/MACHINE/inference.json.")] = Path("experiments"),
) -> None:
    """facemask predict against transformers.pipeline with the same weights, and latency by torch and ONNX Runtime."""
    from facemask.bench_inference import bench_inference as run_bench

    typer.echo(f"written {run_bench(run, root, pictures, rounds, latencies, out)}")


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


class Looked(StrEnum):
    val = "val"
    test = "test"


Split = Annotated[Looked, typer.Option(help="Of the run's pictures; a look at test is counted in the ledger.")]


@app.command()
def stress(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    split: Split = Looked.val,
    pictures: Annotated[int, typer.Option(min=20, help="At most so many.")] = 500,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: RUN/stress.")] = None,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Accuracy and calibration under blur, noise and seven other stresses; and does the decision follow the mask?"""
    from rich.console import Console

    from facemask.runs.page import show
    from facemask.stress import stress as run_stress

    target = out or run / "stress"
    page = run_stress(run, split.value, pictures, target, cache_dir)
    show(page, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    typer.echo(f"written {target} (stress.html, stress.svg, stress.csv, shortcuts.csv)")


class Target(StrEnum):
    timm = "timm"
    hf = "hf"
    onnx = "onnx"
    onnx_int8 = "onnx-int8"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to: Annotated[Target, typer.Option(help="timm; hf: transformers; onnx: one file; onnx-int8: smaller and faster.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data=folder data.root=OTHER: compare on these, not on the run's own.")
    ] = None,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Write a run's model for another library and compare it with the run on every picture that the run evaluates.

    Exit code 1, and no folder, where it differs too much: in fp32 by more than 1e-4 in a logit or in any decision; in
    more than 0.5 % of the decisions from files through the library's own preprocessing, or of int8.
    """
    from facemask.export import export as export_run

    raise typer.Exit(0 if export_run(run, to.value, out, [f"cache_dir={cache_dir}", *(overrides or [])]) else 1)


@app.command()
def card(
    source: Annotated[Path, typer.Argument(metavar="RUN|RECORD", help="Folder of a finished run, or of a record.")],
    out: Annotated[Path | None, typer.Option(help="The file; without it the card is printed.")] = None,
    cache_dir: CacheDir = Path(".cache/facemask"),
) -> None:
    """Write a Hugging Face model card; every number is computed from the stored predictions."""
    from facemask.card import card as model_card
    from facemask.files import write_text

    text = model_card(source, cache_dir)
    if out is None:
        typer.echo(text, nl=False)
        return
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out} cannot be written: name a file in a folder that exists")
    write_text(out, text)
    typer.echo(f"written {out}")


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a record.")],
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures, folders, globs.")] = None,
    split: Split = Looked.val,
    errors: Annotated[int, typer.Option(min=0, help="So many of the worst errors; 0: none.")] = 12,
    check: Annotated[int, typer.Option(min=0, help="Pictures for the check of the maps; 0: none.")] = 50,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: RUN/explain.")] = None,
    cache_dir: CacheDir = Path(".cache/facemask"),
    checkpoint: Annotated[Path | None, typer.Option(help="The weights, where RUN is a record.")] = None,
) -> None:
    """What decisions rest on: attention and occlusion maps of pictures (IMAGE.png) and of the worst errors."""
    from rich.console import Console

    from facemask.explain import explain as run_explain
    from facemask.predict import expand
    from facemask.runs.page import show

    target = out or run / "explain"
    page, problems = run_explain(run, expand(images or []), target, split.value, errors, check, cache_dir, checkpoint)
    show(page, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    for path, problem in problems.items():
        typer.echo(f"left out: {path}: {problem}", err=True)
    typer.echo(f"written {target / 'explain.html'}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or its checkpoint.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 7860,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
) -> None:
    """Serve a page on this machine: drop a picture or use the webcam, see the decision and where the model looks."""
    from facemask.demo import serve
    from facemask.predict import load_model

    serve(load_model(run), host, port, typer.echo)


@app.command()
def dashboard(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs, beside the records.")] = None,
    sweeps: Annotated[list[str] | None, typer.Option("--sweep", help="Name of a sweep; may be repeated.")] = None,
    storage: StorageUrl = None,
    spec: Annotated[Path | None, typer.Option(help="Default: conf/dashboard.yaml.")] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="ENTITY/PROJECT", help="Save workspace and report there too (wandb login).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("dashboard.html"),
    experiments: Annotated[Path, typer.Option(help="Parent of all records.")] = Path("experiments"),
) -> None:
    """All arms on one page: ablation table, forest plots, curves, confusion matrices, sweeps; the same for W&B."""
    from facemask import dashboard as board
    from facemask.study import open_study

    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out} cannot be written: name a file in a folder that exists")
    entity, _, project = (wandb or "").partition("/")
    if wandb is not None and not (entity and project):
        raise UserError(f"--wandb {wandb}: give ENTITY/PROJECT")
    wanted = board.read_spec(spec or board.SPEC)
    arms = board.arms_of(experiments, runs or [])
    if not arms:
        raise UserError(f"{experiments} holds no record: name --experiments, or run folders")
    studies = [open_study(name, storage) for name in sweeps or []]
    typer.echo(f"written {board.build_page(arms, studies, wanted).write(out)}")
    for url in board.publish(wanted, entity, project) if wandb else []:
        typer.echo(f"saved {url}")


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
