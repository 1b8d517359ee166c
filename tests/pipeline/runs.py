"""Runs stages as workers would: each with leaves of its own, gradients handed back by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from elbowroom.training.stage import StageModule
from elbowroom.training.traced import TracedModel
from elbowroom.training.values import TensorFacts


class Outcome(NamedTuple):
    outputs: Any
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def loss_of(outputs: Any) -> torch.Tensor:
    return torch.stack([x.square().sum() for x in pytree.tree_leaves(outputs)]).sum()


def run_model(model: nn.Module, inputs: Any) -> Outcome:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    loss_of(outputs).backward()
    return _outcome(model, outputs)


def run_stages(traced: TracedModel, stages: list[StageModule], inputs: Any) -> Outcome:
    """One forward and one backward, stage by stage, with nothing between them but tensors."""
    torch.manual_seed(5)
    model = traced.model
    model.zero_grad(set_to_none=True)
    loaded = traced.named_inputs(inputs)
    received: tuple[torch.Tensor, ...] = ()
    runs = []
    for stage in stages:
        leaves = received
        loads = [loaded[name] for name in stage.loads]
        given = stage(*leaves, *loads)
        runs.append((leaves, given))
        if stage is not stages[-1]:
            assert len(given) == len(stage.passes)
            facts = [traced.tensors[name] for name in stage.passes]
            received = tuple(map(travelled, given, facts))
    outputs = runs[-1][1]
    loss_of(outputs).backward()
    for (_, given), (behind, _) in zip(runs[-2::-1], runs[:0:-1], strict=True):
        back = [(x, leaf.grad) for x, leaf in zip(given, behind, strict=True)]
        back = [(x, grad) for x, grad in back if grad is not None]
        torch.autograd.backward([x for x, _ in back], [grad for _, grad in back])
    return _outcome(model, outputs)


def travelled(tensor: torch.Tensor, facts: TensorFacts) -> torch.Tensor:
    """As it arrives in a buffer that was made for it."""
    buffer = torch.empty(tensor.shape, dtype=facts.dtype)
    return buffer.copy_(tensor.detach()).requires_grad_(facts.needs_grad)


def _outcome(model: nn.Module, outputs: Any) -> Outcome:
    return Outcome(
        pytree.tree_map(torch.Tensor.detach, outputs),
        {name: p.grad for name, p in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def assert_equal(one: Outcome, other: Outcome) -> None:
    """To the bit."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    for leaf, twin in zip(leaves, others, strict=True):
        assert (leaf is None) == (twin is None)
        assert leaf is None or torch.equal(leaf, twin)
