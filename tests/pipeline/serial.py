"""What a pipeline must compute, by PipeDream's rule in one process: weights delayed by formula.

Stage k keeps every version of its weights. Minibatch i runs forward and backward with one of them;
its gradients, averaged over the minibatches of its round, make the next (arXiv 1806.03377 section
3.3). Without replicas that is w(t+1) = w(t) - lr grad f(w1(t-n+1), ..., wn(t)).
"""

from __future__ import annotations

import copy
import math
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tests.pipeline.cases import (
    Case,
    loss_of,
    make_optimizer,
    make_scheduler,
    make_stages,
    minibatch,
)


class Trained(NamedTuple):
    """Losses by minibatch, weights by stage."""

    losses: list[float]
    stages: list[nn.Module]


def warmup(replicas: tuple[int, ...], stage: int) -> int:
    return (sum(replicas) - 1 - sum(replicas[:stage])) // replicas[stage]


def version_used(case: Case, stage: int, number: int) -> int:
    """Rounds that the stage has learned from when the minibatch reaches it; at most all before.

    ``number`` counts from the last drain, and so do the rounds.
    """
    source = 0 if case.semantics == "vertical-sync" else stage
    count = case.replicas[source]
    rounds = max(0, number // count - case.depth * warmup(case.replicas, source))
    return rounds * count // case.replicas[stage]


def train(case: Case) -> Trained:
    """Minibatch after minibatch, each to its end. For ``stash``, ``predict``, ``vertical-sync``."""
    masters = make_stages(case)
    optimizers = [make_optimizer(case, stage) for stage in masters]
    schedulers = [make_scheduler(optimizer) for optimizer in optimizers]
    versions = [[copy.deepcopy(stage)] for stage in masters]
    rounds: list[list[list[torch.Tensor]]] = [[] for _ in masters]
    losses, begin = [], 0
    for number in range(case.num_minibatches):
        if number in case.breaks:
            versions, begin = [[copy.deepcopy(stage)] for stage in masters], number
        stages = [
            copy.deepcopy(versions[k][version_used(case, k, number - begin)])
            for k in range(len(masters))
        ]
        losses.append(_run(case, stages, number))
        for k, stage in enumerate(stages):
            rounds[k].append([_gradient(parameter) for parameter in _trained(stage)])
            is_last = number + 1 in (*case.breaks, case.num_minibatches)
            if len(rounds[k]) == case.replicas[k] or is_last:
                before = copy.deepcopy(masters[k])
                _set_means(masters[k], rounds[k], case.replicas[k])
                if case.clip_norm is not None:
                    limit = case.clip_norm / math.sqrt(len(masters))
                    nn.utils.clip_grad_norm_(masters[k].parameters(), limit)
                optimizers[k].step()
                optimizers[k].zero_grad()
                schedulers[k].step()
                rounds[k] = []
                late = case.depth * warmup(case.replicas, k)
                ahead = 2 * late if case.semantics == "predict" else 0
                versions[k].append(_moved_on(before, masters[k], ahead))
    return Trained(losses, masters)


def train_flushed(case: Case) -> Trained:
    """Plain training: gradients of all microbatches add up to one step."""
    stages = make_stages(case)
    optimizers = [make_optimizer(case, stage) for stage in stages]
    schedulers = [make_scheduler(optimizer) for optimizer in optimizers]
    losses = []
    for number in range(case.num_minibatches):
        (x, first), target = minibatch(case, number)
        parts = zip(*(t.chunk(case.microbatches) for t in (x, first, target)), strict=True)
        total = 0.0
        for part, (one, two, aim) in enumerate(parts):
            loss = _loss(case, stages, number * case.microbatches + part, (one, two), aim)
            (loss / case.microbatches).backward()
            total += loss.item()
        losses.append(total / case.microbatches)
        if case.clip_norm is not None:
            _clip(stages, case.clip_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return Trained(losses, stages)


def _run(case: Case, stages: list[nn.Module], number: int) -> float:
    inputs, target = minibatch(case, number)
    loss = _loss(case, stages, number, inputs, target)
    loss.backward()
    return loss.item()


def _loss(
    case: Case,
    stages: list[nn.Module],
    number: int,
    tensors: tuple[torch.Tensor, torch.Tensor],
    target: torch.Tensor,
) -> torch.Tensor:
    for k, stage in enumerate(stages):
        key = np.random.SeedSequence((0, k, number)).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(key))
        with _autocast(case):
            tensors = stage(*tensors)
    with _autocast(case):
        return loss_of(tensors, target)


def _autocast(case: Case) -> torch.autocast:
    """Entered anew for each stage: what it has cast is forgotten where it ends."""
    return torch.autocast("cpu", torch.bfloat16, enabled=case.autocast)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _set_means(module: nn.Module, gradients: list[list[torch.Tensor]], replicas: int) -> None:
    """Mean gradient of a round's minibatches, added up in the order of a ring of replicas.

    All gradients lie in one bucket, the last first, in a part for each replica. Part p is added up
    from replica p on; those without a minibatch give zeros.
    """
    last_first = _trained(module)[::-1]
    if not last_first:
        return
    whole = [torch.cat([one.reshape(-1) for one in reversed(given)]) for given in gradients]
    whole += [torch.zeros_like(one) for one in whole[:1]] * (replicas - len(whole))
    parts = [one.tensor_split(replicas) for one in whole]
    orders = [[(p + step) % replicas for step in range(replicas)] for p in range(replicas)]
    sums = [reduce(torch.add, [parts[k][p] for k in order]) for p, order in enumerate(orders)]
    means = (torch.cat(sums) / len(gradients)).split([p.numel() for p in last_first])
    for parameter, mean in zip(last_first, means, strict=True):
        parameter.grad = mean.view_as(parameter)


def _moved_on(before: nn.Module, now: nn.Module, ahead: int) -> nn.Module:
    """What a module will be after as many updates, each of which changes as much as the last."""
    moved = copy.deepcopy(now)
    with torch.no_grad():
        for old, parameter in zip(before.parameters(), moved.parameters(), strict=True):
            parameter.copy_(old.lerp(parameter, 1 + ahead))
    return moved


def _clip(stages: list[nn.Module], limit: float) -> None:
    """As ``clip_grad_norm_``, but the norm of the stages' norms."""
    norms = [nn.utils.get_total_norm(p.grad for p in _trained(stage)) for stage in stages]
    total = nn.utils.get_total_norm(norms)
    for stage in stages:
        nn.utils.clip_grads_with_norm_(stage.parameters(), limit, total)
