"""LiLoRA's regulariser of the paper, against its definition and finite differences."""

import torch
from torch import Tensor, nn

import smolora


def layer(k: int = 7, d: int = 5, r: int = 4, task_r: int = 2) -> smolora.FusedLiLoRA:
    torch.manual_seed(0)
    made = smolora.FusedLiLoRA(
        nn.Linear(d, k, dtype=torch.float64), smolora.LiLoRAConfig(r=r, task_r=task_r, num_tasks=3)
    )
    with torch.no_grad():
        for parameter in (made.B, made.task_B):
            parameter.normal_()
    return made


def by_definition(made: smolora.FusedLiLoRA, task: int, previous: int, before: Tensor) -> Tensor:
    now, then = ((made.task_B[t] @ made.task_A[t]).flatten() for t in (task, previous))
    return (1 - nn.functional.cosine_similarity(now, then, 0)) * torch.linalg.matrix_norm(made.B - before) ** 2


def test_regulariser_is_the_definition():
    made = layer()
    before = torch.randn_like(made.B)
    torch.testing.assert_close(made.regulariser(2, 1, before), by_definition(made, 2, 1, before))


def test_its_gradient_against_finite_differences():
    """Of B and of this task's pair; the task before gets none."""
    made = layer()
    before = torch.randn_like(made.B)
    made.regulariser(2, 1, before).backward()
    for name in ("B", "task_A", "task_B"):
        parameter = made.get_parameter(name)
        numeric = torch.zeros_like(parameter)
        with torch.no_grad():
            for index in range(parameter.numel()):
                value = parameter.view(-1)[index].item()
                sides = []
                for step in (1e-6, -1e-6):
                    parameter.view(-1)[index] = value + step
                    sides.append(by_definition(made, 2, 1, before).item())
                parameter.view(-1)[index] = value
                numeric.view(-1)[index] = (sides[0] - sides[1]) / 2e-6
        if name != "B":
            assert numeric[1].any() and not parameter.grad[1].any() and not parameter.grad[0].any()
            numeric[1] = 0
        torch.testing.assert_close(parameter.grad, numeric, rtol=1e-6, atol=1e-7)
        assert parameter.grad.any()
    assert made.A.grad is None and made.task_logit.grad is None


def test_regulariser_of_a_pair_that_is_still_zero():
    """The cosine counts as 0 then: B is pulled back in full, and the pair gets a gradient of zero, not NaN."""
    made = layer()
    before = torch.randn_like(made.B)
    with torch.no_grad():
        made.task_B[2].zero_()
    loss = made.regulariser(2, 1, before)
    torch.testing.assert_close(loss, (made.B - before).square().sum())
    loss.backward()
    torch.testing.assert_close(made.B.grad, 2 * (made.B.detach() - before))
    assert not made.task_A.grad.any() and not made.task_B.grad.any()
