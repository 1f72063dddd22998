"""The teacher: a CNN fitted once on the training split, kept in a file, and asked about the student's own pixels."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.objectives import TeacherOutputs
from facemask.modeling.weights import hub_file, lite0_state_dict, read_state_dict

log = logging.getLogger(__name__)

# Part of every kept teacher's key: raised whenever fitting changes what comes out.
CODE_VERSION = 2


@dataclass(frozen=True)
class TeacherSpec:
    """Config group teacher.

    Args:
        name: timm id of a CNN.
        weights: "package" (EfficientNet-Lite0 from its Python package), "hub" (timm's own), or None (random).
        train: "frozen" fits a linear head on frozen features; "finetune" trains all weights from `weights`;
            "scratch" trains all from random weights.
        img_size: side at which it sees the student's pixels.
        epochs, lr: of "finetune" and "scratch".
        crossfit: number of teachers, each fitted without one fold of the training split.
        checkpoint: teacher file of an earlier run.
        seed: of random weights and of the order of pictures.
        save_logits: keep its logits of training views; it changes nothing about the teacher.
    """

    name: str
    weights: str | None
    train: str
    img_size: int
    epochs: int
    lr: float
    crossfit: int
    checkpoint: str | None
    seed: int
    save_logits: bool = True

    def identity(self) -> dict[str, Any]:
        """All that makes it this teacher."""
        return {key: value for key, value in asdict(self).items() if key != "save_logits"}

    def file(self, split: "TrainingSplit", cache_dir: Path) -> Path:
        """Its file, whether or not it is fitted yet."""
        return Path(self.checkpoint or cache_dir / "teachers" / f"{teacher_key(self, split)}.safetensors")

    def dims(self, classes: list[str] | None = None) -> tuple[list[int], int]:
        """(channels of each feature map, pooled width), from the architecture alone; given the classes of the data,
        from the teacher file where one is named.

        Raises:
            UserError: unknown name, or a teacher file that does not fit the data.
        """
        if self.checkpoint and classes is not None:
            teacher = load_teacher(Path(self.checkpoint), classes)
        else:
            teacher = _new_teacher(replace(self, weights=None), 1, 2)
        return teacher.map_channels, teacher.pooled_dim

    def obtain(self, split: "TrainingSplit", device: torch.device, cache_dir: Path) -> tuple["Teacher", Path]:
        """The teacher and its file: see `fit_or_load`."""
        return fit_or_load(self, split, device, cache_dir)


@dataclass
class TrainingSplit:
    """What a teacher is fitted on.

    eval_batches: () -> batches of evaluation views, dictionaries with `pixels` uint8 (B, 3, H, W) and `label` (B,).
    train_batches: (epoch, rows) -> batches of augmented views with `pixels` and `target` (B, C).
    folds: (N,) cross-fitting fold of every picture.
    fingerprint: identifies pictures, labels, and both kinds of views.
    """

    classes: list[str]
    eval_batches: Callable[[], Iterable[dict[str, Any]]]
    train_batches: Callable[[int, np.ndarray], Any]
    folds: np.ndarray
    fingerprint: str


class Teacher(nn.Module):
    """Frozen CNNs with their heads: evaluation mode, fp32, no gradients.

    With frozen features one CNN is shared by all cross-fitting folds and only the heads differ; otherwise each fold
    has a CNN of its own.

    Args:
        cnns: one timm model without classifier, or one per fold.
        num_classes, crossfit: shape of the heads.
        img_size: pixels are resized to this side (antialiased bicubic).
        mean, std: the CNN's normalisation of pixels / 255.
    """

    memory_format = torch.channels_last  # of CNN and images

    mean: Tensor
    std: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        cnns: list[nn.Module],
        num_classes: int,
        crossfit: int,
        img_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.cnns = nn.ModuleList(cnns)
        self.img_size = img_size
        self.map_channels, self.pooled_dim = self._probe()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))
        self.register_buffer("head_weight", torch.zeros(crossfit, num_classes, self.pooled_dim))
        self.register_buffer("head_bias", torch.zeros(crossfit, num_classes))
        for number, width in enumerate([*self.map_channels, self.pooled_dim]):
            self.register_buffer(f"feature_mean{number}", torch.zeros(len(cnns), width))
            self.register_buffer(f"feature_std{number}", torch.ones(len(cnns), width))
        self.eval().requires_grad_(False)
        self.to(memory_format=self.memory_format)

    def _probe(self) -> tuple[list[int], int]:
        cnn: Any = self.cnns[0].eval()
        with torch.no_grad():
            maps, pooled = _cnn_features(cnn, torch.zeros(1, 3, self.img_size, self.img_size))
        return [feature_map.shape[1] for feature_map in maps], pooled.shape[1]

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def digest(self) -> str:
        """sha256 of all its weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised fp32 at the teacher's size."""
        images = (pixels.float() - self.mean) / self.std
        if images.shape[-1] != self.img_size:
            size = (self.img_size, self.img_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        return images.contiguous(memory_format=self.memory_format)

    @torch.no_grad()
    def features(self, pixels: Tensor, cnn: int = 0) -> tuple[list[Tensor], Tensor]:
        """Feature maps [(B, F, h, w), ...] and pooled features (B, P), as the CNN gives them."""
        with torch.autocast(pixels.device.type, enabled=False):
            return _cnn_features(self.cnns[cnn], self.images(pixels))

    @torch.no_grad()
    def forward(self, pixels: Tensor, folds: Tensor | None = None) -> TeacherOutputs:
        """What the teacher says of the student's own pixels.

        Args:
            pixels: uint8 (B, 3, H, W).
            folds: (B,) the fold of each picture, whose teacher has not seen it; None (pictures outside the training
                split) averages the logits of all folds.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            per_cnn = [self.features(pixels, number) for number in range(len(self.cnns))]
            crossfit = len(self.head_weight)
            logits = torch.stack(
                [
                    F.linear(per_cnn[fold % len(per_cnn)][1], self.head_weight[fold], self.head_bias[fold])
                    for fold in range(crossfit)
                ]
            )
            standard = [self._standard([*maps, pooled], cnn) for cnn, (maps, pooled) in enumerate(per_cnn)]
            chosen, features = logits.mean(dim=0), standard[0]
            if folds is not None:
                rows = torch.arange(len(pixels), device=pixels.device)
                chosen = logits[folds.to(pixels.device), rows]
                if len(per_cnn) > 1:
                    features = [
                        torch.stack([standard[fold][level][row] for row, fold in enumerate(folds.tolist())])
                        for level in range(len(features))
                    ]
            return TeacherOutputs(chosen, features[:-1], features[-1])

    def _standard(self, features: list[Tensor], cnn: int) -> list[Tensor]:
        scaled = []
        for number, values in enumerate(features):
            shape = (1, -1, 1, 1) if values.ndim == 4 else (1, -1)
            mean, std = getattr(self, f"feature_mean{number}")[cnn], getattr(self, f"feature_std{number}")[cnn]
            scaled.append((values - mean.view(shape)) / std.view(shape))
        return scaled


def _cnn_features(cnn: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The two last feature maps (strides 16 and 32 of a usual CNN) and the pooled features."""
    last, maps = cnn.forward_intermediates(images, indices=2)
    return maps, cnn.forward_head(last, pre_logits=True)


# -- fitting ----------------------------------------------------------------------------------------------------


def teacher_key(spec: TeacherSpec, split: TrainingSplit) -> str:
    """Name of a kept teacher: a function of its config, the data it was fitted on, and this code."""
    text = json.dumps([CODE_VERSION, spec.identity(), split.classes, split.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fit_or_load(spec: TeacherSpec, split: TrainingSplit, device: torch.device, cache_dir: Path) -> tuple[Teacher, Path]:
    """The teacher of a config and a data set, fitted once and then read from its file.

    Returns:
        The teacher and its file.

    Raises:
        UserError: weights that cannot be had, or a teacher file of other classes or other cross-fitting folds.
    """
    if spec.checkpoint:
        given = Path(spec.checkpoint)
        teacher, meta = load_teacher(given, split.classes), _read_meta(given)
        folds = len(teacher.head_weight)
        if folds != spec.crossfit:
            raise UserError(
                f"the teacher {given} has {folds} cross-fitting fold(s) and teacher.crossfit={spec.crossfit}: "
                f"set teacher.crossfit={folds} or fit a teacher (teacher.checkpoint=null)"
            )
        if folds > 1 and meta["fingerprint"] != split.fingerprint:
            raise UserError(
                f"the teacher {given} was cross-fitted on other data, so its folds say nothing about these pictures: "
                "fit a teacher on this data (teacher.checkpoint=null)"
            )
        return teacher, given
    file = spec.file(split, cache_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.exists():
            try:
                return load_teacher(file, split.classes), file
            except UserError:
                log.warning("the kept teacher %s is damaged and is fitted again", file)
        log.info("fitting the teacher %s on %d pictures", spec.name, len(split.folds))
        teacher = fit(spec, split, device)
        _save(teacher, spec, split, file)
    return load_teacher(file, split.classes), file


def fit(spec: TeacherSpec, split: TrainingSplit, device: torch.device) -> Teacher:
    """Fit a teacher as its spec says; deterministic given spec and split."""
    num_classes = len(split.classes)
    if spec.train == "frozen":
        teacher = _new_teacher(spec, 1, num_classes).to(device)
    else:
        teacher = _new_teacher(spec, spec.crossfit, num_classes).to(device)
        for fold in range(spec.crossfit):
            rows = _rows_without(split.folds, fold, spec.crossfit)
            _train_cnn(teacher, fold, split, rows, spec, device)
    for cnn in range(len(teacher.cnns)):
        pooled, labels = _fit_feature_scales(teacher, cnn, split, device)
    if spec.train == "frozen":
        for fold in range(spec.crossfit):
            rows = _rows_without(split.folds, fold, spec.crossfit)
            _fit_linear_head(teacher, fold, pooled[rows], labels[rows], num_classes)
    return teacher.cpu()


def _rows_without(folds: np.ndarray, fold: int, crossfit: int) -> np.ndarray:
    return np.arange(len(folds)) if crossfit == 1 else np.flatnonzero(folds != fold)


def _new_teacher(spec: TeacherSpec, cnns: int, num_classes: int) -> Teacher:
    def cnn(number: int) -> nn.Module:
        torch.manual_seed(spec.seed + number)
        try:
            network = timm.create_model(spec.name, num_classes=0)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"teacher.name={spec.name} is no timm model: see timm.list_models()") from error
        if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
            raise UserError(f"teacher.name={spec.name} gives no feature maps: choose a CNN of timm")
        if spec.weights == "package":
            if spec.name != "tf_efficientnet_lite0":
                raise UserError(
                    f"teacher.weights=package holds tf_efficientnet_lite0 only: {spec.name} needs weights=hub"
                )
            state = lite0_state_dict()
        elif spec.weights == "hub":
            state = read_state_dict(hub_file(spec.name))
        else:
            return network
        missing = set(network.state_dict()) - set(state)
        if missing:
            raise UserError(f"the weights of {spec.name} lack {len(missing)} of its tensors, such as {min(missing)}")
        network.load_state_dict(state, strict=False)
        return network

    config = timm.get_pretrained_cfg(spec.name)
    mean, std = (LITE0_MEAN, LITE0_STD) if spec.weights == "package" or config is None else (config.mean, config.std)
    return Teacher([cnn(n) for n in range(cnns)], num_classes, spec.crossfit, spec.img_size, mean, std)


def _train_cnn(
    teacher: Teacher,
    fold: int,
    split: TrainingSplit,
    rows: np.ndarray,
    spec: TeacherSpec,
    device: torch.device,
) -> None:
    """AdamW with one cosine cycle on augmented views and their (mixed) targets."""
    cnn = teacher.cnns[fold].requires_grad_(True)
    cnn.train()
    num_classes = len(split.classes)
    torch.manual_seed(spec.seed + fold)
    head = nn.Linear(teacher.pooled_dim, num_classes).to(device)
    optimizer = torch.optim.AdamW([*cnn.parameters(), *head.parameters()], lr=spec.lr, weight_decay=0.05)
    steps = spec.epochs * len(split.train_batches(0, rows))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=spec.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(spec.epochs):
        total = 0.0
        for batch in split.train_batches(epoch, rows):
            _, pooled = _cnn_features(cnn, teacher.images(batch["pixels"].to(device)))
            loss = F.cross_entropy(head(pooled), batch["target"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(pooled)
        log.info("teacher epoch %d of %d: loss %.4f", epoch + 1, spec.epochs, total / len(rows))
    teacher.head_weight[fold] = head.weight.detach()
    teacher.head_bias[fold] = head.bias.detach()
    cnn.eval().requires_grad_(False)


def _fit_feature_scales(
    teacher: Teacher, cnn: int, split: TrainingSplit, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every feature of a CNN over the training split; returns its pooled features and
    the labels."""
    pooled, labels = [], []
    widths = [*teacher.map_channels, teacher.pooled_dim]
    count = [0] * len(widths)
    total = [torch.zeros(width, dtype=torch.float64) for width in widths]
    square = [torch.zeros(width, dtype=torch.float64) for width in widths]
    for batch in split.eval_batches():
        maps, features = teacher.features(batch["pixels"].to(device), cnn)
        for number, values in enumerate([*maps, features]):
            flat = (
                values.double().cpu().flatten(2).transpose(1, 2).flatten(0, 1)
                if values.ndim == 4
                else values.double().cpu()
            )
            count[number] += len(flat)
            total[number] += flat.sum(dim=0)
            square[number] += flat.square().sum(dim=0)
        pooled.append(features.double().cpu().numpy())
        labels.append(np.asarray(batch["label"]))
    for number in range(len(widths)):
        mean = total[number] / count[number]
        variance = (square[number] / count[number] - mean.square()).clamp(min=0)
        getattr(teacher, f"feature_mean{number}")[cnn] = mean
        getattr(teacher, f"feature_std{number}")[cnn] = variance.sqrt() + 1e-3  # a constant channel stays finite
    return np.concatenate(pooled), np.concatenate(labels)


def _fit_linear_head(teacher: Teacher, fold: int, pooled: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Multinomial logistic regression (scikit-learn, L2, C=0.1) on standardised features, folded into one layer."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, std = pooled.mean(axis=0), pooled.std(axis=0) + 1e-3
    with threadpool_limits(1):  # the bits do not depend on the number of threads
        model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit((pooled - mean) / std, labels)
    weight, bias = model.coef_, model.intercept_
    if num_classes == 2:  # one row for class 1: the two logits of a softmax are minus and plus half of it
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / std
    bias = bias - weight @ mean
    teacher.head_weight[fold] = torch.from_numpy(weight).float()
    teacher.head_bias[fold] = torch.from_numpy(bias).float()


# -- files ------------------------------------------------------------------------------------------------------


def _save(teacher: Teacher, spec: TeacherSpec, split: TrainingSplit, file: Path) -> None:
    meta = {
        "spec": spec.identity(),
        "classes": split.classes,
        "fingerprint": split.fingerprint,
        "cnns": len(teacher.cnns),
    }
    scratch = file.with_suffix(".tmp")
    state = {key: value.contiguous() for key, value in teacher.state_dict().items()}
    save_file(state, scratch, metadata={"facemask_teacher": json.dumps(meta)})
    scratch.replace(file)


def load_teacher(file: Path, classes: list[str]) -> Teacher:
    """A teacher from its file.

    Raises:
        UserError: no such file, damaged, no teacher, or fitted on other classes or another class order.
    """
    meta = _read_meta(file)
    if meta["classes"] != classes:
        raise UserError(
            f"the teacher {file} knows the classes {meta['classes']} and the data has {classes}, in this order: "
            "fit a teacher on this data (teacher.checkpoint=null)"
        )
    try:
        spec = TeacherSpec(**meta["spec"])
        cnns = [timm.create_model(spec.name, num_classes=0) for _ in range(meta["cnns"])]
        teacher = Teacher(cnns, len(classes), spec.crossfit, spec.img_size, (0.0,) * 3, (1.0,) * 3)
        teacher.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} is a teacher of another version of this project: fit it again") from error
    return teacher


def _read_meta(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"teacher.checkpoint={file} does not exist")
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["facemask_teacher"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{file} is no readable teacher file: give one that an earlier run kept") from error
