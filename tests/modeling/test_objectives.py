"""Every loss against numbers worked out by hand: softmax of (0, ln 3) is (1/4, 3/4), of (ln 4, 0) it is (4/5, 1/5)."""

from math import log, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facemask.modeling.backbones import Outputs, build_backbone
from facemask.modeling.objectives import (
    FeatureDistillation,
    HardDistillation,
    Labels,
    LogitDistillation,
    Objective,
    ShuffledTeacher,
    SoftDistillation,
    TeacherOutputs,
    cosine_distance,
    cross_entropy,
    soft_divergence,
)

HEAD = torch.tensor([[0.0, log(3)], [log(4), 0.0]])  # probabilities (1/4, 3/4) and (4/5, 1/5)
DIST = torch.tensor([[log(9), 0.0], [0.0, 0.0]])  # (9/10, 1/10) and (1/2, 1/2)
TEACHER = torch.tensor([[log(3), 0.0], [0.0, log(7)]])  # (3/4, 1/4) and (1/8, 7/8)
TARGET = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
HEAD_CE = -(log(3 / 4) + log(4 / 5)) / 2
OBJECTIVES = {
    "hard": HardDistillation(0.3),
    "soft": SoftDistillation(0.3, tau=2.0),
    "logit": LogitDistillation(0.3, tau=2.0),
    "labels": Labels(),
}


