"""Small models in stages, their data and optimizers: the same for pipelines and in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional

from elbowroom.plans.pipeline_schedule import Kind

WIDTH, BATCH = 6, 4


@dataclass(frozen=True)
class Case:
    """``breaks`` are the numbers of minibatches before which the pipe is drained.

    So many of the first stages are ``frozen``.
    """

    replicas: tuple[int, ...]
    semantics: str
    optimizer: str = "sgd"
    dtype: str = "float64"
    num_minibatches: int = 9
    microbatches: int = 1
    dropout: float = 0.0
    breaks: tuple[int, ...] = ()
    depth: int = 1
    bucket_bytes: int = 1 << 20
    clip_norm: float | None = None
    autocast: bool = False
    frozen: int = 0
    schedule: Kind | None = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.autocast else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        data = json.loads(text)
        lists = {name: tuple(data[name]) for name in ("replicas", "breaks")}
        return Case(**{**data, **lists})


class StageModule(nn.Module):
    """A layer; its input and a tensor that skips all stages are passed on."""

    def __init__(self, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.dropout(self.linear(x)) * self.scale + first), first


def make_stages(case: Case) -> list[nn.Module]:
    torch.manual_seed(1)
    dtype = getattr(torch, case.dtype)
    stages: list[nn.Module] = [StageModule(dtype, case.dropout) for _ in case.replicas]
    for stage in stages[: case.frozen]:
        stage.requires_grad_(False)
    return stages


def make_optimizer(case: Case, module: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.01)
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def minibatch(case: Case, number: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The last one is smaller, unless microbatches must be equal."""
    generator = torch.Generator().manual_seed(100 + number)
    is_last = number == case.num_minibatches - 1 and case.semantics != "flush"
    size = (BATCH - 1 if is_last else BATCH, WIDTH)
    draw: Callable[[], torch.Tensor] = lambda: torch.randn(  # noqa: E731
        size, generator=generator, dtype=getattr(torch, case.dtype)
    )
    return (draw(), draw()), draw()


def loss_of(outputs: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(outputs[0], target)
