"""What is checked about a config before torch is imported, and how mistakes are told.

Everything here works on the composed config alone, so that a wrong key, value or pair stops in about a second.
"""

import difflib
import importlib.util
import itertools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from facemask.errors import DISK_FULL, UserError, is_disk_full
from facemask.files import read_yaml
from facemask.parent import die_with_parent


def job_folder(overrides: list[str], number: int) -> str:
    """Folder name of one job of a multirun: the overrides that differ between its jobs, or its number."""
    options = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(options)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    name = ",".join(sorted(override for override in overrides if override.split("=")[0].lstrip("+~") in swept))
    return re.sub(r"[/\\ ]+", "_", name)[:200] or str(number)


OmegaConf.register_new_resolver("facemask.job_folder", job_folder, replace=True)
# Of conf/hydra/launcher: a launcher is used by multiruns alone, so one that is named makes a multirun, also of one job.
OmegaConf.register_new_resolver(
    "facemask.mode", lambda launcher: "MULTIRUN" if "submitit" in launcher else None, replace=True
)
OmegaConf.register_new_resolver(
    "facemask.tasks", lambda devices: devices if _is_int(devices) and devices > 0 else 1, replace=True
)
# Hydra checks them against what the plugin declares under the same name, and says that it will not for ever.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_\w+' is validated against")

OBJECTIVES = "facemask.modeling.objectives."
NEEDS_TOKEN = {OBJECTIVES + "HardDistillation", OBJECTIVES + "SoftDistillation"}
REFUSES_TOKEN = {OBJECTIVES + "LogitDistillation"}

ROOT = Path(__file__).resolve().parents[2]  # of the repository: train.py and conf/ lie there
_ABSENT = object()
Test = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = False) -> Test:
    def inside(value: Any) -> bool:  # of no order with nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = value > low if open_low else value >= low
        return above and (value < high if open_high or high == float("inf") else value <= high)

    return inside


def _is_list(value: Any) -> bool:
    return isinstance(value, list | ListConfig)


def _integer(low: int) -> Test:
    return lambda value: _is_int(value) and value >= low


def _one_of(*names: Any) -> Test:
    return lambda value: value in names


_POSITIVE = (_number(0, open_low=True), "a number above 0")
_NOT_NEGATIVE = (_number(0), "a number of at least 0")
_SHARE = (_number(0, 1), "a number from 0 to 1")
_SHARE_BELOW_1 = (_number(0, 1, open_high=True), "a number from 0 to below 1")
_SHARE_ABOVE_0 = (_number(0, 1, open_low=True), "a number above 0 and at most 1")
_COUNT = (_integer(1), "a whole number of at least 1")
_WHOLE = (_integer(0), "a whole number of at least 0")
_SWITCH = (lambda value: isinstance(value, bool), "true or false")

# These may be null; any other key of VALUES needs a value.
MAY_BE_NULL = {
    "data.fold",
    "model.depth",
    "teacher.weights",
    "threads",
    "trainer.max_epochs",
    "callbacks.last.every_n_train_steps",
    "callbacks.last.every_minutes",
}