def outputs(token: bool = True) -> Outputs:
    logits = {"head": HEAD.clone(), "head_dist": DIST.clone()} if token else {"head": HEAD.clone()}
    return Outputs(logits, torch.zeros(2, 4, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def teacher(logits: Tensor = TEACHER) -> TeacherOutputs:
    return TeacherOutputs(logits, [torch.zeros(2, 3, 2, 2)], torch.zeros(2, 3))


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def kl(teacher: list[float], student: list[float]) -> float:
    return sum(q * log(q / p) for q, p in zip(teacher, student, strict=True))


def test_cross_entropy_with_labels_mixtures_and_smoothing():
    assert cross_entropy(HEAD, TARGET).item() == pytest.approx(HEAD_CE, abs=1e-6)
    mixed = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = -(0.25 * log(1 / 4) + 0.75 * log(3 / 4) + log(4 / 5)) / 2
    assert cross_entropy(HEAD, mixed).item() == pytest.approx(expected, abs=1e-6)
    # s = 0.2 and two classes: (0, 1) becomes (0.1, 0.9)
    smoothed = -(0.1 * log(1 / 4) + 0.9 * log(3 / 4) + 0.9 * log(4 / 5) + 0.1 * log(1 / 5)) / 2
    assert cross_entropy(HEAD, TARGET, 0.2).item() == pytest.approx(smoothed, abs=1e-6)


def test_labels_on_a_token_model_is_the_mean_of_both_heads_losses():
    losses = numbers(Labels()(outputs(), TARGET, None))
    dist_ce = -(log(1 / 10) + log(1 / 2)) / 2
    expected = {"loss": (HEAD_CE + dist_ce) / 2, "head_ce": HEAD_CE, "head_dist_ce": dist_ce}
    assert losses == pytest.approx(expected, abs=1e-6)


def test_labels_without_a_token_is_cross_entropy_and_smoothing_reaches_it():
    assert numbers(Labels()(outputs(False), TARGET, None)) == pytest.approx({"loss": HEAD_CE, "head_ce": HEAD_CE})
    smoothed = Labels(label_smoothing=0.2)(outputs(False), TARGET, None)["loss"]
    torch.testing.assert_close(smoothed, cross_entropy(HEAD, TARGET, 0.2))


def test_labels_of_the_class_head_alone():
    objective = Labels(class_head_only=True)
    assert numbers(objective(outputs(), TARGET, None)) == pytest.approx({"loss": HEAD_CE, "head_ce": HEAD_CE})
    assert objective.heads(True) == objective.heads(False) == ["head"]


def test_hard_distillation_by_hand():
    # The teacher decides 0, then 1: the distillation head gives them 9/10 and 1/2.
    distillation = -(log(9 / 10) + log(1 / 2)) / 2
    losses = numbers(HardDistillation(0.3)(outputs(), TARGET, teacher()))
    expected = {
        "loss": 0.7 * HEAD_CE + 0.3 * distillation,
        "head_ce": HEAD_CE,
        "head_dist_distillation": distillation,
    }
    assert losses == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_does_not_smooth_the_teachers_decision():
    plain = numbers(HardDistillation(0.3)(outputs(), TARGET, teacher()))
    smoothed = numbers(HardDistillation(0.3, label_smoothing=0.2)(outputs(), TARGET, teacher()))
    assert smoothed["head_dist_distillation"] == plain["head_dist_distillation"]
    assert smoothed["head_ce"] == pytest.approx(cross_entropy(HEAD, TARGET, 0.2).item(), abs=1e-6)
    assert smoothed["head_ce"] > plain["head_ce"] + 0.01


def test_soft_distillation_by_hand_at_temperature_one():
    divergence = (kl([3 / 4, 1 / 4], [9 / 10, 1 / 10]) + kl([1 / 8, 7 / 8], [1 / 2, 1 / 2])) / 2
    losses = numbers(SoftDistillation(0.3, tau=1.0)(outputs(), TARGET, teacher()))
    expected = {"loss": 0.7 * HEAD_CE + 0.3 * divergence, "head_ce": HEAD_CE, "head_dist_distillation": divergence}
    assert losses == pytest.approx(expected, abs=1e-6)


def test_soft_distillation_by_hand_at_temperature_two():
    # At tau = 2 odds become their square roots: 9:1 -> 3:1, 3:1 -> sqrt(3):1, 1:7 -> 1:sqrt(7); tau^2 = 4.
    first = kl([sqrt(3) / (1 + sqrt(3)), 1 / (1 + sqrt(3))], [3 / 4, 1 / 4])
    second = kl([1 / (1 + sqrt(7)), sqrt(7) / (1 + sqrt(7))], [1 / 2, 1 / 2])
    losses = numbers(SoftDistillation(0.3, tau=2.0)(outputs(), TARGET, teacher()))
    assert losses["head_dist_distillation"] == pytest.approx(4 * (first + second) / 2, abs=1e-6)


def test_logit_distillation_by_hand():
    # The one head against the teacher, tau = 2: 1:3 -> 1:sqrt(3) and 4:1 -> 2:1.
    first = kl([sqrt(3) / (1 + sqrt(3)), 1 / (1 + sqrt(3))], [1 / (1 + sqrt(3)), sqrt(3) / (1 + sqrt(3))])
    second = kl([1 / (1 + sqrt(7)), sqrt(7) / (1 + sqrt(7))], [2 / 3, 1 / 3])
    divergence = 4 * (first + second) / 2
    losses = numbers(LogitDistillation(0.3, tau=2.0)(outputs(False), TARGET, teacher()))
    expected = {"loss": 0.7 * HEAD_CE + 0.3 * divergence, "head_ce": HEAD_CE, "head_distillation": divergence}
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0, 7.5])
def test_numel_reduction_is_the_deit_papers_code(tau):
    generator = torch.manual_seed(0)
    x, t = 4 * torch.randn(6, 5, generator=generator), 4 * torch.randn(6, 5, generator=generator)
    papers = (
        F.kl_div(F.log_softmax(x / tau, dim=1), F.log_softmax(t / tau, dim=1), reduction="sum", log_target=True)
        * (tau * tau)
        / x.numel()
    )
    assert soft_divergence(x, t, tau, "numel").item() == pytest.approx(papers.item(), abs=1e-6)
    # batchmean is the same sum divided by the images alone: 5 classes, 5 times as much.
    assert soft_divergence(x, t, tau).item() == pytest.approx(5 * papers.item(), rel=1e-6)
    for objective in (SoftDistillation(1.0, tau, "numel"), LogitDistillation(1.0, tau, "numel")):
        given = Outputs({"head": x, "head_dist": x}, None, x, x)
        loss = objective(given, F.one_hot(torch.arange(6) % 5, 5).float(), teacher(t))["loss"]
        assert loss.item() == pytest.approx(papers.item(), abs=1e-6)


