"""One run from config to report: data, teacher, student, predictions, numbers. Read this first."""

import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import hydra.utils
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.utils.data import DataLoader

from facemask.audit import baselines
from facemask.config import ROOT, as_plain, check, check_run_dir, distills, is_main_process
from facemask.data import cache as pixel_cache
from facemask.data import datamodule, images, transforms
from facemask.data.datamodule import ImageData
from facemask.data.manifest import label_conflicts
from facemask.data.splits import count
from facemask.devices import Prefetched, activation_bytes, choose, set_threads, use_tf32
from facemask.errors import UserError
from facemask.evaluate import console, predict_splits
from facemask.files import write_json, write_text
from facemask.modeling import saved_logits
from facemask.modeling import teacher as teachers
from facemask.modeling.classifier import Classifier
from facemask.modeling.saved_logits import SavedLogits
from facemask.modeling.teacher import Teacher, TeacherSpec, TrainingSplit
from facemask.ranks import Ranks, join_submitit
from facemask.runs import metrics as run_metrics
from facemask.runs.checkpoints import checkpoint_facts, position, read_checkpoint, verify_checkpoint, weights_sha256
from facemask.runs.folder import RunFolder, file_sha256
from facemask.runs.ledger import openings, record_opening
from facemask.runs.loggers import Counter, Curves, WandbLogger
from facemask.runs.predictions import read_predictions, write_predictions
from facemask.runs.provenance import changes, collect
from facemask.runs.report import DEGENERATE, run_report, terminal_table
from facemask.runs.storage import PRUNED
from facemask.trial import Report

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """Run one experiment and return its summary (None in processes of rank above 0).

    Raises:
        UserError: whatever the user can mend; before the first training step, and without a run folder left behind.
    """
    join_submitit()
    if is_main_process() or HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.run_dir = HydraConfig.get().runtime.output_dir
    folder = RunFolder(Path(cfg.run_dir))
    try:
        try:
            return _train(cfg, folder)
        except MisconfigurationException as error:
            raise UserError(" ".join(str(error).split())) from error
    except BaseException as error:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=1)  # or the next job of a multirun would log into this one's run
        if folder.locked and folder.status().get("state") == "running":
            folder.set_status(
                "killed" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed", error=str(error)
            )
        if isinstance(error, SIGTERMException):
            sys.exit(143)  # as shells do; Lightning's own code is 0, as if the run had finished
        raise
    finally:
        folder.release()