# key -> (test, what the value must be). A key that a user's own group does not have is not checked.
VALUES: dict[str, tuple[Test, str]] = {
    "seed": _WHOLE,
    "augment.mix_prob": _SHARE,
    "augment.mixup_alpha": _NOT_NEGATIVE,
    "augment.cutmix_alpha": _NOT_NEGATIVE,
    "augment.seed": _WHOLE,
    "augment.degrade": _SHARE,
    "augment.counterfactual": _SHARE,
    "augment.small_epochs": _WHOLE,
    "augment.small_size": _COUNT,
    "data.batch_size": _COUNT,
    "data.num_workers": _WHOLE,
    "data.crop_pct": _SHARE_ABOVE_0,
    "data.fraction": _SHARE_ABOVE_0,
    "data.fold": _WHOLE,
    "data.folds": (_integer(2), "a whole number of at least 2"),
    "data.label_noise": _SHARE_BELOW_1,
    "data.split_ratios": (
        lambda value: _is_list(value) and len(value) == 3 and all(map(_number(0), value)),
        "three shares [train,val,test]",
    ),
    "data.split_seed": _WHOLE,
    "data.num_images": (_integer(20), "a whole number of at least 20"),
    "data.states": (lambda value: value in (2, 5), "2 (with or without mask) or 5 (how the mask is worn)"),
    "data.on_bad_file": (_one_of("error", "skip"), "error or skip"),
    "data.cache": (_one_of("decoded", "none"), "decoded or none"),
    "data.max_pixels": _COUNT,
    "distill.alpha": _SHARE,
    "distill.base.alpha": _SHARE,
    "distill.base.tau": _POSITIVE,
    "distill.tau": _POSITIVE,
    "distill.weight": _NOT_NEGATIVE,
    "distill.reduction": (_one_of("batchmean", "numel"), "batchmean or numel"),
    "evaluate.batch_size": _COUNT,
    "evaluate.splits": (
        lambda value: _is_list(value) and len(value) > 0 and all(name in ("train", "val", "test") for name in value),
        "a list of one or more of train, val, test, such as [val,test]",
    ),
    "evaluate.resamples": (_integer(100), "a whole number of at least 100"),
    "model.name": (lambda value: isinstance(value, str) and bool(value), "the name of a timm model"),
    "model.img_size": _COUNT,
    "model.pretrained": _SWITCH,
    "model.freeze_backbone": _SWITCH,
    "model.save_features": _SWITCH,
    "model.freeze_patch_embed": _SWITCH,
    "model.depth": _COUNT,
    "model.drop_rate": _SHARE_BELOW_1,
    "model.drop_path_rate": _SHARE_BELOW_1,
    "model.patch_drop_rate": _SHARE_BELOW_1,
    "model.patch_embed": (
        _one_of("linear", "conv_stem", "efficientnet_lite0"),
        "linear, conv_stem or efficientnet_lite0",
    ),
    "model.init": (_one_of("timm", "structured"), "timm or structured"),
    "resume": _SWITCH,
    "threads": _COUNT,
    "callbacks.last.every_n_train_steps": _COUNT,
    "callbacks.last.every_minutes": _POSITIVE,
    "optim.lr": _POSITIVE,
    "optim.lr_batch_size": _COUNT,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.layer_decay": _SHARE_ABOVE_0,
    "optim.label_smoothing": _SHARE_BELOW_1,
    "optim.warmup_fraction": _SHARE_BELOW_1,
    "optim.min_lr_ratio": _SHARE,
    "teacher.crossfit": _COUNT,
    "teacher.epochs": _COUNT,
    "teacher.img_size": _COUNT,
    "teacher.lr": _POSITIVE,
    "teacher.save_logits": _SWITCH,
    "teacher.train": (_one_of("frozen", "finetune", "scratch"), "frozen, finetune or scratch"),
    "teacher.weights": (_one_of("package", "hub"), "package, hub or null"),
    "trainer.max_epochs": _COUNT,
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.num_nodes": _COUNT,
    **{
        f"trainer.hardware.{key}": (_one_of("auto", True, False), "auto, true or false")
        for key in ("tf32", "channels_last", "pin_memory", "prefetch", "compile", "gradient_checkpointing")
    },
}


def has_token(cfg: DictConfig) -> bool:
    """Whether the named timm model has a distillation token."""
    return "distilled" in cfg.model.name


def distills(cfg: DictConfig) -> bool:
    """Whether the run needs a teacher; asks the objective's class, and so imports it and torch."""
    return bool(get_class(cfg.distill._target_).needs_teacher)  # type: ignore[attr-defined]