@pytest.mark.parametrize("objective", [HardDistillation(0.0), SoftDistillation(0.0, tau=3.0)])
def test_alpha_zero_is_the_class_heads_cross_entropy_alone(objective):
    given = outputs()
    given.logits["head_dist"].requires_grad_()
    given.logits["head"].requires_grad_()
    loss = objective(given, TARGET, teacher())["loss"]
    assert loss.item() == pytest.approx(HEAD_CE, abs=1e-7)
    loss.backward()
    assert given.logits["head_dist"].grad is not None
    assert not given.logits["head_dist"].grad.any()
    assert given.logits["head"].grad.any()
    assert objective.heads(True) == ["head"]  # nothing trains head_dist, so it is not reported
    assert HardDistillation(0.1).heads(True) == ["head", "head_dist"]
    assert FeatureDistillation(objective, 0.5).heads(True) == ["head"]


def test_which_heads_and_which_models():
    assert Labels().heads(True) == ["head", "head_dist"]
    assert Labels().heads(False) == LogitDistillation(0.5, 1.0).heads(False) == ["head"]
    needs = [HardDistillation(0.5), SoftDistillation(0.5, 1.0), LogitDistillation(0.5, 1.0), Labels()]
    assert [objective.needs_token for objective in needs] == [True, True, False, None]
    assert [objective.needs_teacher for objective in needs] == [True, True, True, False]
    assert FeatureDistillation(LogitDistillation(0.5, 1.0), 0.5).needs_token is False


@pytest.mark.parametrize("name", ["labels", "hard", "soft"])
def test_gradients_reach_both_heads_and_both_tokens(name):
    torch.manual_seed(0)
    backbone = build_backbone("deit_tiny_distilled_patch16_224", 2, 32, depth=1)
    said = TEACHER.clone().requires_grad_()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    OBJECTIVES[name](backbone(pixels), TARGET, teacher(said))["loss"].backward()
    network = backbone.network
    for parameter in (network.head.weight, network.head_dist.weight, network.cls_token, network.dist_token):
        assert parameter.grad.abs().sum() > 1e-6


def test_the_class_head_does_not_see_the_teacher_nor_the_distillation_head_the_labels():
    for objective in (HardDistillation(0.5), SoftDistillation(0.5, tau=2.0)):
        grads = []
        for target, said in ((TARGET, TEACHER), (TARGET, -TEACHER), (1 - TARGET, TEACHER)):
            given = outputs()
            for logits in given.logits.values():
                logits.requires_grad_()
            objective(given, target, teacher(said))["loss"].backward()
            grads.append({head: logits.grad for head, logits in given.logits.items()})
        assert torch.equal(grads[0]["head"], grads[1]["head"])
        assert not torch.equal(grads[0]["head_dist"], grads[1]["head_dist"])
        assert torch.equal(grads[0]["head_dist"], grads[2]["head_dist"])
        assert not torch.equal(grads[0]["head"], grads[2]["head"])


def test_a_shuffled_teacher_speaks_of_another_picture_of_the_class():
    said = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 4.0], [5.0, 0.0], [6.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2], [1.0, 0.0]])  # 0, 1, 0, 1, 0, 0
    moved = said[[2, 3, 4, 1, 5, 0]]
    logits = {head: torch.randn(6, 2) for head in ("head", "head_dist")}
    given = Outputs(logits, None, torch.zeros(6, 3), torch.zeros(6, 3))
    base = SoftDistillation(0.5, tau=1.0)
    shuffled = ShuffledTeacher(base, label_smoothing=0.1)
    assert base.label_smoothing == 0.1
    assert torch.equal(shuffled(given, target, teacher(said))["loss"], base(given, target, teacher(moved))["loss"])
    assert not torch.equal(shuffled(given, target, teacher(said))["loss"], base(given, target, teacher(said))["loss"])
    assert shuffled.needs_teacher
    assert shuffled.needs_only_logits
    assert shuffled.needs_token is True
    assert shuffled.heads(True) == ["head", "head_dist"]


def test_cosine_distance_by_hand():
    # cosines: 1, 0, -1 and 3 / 5
    a = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[1.0, 1.0], [5.0, 0.0]]])
    b = torch.tensor([[[7.0, 0.0], [0.0, 1.0]], [[-2.0, -2.0], [3.0, 4.0]]])
    assert cosine_distance(a, b).item() == pytest.approx((0 + 1 + 2 + 0.4) / 4, abs=1e-6)


def identity(objective: FeatureDistillation, width: int) -> FeatureDistillation:
    objective.build(width, [width], width)
    for layer in (*objective.map_projections, objective.pooled_projection):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return objective


