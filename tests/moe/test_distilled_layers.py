"""Distillation: the losses against their formulas in float64, the projection, and an evaluation without a trace."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from pikv_core.errors import UsageError
from pikv_core.moe import ROUTERS, create_moe
from pikv_core.moe.distillation import HiddenMatch, logit_loss

E, K, D, F, TEACHER = 4, 2, 12, 10, 20


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_logit_loss_is_the_divergence_of_softened_predictions(temperature):
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    total = 0.0
    for given, wanted in zip(student.tolist(), teacher.tolist()):
        p = [math.exp(x / temperature) for x in wanted]
        q = [math.exp(x / temperature) for x in given]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    assert float(logit_loss(student, teacher, temperature)) == pytest.approx(temperature**2 * total / 5)
    assert float(logit_loss(teacher + 3.0, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_the_gradient_of_the_logit_loss_stays_of_one_size():
    student, teacher = draw(50, 7).requires_grad_(), draw(50, 7, seed=1)
    sizes = [
        torch.autograd.grad(logit_loss(student, teacher, temperature), student)[0].norm() for temperature in (50, 100)
    ]
    assert float(sizes[0] / sizes[1]) == pytest.approx(1, abs=0.02)
    assert gradcheck(lambda x: logit_loss(x, teacher, 2.0), (student,))


def test_logits_of_other_classes_are_refused():
    with pytest.raises(UsageError, match=r"the student's logits are \[5, 7\] and the teacher's \[5, 8\]"):
        logit_loss(draw(5, 7), draw(5, 8), 1.0)


def test_hidden_states_are_compared_over_real_tokens_alone():
    match, student, teacher = HiddenMatch(D), draw(2, 3, D), draw(2, 3, D, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    real_student, real_teacher = student[mask], teacher[mask]
    expected = (real_student - real_teacher).square().sum() / real_teacher.square().sum()
    torch.testing.assert_close(match(student, teacher, mask), expected)
    torch.testing.assert_close(match(student, teacher.masked_fill(~mask[..., None], 1e9), mask), expected)
    assert match.projection is None


def test_a_projection_goes_between_other_sizes_and_learns():
    torch.manual_seed(0)
    match, student = HiddenMatch(D, TEACHER).double(), draw(2, 3, D).requires_grad_()
    teacher = (student @ draw(D, TEACHER, seed=2)).detach().requires_grad_()
    loss = match(student, teacher)
    loss.backward()
    assert match.projection.weight.grad.abs().sum() > 0 and student.grad.abs().sum() > 0 and teacher.grad is None
    match.projection.weight.data = draw(D, TEACHER, seed=2).T
    assert float(match(student, teacher).detach()) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("kind", ROUTERS.names())
def test_a_layer_learns_from_a_teacher_and_is_the_plain_one_in_evaluation(kind):
    torch.manual_seed(0)
    moe = create_moe(kind, D, E, K, F, rank=4, use_distillation=True, teacher_hidden_size=TEACHER)
    x, teacher = torch.randn(2, 5, D), torch.randn(2, 5, TEACHER)
    _, routing = moe(x, teacher_hidden=teacher)
    assert set(routing.losses) == set(moe(x)[1].losses) | {"distillation"}
    routing.loss.backward()
    assert moe.match.projection.weight.grad.abs().sum() > 0 and moe.experts.gate_up_B.grad.abs().sum() > 0
    moe.eval()
    plain = moe.plain()
    y, routing = moe(x, teacher_hidden=teacher)
    assert "distillation" not in routing.losses
    torch.testing.assert_close(y, plain(x)[0], rtol=0, atol=0)
    assert not any("match" in name for name in plain.state_dict())


def test_a_teacher_of_the_same_size_needs_no_projection():
    assert not any("match" in name for name in create_moe("base", D, E, K, use_distillation=True).state_dict())