def check(cfg: DictConfig) -> None:
    """Stop before anything is imported or written.

    Raises:
        UserError: a value is out of its range, or two choices cannot go together; names key and mend.
    """
    for group in ("data", "distill"):
        if OmegaConf.select(cfg, f"{group}._target_") is None:
            raise UserError(f"{group}={_choice(group)} names no class (_target_): choose another {group}=")
    for key, (valid, meaning) in VALUES.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is _ABSENT or (value is None and key in MAY_BE_NULL):
            continue
        if not valid(value):
            raise UserError(f"{key}={'null' if value is None else value} must be {meaning}")

    fold, folds = OmegaConf.select(cfg, "data.fold"), OmegaConf.select(cfg, "data.folds")
    if fold is not None and fold >= folds:
        raise UserError(f"data.fold={fold} must be below data.folds={folds}")

    base = cfg.distill.get("base")  # feature distillation and controls leave the heads to another objective
    feature = cfg.distill._target_ == OBJECTIVES + "FeatureDistillation"
    objective, name = (base or cfg.distill)._target_, cfg.model.name
    if objective in NEEDS_TOKEN and not has_token(cfg):
        raise UserError(
            f"distill={_choice('distill')} needs a distillation token and {name} has none: "
            "choose model=deit_distilled, or distill=logit (distill/base=logit) to distil without a token"
        )
    if objective in REFUSES_TOKEN and has_token(cfg):
        raise UserError(
            f"distill={_choice('distill')} is for models without a token and {name} has one: "
            "choose distill=soft, or model=deit"
        )

    if cfg.data.img_size != cfg.model.img_size:
        raise UserError(
            f"data.img_size={cfg.data.img_size} and model.img_size={cfg.model.img_size} differ: set model.img_size"
        )
    patch = re.search(r"patch(\d+)", name)
    if cfg.model.patch_embed == "conv_stem" and patch and int(patch.group(1)) != 16:
        raise UserError(
            f"model.patch_embed=conv_stem makes tokens of 16 pixels and {name} has others: use a patch16 model"
        )
    step = 32 if cfg.model.patch_embed == "efficientnet_lite0" else int(patch.group(1)) if patch else 1
    if cfg.model.img_size % step:
        lower = max(step, cfg.model.img_size // step * step)
        raise UserError(
            f"model.img_size={cfg.model.img_size} is not a multiple of the patch size {step}: "
            f"choose {lower} or {lower + step}"
        )
    small = cfg.augment.get("small_size", step)
    if cfg.augment.get("small_epochs", 0) and (small % step or small > cfg.model.img_size):
        raise UserError(
            f"augment.small_size={small} must be a multiple of the patch size {step} up to model.img_size="
            f"{cfg.model.img_size}"
        )
    if cfg.augment.get("counterfactual", 0) and importlib.util.find_spec("skimage") is None:
        raise UserError("augment.counterfactual needs scikit-image: pip install 'facemask[faces]'")
    if cfg.model.get("save_features", False) and (feature or not cfg.model.freeze_backbone):
        raise UserError(
            "model.save_features=true is for heads on a frozen backbone: add model.freeze_backbone=true, and choose "
            "another objective than distill=feature"
        )
    if feature and cfg.model.get("patch_drop_rate", 0):
        raise UserError("distill=feature teaches every patch token: choose model.patch_drop_rate=0")
    if fold is not None and OmegaConf.select(cfg, "data.split"):
        raise UserError("data.fold and data.split both say which pictures are tested: give one of the two")
    if feature and (cfg.teacher.get("train") != "frozen" and cfg.teacher.get("crossfit", 1) > 1):
        raise UserError(
            "distill=feature needs one feature space, and teacher.crossfit trains a CNN for every fold: "
            "choose teacher.train=frozen or teacher.crossfit=1"
        )
    if cfg.model.pretrained and cfg.model.checkpoint:
        raise UserError("model.pretrained=true and model.checkpoint both name weights: give one of the two")
    if cfg.model.freeze_backbone and not (cfg.model.pretrained or cfg.model.checkpoint):
        raise UserError(
            "model.freeze_backbone=true trains the heads alone, so the rest needs weights: "
            "give model.pretrained=true or model.checkpoint=FILE"
        )


def _choice(group: str) -> str:
    return str(HydraConfig.get().runtime.choices[group]) if HydraConfig.initialized() else "..."


def is_main_process() -> bool:
    """True in the process that writes: rank 0, or the only one."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Refuse a run folder that cannot be written, or that already holds a run.

    Raises:
        UserError: names the folder and the mend.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())) and not resume:
        raise UserError(f"run_dir={run_dir} is not empty and is never overwritten: choose another, or resume=true")
    existing = next(parent for parent in [run_dir, *run_dir.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir={run_dir} cannot be written ({existing} is not a writable folder): choose another")


class CheckBeforeRun(Callback):
    """Hydra callback: the checks above, before Hydra makes its output folder.

    Hydra turns exceptions of callbacks into warnings, so a mistake exits from here.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)
        try:
            check(config)
            if is_main_process():
                check_run_dir(Path(config.run_dir), config.resume)
            else:
                config.run_dir = str(Path(config.hydra.run.dir).absolute())
                with read_write(config.hydra.run):
                    config.hydra.run.dir = "."  # Hydra would make a folder, at another second than in rank 0
        except (UserError, OmegaConfBaseException) as error:
            stop(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = [*config.hydra.overrides.task, *config.hydra.overrides.hydra]
        launcher = config.hydra.launcher._target_
        if "submitit" in launcher and not importlib.util.find_spec("submitit"):
            stop(UserError("hydra/launcher=submitit_... needs the extra slurm: pip install 'facemask[slurm]'"))
        if "SlurmLauncher" in launcher and not shutil.which("sbatch"):
            stop(UserError("hydra/launcher=submitit_slurm needs sbatch, which is not here: log in to the cluster"))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            stop(UserError("torchrun starts the ranks of one job: leave out -m, or let trainer=ddp start the ranks"))
        if any(re.match(r"\+*(hydra\.)?run[_.]dir=", override) for override in given):
            sentence = "-m gives every job a folder of its own, so run_dir cannot be fixed: leave it out, "
            stop(UserError(sentence + "or name the folder of all jobs with +sweep_name=NAME"))
        for job_overrides in _jobs(config.hydra.overrides.task):
            try:
                composed = compose(config.hydra.job.config_name, job_overrides, return_hydra_config=True)
                HydraConfig.instance().set_config(composed)
                check(composed)
            except (UserError, HydraException, OmegaConfBaseException) as error:
                stop(error)


def _jobs(overrides: list[str], most: int = 200) -> Iterator[list[str]]:
    """The overrides of each job of Hydra's basic sweeper, at most so many: all are checked before the first runs."""
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return map(list, itertools.islice(itertools.product(*choices), most))


# What a config that is read back from a file may have built: classes and factories at a fixed depth, so that no name
# leads through a module to something else (facemask.config.os.system).
_MAY_BE_BUILT = re.compile(
    r"facemask\.modeling\.[a-z]+\.([A-Z]\w*|build_\w+|warmup_\w+)"
    r"|facemask\.data\.(datamodule|hub|transforms)\.[A-Z]\w*"
    r"|facemask\.devices\.build_trainer|facemask\.runs\.(loggers|checkpoints)\.[A-Z]\w*|albumentations\.(pytorch\.)?[A-Z]\w*"
    r"|pytorch_lightning\.(callbacks|loggers|profilers|strategies)\.[A-Z]\w*"
    r"|torch\.optim\.(lr_scheduler\.)?[A-Z]\w*|timm\.(optim|scheduler)\.[A-Z]\w*"
)


def check_targets(config: Any, source: Path | str) -> None:
    """Refuse a stored config that would build anything but models, data, optimizers and the like.

    Args:
        config: dictionaries and lists, as read from a file.
        source: the file, for the sentence.

    Raises:
        UserError: names the first `_target_` that is not allowed, or an interpolation: it could become one.
    """
    if isinstance(config, str) and "${" in config:
        raise UserError(f"{source} holds {config!r}, which a run never stores: configs are kept resolved")
    if isinstance(config, dict):
        target = config.get("_target_")
        if target is not None and not (isinstance(target, str) and _MAY_BE_BUILT.fullmatch(target)):
            raise UserError(f"{source} asks for {target!r}, which is never built from a file: use a file of train.py")
        config = list(config.values())
    if isinstance(config, list | tuple):
        for part in config:
            check_targets(part, source)


def read_config(file: Path) -> dict[str, Any]:
    """The config that a run folder or a record keeps.

    Raises:
        UserError: it is missing or damaged, or `check_targets` refuses it.
    """
    config = read_yaml(file)
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        raise UserError(f"{file} is no config of a run: give the folder of a run")
    check_targets(config, file)
    return config


def composed(*overrides: str, name: str = "train", hydra: bool = False) -> DictConfig:
    """The config that `python train.py OVERRIDES` has, or sweep.py; with Hydra's own part, where asked for."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=hydra)


def as_plain(cfg: Any) -> Any:
    """Resolved plain dictionaries and lists: what checkpoints, run folders and hashes are made of."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True) if OmegaConf.is_config(cfg) else cfg


def user_sentence(error: BaseException) -> str | None:
    """The sentence for the user behind an exception, or None where it is a defect of the program."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if is_disk_full(cause):
            return DISK_FULL
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, InstantiationException) and not isinstance(error.__cause__, TypeError | ImportError):
        return None  # the class was found and its arguments fit: it failed inside
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _config_sentence(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return "a config group cannot be null: leave it out, or choose one of its files (logger=none, distill=none)"
    return None


def _config_sentence(error: BaseException) -> str:
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        near = difflib.get_close_matches(key, sorted(VALUES), n=1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        if key in VALUES or key in ("data.root", "data.split"):
            hint = f"; another choice of {key.split('.')[0]}= has it"
        return f"unknown key {key}{hint} (python train.py --cfg job lists all keys; +{key}=... adds one on purpose)"
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing:
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        options = [option for option in options if not option.startswith("_")]
        return f"{missing.group(1)}={missing.group(2)} does not exist: choose one of {', '.join(options)}"
    return " ".join(text.split("\nSee ")[0].split())


def stop(error: BaseException) -> NoReturn:
    """Tell a mistake of the user and exit with code 2; any other exception is raised again."""
    sentence = user_sentence(error)
    if sentence is None:
        raise error
    if all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID")):  # others here find the same
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def job(task: Callable[[DictConfig], Any], cfg: DictConfig) -> None:
    """Run one job. A single one exits here, before Hydra prints more about it than the sentence; in a multirun the
    other jobs go on, and the first mistake is told at the end."""
    try:
        task(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN or isinstance(error, OmegaConfBaseException):
            raise
        stop(error)


def command(main: Callable[[], Any]) -> None:
    """Run a Hydra entry point; mistakes of the user end in one sentence and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as exceptions, not as text and exit code 1
    die_with_parent()
    try:
        if any(argument.startswith("hydra/sweeper=optuna") for argument in sys.argv):
            raise UserError("Hydra's Optuna sweeper neither prunes nor resumes: use python sweep.py sweep=NAME")
        main()
    except Exception as error:
        stop(error)