def test_feature_distillation_by_hand():
    """One image, 2 x 2 patches of 2 channels; the four cosines are 1, 0, -1, 3/5 only if patch (r, c) meets map
    position (r, c), and the pooled one is 4/5 only if the taught token is read, not the class token."""
    patches = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [5.0, 0.0]]])
    at_positions = torch.tensor([[[7.0, 0.0], [0.0, 1.0]], [[-2.0, -2.0], [3.0, 4.0]]])  # (row, column, channel)
    feature_map = at_positions.permute(2, 0, 1)[None]
    given = Outputs(
        {"head": HEAD[:1], "head_dist": DIST[:1]}, patches, torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    )
    said = TeacherOutputs(TEACHER[:1], [feature_map], torch.tensor([[4.0, 3.0]]))
    objective = identity(FeatureDistillation(HardDistillation(0.5), weight=0.25), 2)
    losses = numbers(objective(given, TARGET[:1], said))
    assert losses["feature_map1"] == pytest.approx(3.4 / 4, abs=1e-6)
    assert losses["feature_pooled"] == pytest.approx(0.2, abs=1e-6)
    base = 0.5 * -log(3 / 4) + 0.5 * -log(9 / 10)
    assert losses["loss"] == pytest.approx(base + 0.25 * (3.4 / 4 + 0.2), abs=1e-6)


def test_feature_maps_are_resized_to_the_patch_grid():
    # A 4 x 4 map averaged bilinearly to 2 x 2: each patch sees the mean of the centre of its quarter.
    quarter = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    feature_map = torch.stack([quarter, 1 - quarter])[None]
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    given = Outputs({"head": HEAD[:1]}, patches, torch.ones(1, 2), torch.ones(1, 2))
    objective = identity(FeatureDistillation(LogitDistillation(0.5, 1.0), weight=1.0), 2)
    losses = objective(given, TARGET[:1], TeacherOutputs(TEACHER[:1], [feature_map], torch.ones(1, 2)))
    assert losses["feature_map1"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("base", [HardDistillation(0.4), SoftDistillation(0.4, 3.0), LogitDistillation(0.4, 3.0)])
def test_named_parts_sum_to_the_loss(base):
    torch.manual_seed(0)
    objective = FeatureDistillation(base, weight=0.5, label_smoothing=0.1)
    objective.build(3, [5, 7], 9)
    given = Outputs(outputs().logits, torch.randn(2, 4, 3), torch.randn(2, 3), torch.randn(2, 3))
    said = TeacherOutputs(TEACHER, [torch.randn(2, 5, 4, 4), torch.randn(2, 7, 2, 2)], torch.randn(2, 9))
    losses = numbers(objective(given, TARGET, said))
    distillation = losses.get("head_dist_distillation", losses.get("head_distillation"))
    assert distillation is not None
    features = losses["feature_map1"] + losses["feature_map2"] + losses["feature_pooled"]
    assert losses["loss"] == pytest.approx(0.6 * losses["head_ce"] + 0.4 * distillation + 0.5 * features, abs=1e-6)
    assert losses["head_ce"] == pytest.approx(cross_entropy(HEAD, TARGET, 0.1).item(), abs=1e-6)


def test_feature_distillation_trains_its_projections_and_the_tokens():
    torch.manual_seed(0)
    objective = FeatureDistillation(HardDistillation(0.0), weight=1.0)
    objective.build(3, [5], 9)
    patches, taught = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    given = Outputs(outputs().logits, patches, torch.zeros(2, 3), taught)
    said = TeacherOutputs(TEACHER, [torch.randn(2, 5, 2, 2)], torch.randn(2, 9))
    objective(given, TARGET, said)["loss"].backward()
    grads = [patches.grad, taught.grad, *[parameter.grad for parameter in objective.parameters()]]
    assert len(grads) == 6
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_an_objective_of_ones_own_is_one_class():
    class Doubled(Objective):
        def forward(self, outputs, target, teacher):
            return {"loss": 2 * cross_entropy(outputs.logits["head"], target, self.label_smoothing)}

    assert Doubled()(outputs(False), TARGET, None)["loss"].item() == pytest.approx(2 * HEAD_CE, abs=1e-6)
    assert Doubled().heads(False) == ["head"]