def _train(cfg: DictConfig, folder: RunFolder) -> dict[str, Any] | None:
    main = is_main_process()
    if main:
        check_run_dir(folder.path, cfg.resume)
        folder.lock()
    check(cfg)
    config = as_plain(cfg)
    resuming = cfg.resume and (folder.path / "config.yaml").exists()
    if main and resuming:
        folder.resume(config)
    if resuming and folder.status()["state"] == "finished":
        if main:
            _print_results(folder)
        return json.loads((folder.path / "summary.json").read_text()) if main else None
    cv2.setNumThreads(0)
    set_threads(cfg.threads or (folder.provenance()["hardware"]["torch_threads"] if resuming else None))
    _quiet_lightning()

    # -- everything that can be wrong is found here, before the run folder is written
    trainer = _trainer(cfg, logger=False, enable_checkpointing=False)
    device = trainer.strategy.root_device
    data = build_data(cfg)
    data.prepare(cfg.evaluate.splits)
    data.check_shares(trainer.world_size)
    if resuming and main:
        folder.check_data(data.fingerprint)
    spec = hydra.utils.instantiate(cfg.teacher) if distills(cfg) else None
    if spec is not None:
        data.crossfit = spec.crossfit
    classifier = Classifier(
        model=config["model"],
        objective=config["distill"],
        optim=config["optim"],
        classes=data.classes,
        seed=cfg.seed,
        global_batch=data.batch_size * trainer.accumulate_grad_batches,
        teacher_dims=spec.dims(data.classes) if spec and not _needs_only_logits(cfg) else None,
    )
    share = data.batch_size // trainer.world_size
    needed = activation_bytes(classifier.backbone.network, share, str(trainer.precision))
    hardware = choose(cfg.trainer.hardware, device, needed)
    _use(hardware, data, classifier, device)
    curves, counter = Curves(folder.path / "curves.csv"), Counter()
    report = Report.from_environment()
    ranks = Ranks(config, data.fingerprint, partial(folder.set_status, "failed") if main else None)
    callbacks = [*hydra.utils.instantiate(cfg.callbacks or {}).values(), counter, *report, ranks]
    provenance, diff = collect(HydraConfig.get().overrides.task)
    provenance["hardware"]["processes"] = trainer.world_size
    elsewhere = _resumed_elsewhere(folder.provenance(), provenance) if resuming else []
    if main:
        _print_start(cfg, data, classifier, trainer, folder, hardware)
        for note in elsewhere:
            console.print(f"note      {note}")
    obtain = _attach_teacher(cfg, spec, data, classifier, provenance, device) if spec is not None else None
    if cfg.model.save_features:
        backbone = classifier.backbone
        frozen = {name: weight for name, weight in backbone.named_parameters() if not weight.requires_grad}
        header = {
            "backbone": weights_sha256({**frozen, **dict(backbone.named_buffers())}),
            "network": {key: config["model"][key] for key in ("name", "img_size", "depth", "patch_embed")},
            "data": training_split(cfg, data).fingerprint,
            "augment": config["augment"],
            "batch_size": data.batch_size,
            "precision": str(trainer.precision),
            **_views_code(provenance, device),
        }
        width = backbone.network.head_hidden_size * (2 if backbone.has_token else 1)
        pictures = len(data.rows("train"))
        classifier.save_features(SavedLogits(Path(cfg.cache_dir), header, pictures, width, kind="features"))

    # -- the student
    if main and not resuming:
        facts = data.table[["path", "label", "split", "group", "sha256", "bytes"]]
        write_text(folder.path / "split.csv", facts.to_csv(index=False, lineterminator="\n"))
        seeds = {"run": cfg.seed, "augment": cfg.augment.get("seed"), "split": cfg.data.get("split_seed")}
        folder.start(config, {**provenance, "seeds": seeds, "fingerprint": data.fingerprint}, diff)
    loggers = _loggers(cfg, config, data, folder)
    trainer = _trainer(cfg, logger=[curves, *loggers], callbacks=callbacks, default_root_dir=folder.path)
    checkpoint = folder.last_checkpoint if resuming and folder.last_checkpoint.exists() else None
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        curves.continue_from(state["global_step"])
        data.resume_at = position(state)
    with _one_job(cfg, ranks):
        trainer.fit(classifier, data, ckpt_path=checkpoint, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if any(trial.pruned for trial in report):
            for logger in loggers:
                if isinstance(logger, WandbLogger):
                    logger.mark_pruned()
            if main:
                folder.set_status("pruned")
            sys.exit(PRUNED if main else 0)  # Lightning's launcher kills all where one of its children fails
        teacher, teacher_file, digest = obtain() if obtain else (None, None, None)
        if teacher is not None and teacher.digest() != digest:
            raise RuntimeError("the teacher changed while the student was trained")

        # -- from here on everything comes from the best checkpoint and the predictions it makes
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        reported = Path(best or folder.last_checkpoint)
        opened = openings(Path(cfg.ledger), data.test_fingerprint)
        if main:
            verify_checkpoint(reported)
            if "test" in cfg.evaluate.splits:
                opened = record_opening(Path(cfg.ledger), data.test_fingerprint, cfg.run_dir, provenance["command"])
        reported = trainer.strategy.broadcast(reported)
        use_tf32(False)  # predictions are in fp32
        student = Classifier.load_from_checkpoint(reported, map_location="cpu", weights_only=True)
        ranks_of = trainer.global_rank, trainer.world_size
        splits, batch_size = cfg.evaluate.splits, cfg.evaluate.batch_size
        frame, timing = predict_splits(student, teacher, data, splits, batch_size, device, ranks_of)
    if not main:
        return None
    floor = baselines(data.table, list(cfg.evaluate.splits), Path(cfg.cache_dir))
    frame = frame.merge(floor, on=["id", "split", "group", "label"], how="left", validate="one_to_one")
    write_predictions(folder.path / "predictions.parquet", frame, data.classes)
    frame, classes = read_predictions(folder.path / "predictions.parquet")
    numbers = run_metrics.evaluate(frame, classes, resamples=cfg.evaluate.resamples)
    write_json(folder.path / "metrics.json", numbers)
    checkpoints = {file.name: checkpoint_facts(file) for file in sorted((folder.path / "checkpoints").glob("*.ckpt"))}
    write_json(folder.path / "checkpoints.json", checkpoints)
    summary = {
        "name": folder.path.name if cfg.name == folder.path.name else f"{cfg.name} {folder.path.name}",
        "reported_head": student.reported_head,
        "weights_sha256": checkpoints[reported.name]["weights_sha256"],
        "test_opened": opened,
        "data": _data_facts(data),
        "distillation": _distillation_facts(cfg, folder.path / "curves.csv", teacher_file) if teacher else {},
        "training": _training_facts(trainer, counter, classifier, data, numbers, timing),
        "notes": [*_notes(cfg, data, classifier, best), *elsewhere],
    }
    write_json(folder.path / "summary.json", summary)
    run_report(folder.path, pictures=data.picture)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_results(numbers, frame, classes, student.reported_head, data.picture)
    folder.set_status("finished")
    _print_results(folder)
    return summary


# -- the parts --------------------------------------------------------------------------------------------------


def _trainer(cfg: DictConfig, **arguments: Any) -> pl.Trainer:
    try:
        return hydra.utils.instantiate(cfg.trainer, _partial_=True)(**arguments)
    except TypeError as error:
        raise UserError(f"trainer= does not fit Lightning's Trainer: {error}") from error


def _use(hardware: dict[str, bool], data: ImageData, classifier: Classifier, device: torch.device) -> None:
    use_tf32(hardware["tf32"])
    Teacher.memory_format = torch.channels_last if hardware["channels_last"] else torch.contiguous_format
    data.pin_memory = hardware["pin_memory"]
    if hardware["prefetch"]:
        data.prefetched = partial(Prefetched, device=device)
    if hardware["gradient_checkpointing"]:
        classifier.backbone.network.set_grad_checkpointing(True)
    if hardware["compile"]:
        classifier.backbone.compile()


@contextmanager
def _one_job(cfg: DictConfig, ranks: Ranks) -> Iterator[None]:
    """Let Lightning's launcher start further ranks with this job's resolved config, and all ranks end together.

    It starts them by `sys.argv`, which in a multirun names all jobs, and leaves its variables and its process group
    behind, which would make the next job wait for ranks that nobody started.
    """
    argv, variables = sys.argv, ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in variables}
    hydra_config: Any = HydraConfig.instance().cfg
    with read_write(hydra_config.hydra.run):
        hydra_config.hydra.run.dir = "."  # of the further ranks: the config has the run's folder
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_text(Path(scratch) / "job.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            job = ["--config-dir", scratch, "--config-name", "job", "hydra/job_logging=stdout"]
            sys.argv = [str(ROOT / "train.py"), *job]
            yield
        ranks.stop_watching()
    except BaseException as error:
        ranks.end_if_lost(error)
        ranks.tell(error)
        ranks.stop_watching(together=isinstance(error, SystemExit) and error.code in (0, PRUNED))
        raise
    finally:
        sys.argv = argv
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def build_data(cfg: DictConfig) -> ImageData:
    """The data module of a config, not yet prepared."""
    augmentation = hydra.utils.instantiate(cfg.augment, _convert_="all")  # albumentations wants plain lists
    return hydra.utils.instantiate(cfg.data, _partial_=True)(augmentation=augmentation)


def training_split(cfg: DictConfig, data: ImageData) -> TrainingSplit:
    """The training split as a teacher is fitted on it: true labels, and the student's own views."""
    views = data.train_views(noisy=False)

    def train_batches(epoch: int, rows: np.ndarray) -> DataLoader:
        order = np.random.default_rng([cfg.teacher.seed, epoch]).permutation(rows)
        keys: Any = [(epoch, int(row)) for row in order]
        return DataLoader(views, data.batch_size, sampler=keys, drop_last=len(keys) >= data.batch_size)

    train = data.table.iloc[data.rows("train")]
    seen = [data.working_size, data.img_size, as_plain(cfg.augment) if cfg.teacher.train != "frozen" else None]
    digest = hashlib.sha256(json.dumps(seen).encode())
    for row in zip(train["path"], train["label"], train["sha256"], data.crossfit_folds().tolist(), strict=True):
        digest.update(json.dumps(row).encode())
    return TrainingSplit(
        classes=data.classes,
        eval_batches=lambda: data.eval_loader("train", cfg.evaluate.batch_size),
        train_batches=train_batches,
        folds=data.crossfit_folds(),
        fingerprint=digest.hexdigest(),
    )


def _needs_only_logits(cfg: DictConfig) -> bool:
    return hydra.utils.get_class(cfg.distill._target_).needs_only_logits  # type: ignore[attr-defined]


def _attach_teacher(
    cfg: DictConfig,
    spec: TeacherSpec,
    data: ImageData,
    classifier: Classifier,
    provenance: dict[str, Any],
    device: torch.device,
) -> Callable[[], tuple[Teacher, Path, str]]:
    """Give the student its teacher, fitted once and kept, or its saved logits.

    Returns: what gives the teacher, its file and its digest. Where all of its logits are saved it is not loaded before.
    """
    cache_dir, split = Path(cfg.cache_dir), training_split(cfg, data)

    @cache
    def obtain() -> tuple[Teacher, Path, str]:
        teacher, file = spec.obtain(split, device, cache_dir)
        return teacher, file, teacher.digest()

    def saved() -> SavedLogits:
        header = {
            "teacher_sha256": file_sha256(spec.file(split, cache_dir)),
            "data": split.fingerprint,
            "augment": as_plain(cfg.augment),
            **_views_code(provenance, device),
            **{key: cfg.trainer.hardware[key] for key in ("tf32", "channels_last")},
        }
        return SavedLogits(cache_dir, header, len(split.folds), len(data.classes))

    logits = None
    if not (spec.save_logits and _needs_only_logits(cfg)):
        obtain()
    else:
        epochs = range(cfg.trainer.max_epochs or 1)
        if not spec.file(split, cache_dir).exists() or not saved().covers(epochs, data.batch_size):
            obtain()  # what is wrong with a teacher is told before the run folder is written
        logits = saved()
    classifier.attach_teacher(lambda: obtain()[0], torch.tensor(split.folds), logits)
    return obtain


def _views_code(provenance: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The code and the machine that views and logits come from: others may give other bits."""
    code = (transforms, datamodule, images, pixel_cache, teachers, saved_logits)
    hardware, switches = provenance["hardware"], ("ONEDNN_", "DNNL_", "ATEN_", "MKL_CBWR", "NVIDIA_TF32")
    libraries = ("torch", "timm", "numpy", "pillow", "albumentations")
    return {
        "code": hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in code)).hexdigest(),
        "versions": {"opencv": cv2.__version__, **{name: importlib.metadata.version(name) for name in libraries}},
        "hardware": [hardware[key] for key in ("processor", "capability", "torch_threads")],
        "gpus": hardware["gpus"] if device.type != "cpu" else [],
        "environment": {key: value for key, value in provenance["environment"].items() if key.startswith(switches)},
    }


def _loggers(cfg: DictConfig, config: dict[str, Any], data: ImageData, folder: RunFolder) -> list[Any]:
    loggers = []
    os.environ.setdefault("WANDB_SILENT", "true")
    for name, part in (cfg.logger or {}).items():
        more: dict[str, Any] = {}
        if name == "wandb":
            more = {"save_dir": cfg.run_dir, "name": folder.path.name, "version": folder.status().get("id")}
            more |= {"resume": "allow", "log_images": data.drawn if part.log_images is None else part.log_images}
        loggers.append(hydra.utils.instantiate(part, **more))
        loggers[-1].log_hyperparams(config)
    return loggers


def _data_facts(data: ImageData) -> dict[str, Any]:
    facts = {"fingerprint": data.fingerprint, "classes": data.classes, "counts": count(data.table).to_dict()}
    return {**facts, "left_out": data.left_out, "not_in_split_file": data.unnamed}


def _distillation_facts(cfg: DictConfig, curves: Path, teacher_file: Path | None) -> dict[str, Any]:
    """Means over all views that the training really used: every epoch has the same number of them."""
    logged = pd.read_csv(curves)
    names = ("teacher_label_disagreement", "teacher_entropy", "student_teacher_agreement")
    facts: dict[str, Any] = {name: float(logged[f"train/{name}"].mean()) for name in names}
    hard = "Hard" in (cfg.distill.get("base") or cfg.distill)._target_
    facts["degenerate"] = hard and facts["teacher_label_disagreement"] < DEGENERATE
    if teacher_file is not None:
        facts["teacher_sha256"] = file_sha256(teacher_file)
    return facts


def _training_facts(
    trainer: pl.Trainer,
    counter: Counter,
    classifier: Classifier,
    data: ImageData,
    numbers: dict[str, Any],
    timing: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The figures a Hugging Face card of this family prints, from what was really done.

    total_flos follows Hugging Face's convention, 6 * values of the input * parameters (transformers
    `floating_point_ops`), so that cards can be compared; it is no count of operations.
    """
    counts = counter.counts
    parameters = sum(p.numel() for p in classifier.backbone.parameters())
    seconds = counts["seconds"]
    train_size = len(data.rows("train"))
    facts: dict[str, Any] = {
        "epoch": counts["images"] / train_size,
        "total_flos": 6 * 3 * data.img_size**2 * parameters * counts["images"],
        "train_loss": counts["loss"] / max(1, counts["batches"]),
        "train_runtime": seconds,
        "train_samples_per_second": counts["images"] / seconds,
        "train_steps_per_second": trainer.global_step / seconds,
        "parameters": parameters,
        "precision": str(trainer.precision),
    }
    if "val" in timing:
        head = numbers["val"][classifier.reported_head]
        took = timing["val"]
        facts |= {
            "eval_accuracy": head["accuracy"]["value"],
            "eval_loss": head["nll"]["value"],
            "eval_runtime": took["seconds"],
            "eval_samples_per_second": took["images"] / took["seconds"],
            "eval_steps_per_second": took["steps"] / took["seconds"],
        }
    return facts


def _notes(cfg: DictConfig, data: ImageData, classifier: Classifier, best: str) -> list[str]:
    notes = []
    if not best:
        notes.append("Nothing was validated while training, so the last checkpoint stands for the best.")
    if classifier.backbone.load_report is not None:
        notes.append(str(classifier.backbone.load_report))
    if cfg.model.pretrained:
        notes.append(
            f"{cfg.model.name} starts from pretrained weights: between runs of different names the weights "
            "(ImageNet-21k or ImageNet-1k, and their normalisation) are compared as well as the recipes."
        )
    conflicts = label_conflicts(data.table)
    if conflicts:
        notes.append(f"{len(conflicts)} pair(s) of identical files have different labels, such as {conflicts[0]}.")
    return notes


def _resumed_elsewhere(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    notes = []
    if changed := changes(before, now):
        notes.append(
            f"Resumed with another {', '.join(changed[:5])} than at the start: the bits may not be those of one go."
        )
    processes, first = (part["hardware"].get("processes", 1) for part in (now, before))
    if processes != first:
        notes.append(
            f"Resumed with {processes} process{'es' * (processes > 1)} instead of {first}: every step has the same "
            "pictures, but gradients are summed in another order and each rank draws its own dropout and random depth, "
            "so weights, losses and predictions are not the bits of one go."
        )
    return notes


def _quiet_lightning() -> None:
    """Lightning's hints and its warnings about choices that are made on purpose here."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",  # of Lightning's own code
        ".*smaller than the logging interval.*",  # means over the epoch are logged whatever the interval
        ".*does not have many workers.*",  # cached pixels make loading cheap
        ".*Checkpoint directory .* exists and is not empty.*",  # resumed runs
        ".*in eval mode at the start of training.*",  # the hybrid's frozen CNN
        ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",  # where saved logits are read
        ".*all_gather is deprecated.*",  # of Lightning's own code
        ".*your dataloader is not resumable.*",  # the sampler leaves out what the epoch has had
    ):
        warnings.filterwarnings("ignore", message)


# -- what the terminal shows ------------------------------------------------------------------------------------


def _print_start(
    cfg: DictConfig,
    data: ImageData,
    classifier: Classifier,
    trainer: pl.Trainer,
    folder: RunFolder,
    hardware: dict[str, bool],
) -> None:
    counts = data.table["split"].value_counts()
    sizes = ", ".join(f"{split} {counts.get(split, 0):,}" for split in ("train", "val", "test"))
    console.print(f"data      {sizes} pictures of {len(data.classes)} classes at {data.img_size} px")
    if data.left_out:
        console.print(f"          {len(data.left_out)} left out: {', '.join(sorted(data.left_out)[:5])}")
    if data.unnamed:
        console.print(f"          {data.unnamed} pictures of the folder are not in the split file")
    parameters = sum(p.numel() for p in classifier.backbone.parameters())
    lr = cfg.optim.lr * classifier.hparams["global_batch"] / cfg.optim.lr_batch_size
    console.print(f"model     {cfg.model.name}, {parameters / 1e6:.1f} M parameters, seed {cfg.seed}")
    if classifier.backbone.load_report is not None:
        console.print(f"          {classifier.backbone.load_report}")
    console.print(
        f"training  {cfg.trainer.max_epochs} epochs, batch {classifier.hparams['global_batch']}, peak learning rate "
        f"{lr:.3g} ({cfg.optim.lr:.3g} per {cfg.optim.lr_batch_size} images, linear), {trainer.precision} on "
        f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    )
    used, unused = ([key for key, value in hardware.items() if value == on] for on in (True, False))
    console.print(f"hardware  with {', '.join(used) or 'nothing'}; without {', '.join(unused) or 'nothing'}")
    console.print(f"run       {folder.path}")


def _print_results(folder: RunFolder) -> None:
    summary = json.loads((folder.path / "summary.json").read_text())
    numbers = json.loads((folder.path / "metrics.json").read_text())
    console.print(terminal_table(numbers, summary))
    distillation = summary["distillation"]
    if distillation:
        console.print(
            f"on the training views: teacher and label differ on {distillation['teacher_label_disagreement']:.2%}, "
            f"student and teacher agree on {distillation['student_teacher_agreement']:.2%}"
        )
    if distillation.get("degenerate"):
        console.print("degenerate: the teacher's decisions equal the labels")
    training = summary["training"]
    console.print(
        f"trained at {training['train_samples_per_second']:.0f} images/s for {training['train_runtime']:.0f} s "
        f"({training['precision']}), validation included"
    )
    console.print(f"weights    sha256 {summary['weights_sha256']}")
    console.print(f"run folder {folder.path} (report.html, predictions.parquet, metrics.json)")
