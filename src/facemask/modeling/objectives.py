"""What a student is trained to do: labels alone, or labels and a teacher.

An objective is called with the student's outputs, the targets and what the teacher said of the same pixels, and
returns a dictionary of named losses; "loss" is the one that is minimised, the others are what it is made of.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facemask.modeling.backbones import Outputs


@dataclass
class TeacherOutputs:
    """What the teacher said of a batch, in fp32 and without gradients.

    logits: (B, C). feature_maps: the CNN's last maps, each (B, F, h, w), and pooled: (B, P), both standardised per
    channel over the training split.
    """

    logits: Tensor
    feature_maps: list[Tensor]
    pooled: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor) -> "TeacherOutputs":
        """Logits without features, for objectives that need no more."""
        return cls(logits, [], logits[:, :0])


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of (B, C) logits against a (B, C) distribution, smoothed as torch does:
    (1 - s) * target + s / C."""
    return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)


def soft_divergence(student: Tensor, teacher: Tensor, tau: float, reduction: str = "batchmean") -> Tensor:
    """tau^2 * KL(teacher || student) of logits (B, C) at temperature tau (Hinton et al. 2015, section 2).

    Args:
        reduction: "batchmean", the KL divergence of one image averaged over the batch; or "numel", which also
            divides by the number of classes, as the code of the DeiT paper does. Weights do not carry over
            between the two.
    """
    log_p, log_q = F.log_softmax(student.float() / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * tau**2
    return divergence / (student.numel() if reduction == "numel" else len(student))


class Objective(nn.Module):
    """Base of all objectives.

    Attributes:
        needs_teacher: whether `teacher` is given to `forward`.
        needs_only_logits: whether the teacher's logits are all of it that `forward` looks at; features are then empty.
        needs_token: the student must have a distillation token (True), must not (False), or either (None).
        needs_patches: the student must have patch tokens.
    """

    needs_teacher = False
    needs_only_logits = False
    needs_token: bool | None = None
    needs_patches = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def heads(self, has_token: bool) -> list[str]:
        """Heads that this objective trains, and that are therefore reported."""
        return ["head", "head_dist"] if has_token else ["head"]

    def build(self, embed_dim: int, map_channels: list[int], pooled_dim: int) -> None:
        """Make what depends on the widths of student and teacher; called once, before training."""

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        raise NotImplementedError


class Labels(Objective):
    """Cross-entropy with the labels. On a token model every head learns them, equally weighted: two class tokens
    and no teacher, the control that tells a gain of the token from a gain of the teacher.

    Args:
        class_head_only: train and report the class head alone.
    """

    def __init__(self, class_head_only: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.class_head_only = class_head_only

    def heads(self, has_token: bool) -> list[str]:
        return ["head"] if self.class_head_only else super().heads(has_token)

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        losses = {
            f"{head}_ce": cross_entropy(outputs.logits[head], target, self.label_smoothing)
            for head in self.heads("head_dist" in outputs.logits)
        }
        return {"loss": torch.stack(list(losses.values())).mean(), **losses}


class TokenDistillation(Objective):
    """Class head from the labels, distillation head from the teacher: (1 - alpha) * class + alpha * distillation."""

    needs_teacher = True
    needs_only_logits = True
    needs_token = True

    def __init__(self, alpha: float, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.alpha = alpha

    def heads(self, has_token: bool) -> list[str]:
        # With alpha = 0 nothing trains head_dist, with alpha = 1 nothing trains head.
        return [head for head, weight in (("head", 1 - self.alpha), ("head_dist", self.alpha)) if weight > 0]

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        assert teacher is not None
        head_ce = cross_entropy(outputs.logits["head"], target, self.label_smoothing)
        distillation = self.distillation(outputs.logits["head_dist"], teacher.logits)
        loss = (1 - self.alpha) * head_ce + self.alpha * distillation
        return {"loss": loss, "head_ce": head_ce, "head_dist_distillation": distillation}


class HardDistillation(TokenDistillation):
    """Hard-label distillation (Touvron et al. 2021, equation 3): the distillation head learns the teacher's
    decision; alpha = 1/2 is the paper's. The teacher's decision is not smoothed, as in the paper's code."""

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(student.float(), teacher.argmax(dim=1))


class SoftDistillation(TokenDistillation):
    """Soft distillation through the token: tau^2 KL to the teacher's softened probabilities (equation 2)."""

    def __init__(self, alpha: float, tau: float, reduction: str = "batchmean", label_smoothing: float = 0.0) -> None:
        super().__init__(alpha, label_smoothing)
        self.tau = tau
        self.reduction = reduction

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_divergence(student, teacher, self.tau, self.reduction)


class LogitDistillation(Objective):
    """Distillation without a token (Hinton et al. 2015): the one head learns labels and teacher,
    (1 - alpha) * CE + alpha * tau^2 KL."""

    needs_teacher = True
    needs_only_logits = True
    needs_token = False

    def __init__(self, alpha: float, tau: float, reduction: str = "batchmean", label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.alpha = alpha
        self.tau = tau
        self.reduction = reduction

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        assert teacher is not None
        head_ce = cross_entropy(outputs.logits["head"], target, self.label_smoothing)
        distillation = soft_divergence(outputs.logits["head"], teacher.logits, self.tau, self.reduction)
        loss = (1 - self.alpha) * head_ce + self.alpha * distillation
        return {"loss": loss, "head_ce": head_ce, "head_distillation": distillation}


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity over all but the last dimension."""
    return (1 - F.cosine_similarity(prediction.float(), target, dim=-1)).mean()


class FeatureDistillation(Objective):
    """Logit distillation plus features: every patch token predicts the teacher's feature maps at its place, and the
    pooled token (the distillation token where there is one) the teacher's pooled features.

    Each prediction is one linear layer on the student's last tokens; the distance is 1 - cosine to features that
    are standardised per channel (the maps resized to the patch grid).

    Args:
        base: any objective of this module, for the heads.
        weight: of the sum of the feature distances.
    """

    needs_teacher = True
    needs_patches = True

    def __init__(self, base: Objective, weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        base.label_smoothing = label_smoothing
        self.base = base
        self.needs_token = base.needs_token
        self.weight = weight

    def heads(self, has_token: bool) -> list[str]:
        return self.base.heads(has_token)

    def build(self, embed_dim: int, map_channels: list[int], pooled_dim: int) -> None:
        self.map_projections = nn.ModuleList(nn.Linear(embed_dim, channels) for channels in map_channels)
        self.pooled_projection = nn.Linear(embed_dim, pooled_dim)

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        assert teacher is not None
        assert outputs.patch_tokens is not None
        losses = self.base(outputs, target, teacher)
        side = round(outputs.patch_tokens.shape[1] ** 0.5)
        distances = {}
        for number, (project, feature_map) in enumerate(
            zip(self.map_projections, teacher.feature_maps, strict=True), 1
        ):
            at_patches = F.interpolate(feature_map, size=(side, side), mode="bilinear", align_corners=False)
            wanted = at_patches.flatten(2).transpose(1, 2)
            distances[f"feature_map{number}"] = cosine_distance(project(outputs.patch_tokens), wanted)
        distances["feature_pooled"] = cosine_distance(self.pooled_projection(outputs.taught), teacher.pooled)
        losses["loss"] = losses["loss"] + self.weight * torch.stack(list(distances.values())).sum()
        return {**losses, **distances}


class ShuffledTeacher(Objective):
    """A control: the base objective, told of every picture what the teacher said of another one of its class.

    Labels, and how sure and how often wrong the teacher is about a class, stay; what it knows of this very picture is
    lost. The others are those of the batch (the next one of the same label, where views are mixed of the same larger
    share); a picture alone in its class keeps its own.
    """

    needs_teacher = True
    needs_only_logits = True

    def __init__(self, base: Objective, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        base.label_smoothing = label_smoothing
        self.base = base
        self.needs_token = base.needs_token

    def heads(self, has_token: bool) -> list[str]:
        return self.base.heads(has_token)

    def forward(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        assert teacher is not None
        label, said = target.argmax(dim=1), teacher.logits.clone()
        for rows in (torch.nonzero(label == c)[:, 0] for c in range(target.shape[1])):
            said[rows] = teacher.logits[rows.roll(-1)]
        return self.base(outputs, target, TeacherOutputs.of_logits(said))
