"""One of two gloo processes that train the same model under DDP or FSDP2, plainly and swapped.

Activations are swapped under both, optimizers under DDP: FSDP2's parameters are refused. Under DDP
both together also train what one process does with the batches of both.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from elbowroom.app.swap import Swap
from elbowroom.core.errors import InputError
from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.memory import at_once
from elbowroom.swap.away import AwayTensor
from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.tier import MemoryTier

NUM_STEPS = 3
MOST_DIFFERENT = 1e-6
"""Of two sums in single precision that were taken in another order, relative to their norm."""


def model_under(kind: str) -> nn.Module:
    """The same model in each process, in either kind of parallel training, or in none (alone)."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(64, 8))
    if kind == "alone":
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    return model


def numbers(model: nn.Module, batch: torch.Tensor, swap: Swap | None = None) -> list[torch.Tensor]:
    """Loss and gradients of the last of some steps."""
    for _ in range(NUM_STEPS):
        model.zero_grad()
        with swap.step() if swap else nullcontext():
            loss = model(batch).pow(2).mean()
            loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in grads)
    return [loss.detach(), *(getattr(grad, "_local_tensor", grad).clone() for grad in grads)]


def check(kind: str, batch: torch.Tensor) -> None:
    """Raise AssertionError unless swapped training is bitwise the plain one."""
    plain = numbers(model_under(kind), batch)
    model = model_under(kind)
    with Swap(model, budget="1GiB", tier=MemoryTier(1 << 26)) as swap:
        measured = numbers(model, batch, swap)
        profile = swap.profile
    assert profile is not None
    plan = make_plan(profile, map(at_once, profile.storages))
    with Swap(model, plan, tier=MemoryTier(1 << 26), verify=True, on_change="raise") as swap:
        swapped = numbers(model, batch, swap)
        # Linear layers save their inputs, GELUs theirs, and the loss one: no weights.
        assert swap.report().counts.num_swapped == len(profile.storages) == 11
    # DDP's gradients are whole ones; FSDP2 reduces its parts itself.
    has_gradients = len(profile.gradients) == len(list(model.parameters()))
    assert has_gradients if kind == "ddp" else not profile.gradients
    assert all(map(torch.equal, plain, measured))
    assert all(map(torch.equal, plain, swapped))
    if kind == "ddp":
        check_whole(batch, swapped)


def check_whole(batch: torch.Tensor, swapped: list[torch.Tensor]) -> None:
    """Raise AssertionError unless two processes have the numbers of one with the whole batch."""
    batches = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
    dist.all_gather(batches, batch)
    loss, *gradients = swapped
    dist.all_reduce(loss)
    averaged = [loss / dist.get_world_size(), *gradients]
    whole = numbers(model_under("alone"), torch.cat(batches))
    for one, other in zip(whole, averaged, strict=True):
        assert not torch.equal(one, torch.zeros_like(one))
        assert (one - other).norm() <= MOST_DIFFERENT * one.norm()


def trained(batch: torch.Tensor, *, is_swapped: bool, **options: bool) -> list[torch.Tensor]:
    """Weights after some clipped steps of AdamW under DDP."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), **options)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if is_swapped:
        optimizer = SwappedOptimizer(optimizer, clip_norm=1e-3, tier=MemoryTier(1 << 26))
    for step in range(NUM_STEPS):
        # A static graph that begins without a sync fails in PyTorch itself.
        with nullcontext() if options.get("static_graph") else model.no_sync():
            model(batch + step).pow(2).mean().backward()
        model(batch - step).pow(2).mean().backward()
        if not is_swapped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    if is_swapped:
        away = [state["exp_avg"] for state in optimizer.state.values()]
        assert sum(isinstance(each, AwayTensor) for each in away) == 3  # the weights'
        optimizer.close()
    return list(model.parameters())


def check_optimizer(batch: torch.Tensor) -> None:
    """Raise AssertionError unless swapped optimizers train bitwise as plain ones, under DDP."""
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        plain = trained(batch, is_swapped=False, **options)
        assert all(map(torch.equal, plain, trained(batch, is_swapped=True, **options)))
    sharded = torch.optim.AdamW(model_under("fsdp").parameters())
    try:
        SwappedOptimizer(sharded)
    except InputError as error:
        assert "DTensor" in str(error)
    else:
        raise AssertionError("DTensors were not refused")


def main(process: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=process, world_size=2)
    torch.manual_seed(10 + process)
    batch = torch.randn(32, 64)
    for kind in ("ddp", "fsdp"):
        check(kind, batch)
    check_optimizer(batch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
