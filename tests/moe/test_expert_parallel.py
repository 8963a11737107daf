"""Experts shared out over ranks: outputs, gradients and losses are those of one process that has every token."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe
from pikv_core.moe.parallel import DistributedPiKVMoE
from pikv_core.moe.routers.eplb import Placement

D, E, T, WORLD = 8, 4, 12, 4
KINDS = {
    "base": {},
    "shared": {"shared_expert": True},
    "low-rank": {"rank": 2},
    "eplb": {"kind": "eplb", "num_slots": 8, "num_ranks": 2},
    "balanced": {"kind": "balanced", "balance_weight": 0.1},
    "distilled": {"use_distillation": True, "teacher_hidden_size": 5},
}


def layer_of(kind="base", **options):
    torch.manual_seed(0)
    layer = create_moe(kind, D, E, 2, 6, **options).double().train()
    for name, weight in layer.named_parameters():  # low-rank products begin at zero
        if name.endswith("_B"):
            torch.nn.init.normal_(weight)
    return layer


def rows(generator_seed=1):
    """Return the tokens of every rank, unevenly many, the last one's none; and what a teacher made of them."""
    generator = torch.Generator().manual_seed(generator_seed)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64)
    teacher = torch.randn(T, 5, generator=generator, dtype=torch.float64)
    return x.split([5, 4, 3, 0]), teacher.split([5, 4, 3, 0])


def result(layer, x, teacher, distilled, num_ranks):
    """Return y, and after backward the gradient of x; the mean of the ranks' losses is that of one process."""
    x = x.clone().requires_grad_()
    y, routing = layer(x, **({"teacher_hidden": teacher} if distilled else {}))
    (num_ranks * y.sin().sum() + routing.loss).backward()
    return y.detach(), x.grad


def whole_gradients(layer):
    """Return the gradients of a distributed layer with those of all experts, as the mean over all ranks."""
    found = {}
    for name, weight in layer.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        if name.startswith("experts.") and name.removeprefix("experts.") in layer.experts.sharded:
            parts = [torch.empty_like(grad) for _ in range(layer.experts.num_ranks)]
            dist.all_gather(parts, grad, group=layer.experts.group)
            grad = torch.cat(parts)
            dist.all_reduce(grad)  # over the groups, and every rank of a group gathered the same
            grad /= layer.experts.num_ranks
        else:
            dist.all_reduce(grad)
        found[name] = grad / WORLD
    return found


def run_rank(rank, folder, group_size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    groups = [dist.new_group(list(range(start, start + group_size))) for start in range(0, WORLD, group_size)]
    group = groups[rank // group_size]
    x, teacher = (parts[rank] for parts in rows())
    found = {}
    for name, options in KINDS.items():
        for moved in (False, True) if name == "eplb" and group_size == 2 else (False,):
            layer = DistributedPiKVMoE(layer_of(**options), group)
            if moved:  # every expert twice, one hot one three times, one of them far from home
                experts = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
                ranks = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
                layer.experts.place(Placement(experts, ranks, torch.ones(8)))
                assert not layer.experts.at_home
            y, grad = result(layer, x, teacher, name == "distilled", WORLD)
            stats = layer.get_stats()
            found[name, moved] = {
                "y": y,
                "x": grad,
                "grads": whole_gradients(layer),
                "weights": {key: value.detach() for key, value in layer.whole().named_parameters()},
                "expert_tokens": stats["expert_tokens"],
                "rank_tokens": torch.tensor(stats["rank_tokens"]),
            }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("group_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_equal_those_of_one_process(tmp_path, group_size):
    mp.spawn(run_rank, (tmp_path, group_size), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    x, teacher = (torch.cat(parts) for parts in rows())
    for name, moved in ranks[0]:
        layer = layer_of(**KINDS[name])
        y, grad = result(layer, x, teacher, name == "distilled", 1)
        found = [rank[name, moved] for rank in ranks]
        torch.testing.assert_close(torch.cat([one["y"] for one in found]), y, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(torch.cat([one["x"] for one in found]) / WORLD, grad, atol=1e-12, rtol=1e-12)
        for key, weight in layer.named_parameters():
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for one in found:
                torch.testing.assert_close(one["grads"][key], expected, atol=1e-12, rtol=1e-12, msg=f"{name} {key}")
                if key in one["weights"]:
                    assert torch.equal(one["weights"][key], weight)
        assert all(one["expert_tokens"] == layer.get_stats()["expert_tokens"] for one in found)
        assert all(one["rank_tokens"].sum() == 2 * T for one in found)


def test_experts_that_do_not_divide_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer = DistributedPiKVMoE(layer_of())
        with pytest.raises(UsageError, match="the plan is for 2 ranks, not 1"):
            layer.experts.place(Placement(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.ones(4)))
        assert type(layer.whole().experts).__name__ == "Experts"
    finally:
        dist.destroy_process_group()
