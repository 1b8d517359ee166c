"""Replicas of a stage: after each round they agree on the mean of their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed

from elbowroom.core.pipe import Pipe


class Replicas:
    """Of one stage. Every worker of a pipeline must make one, at the same time.

    Raises what ``torch.distributed`` raises where there is no process group.
    """

    def __init__(self, pipe: Pipe, stage: int) -> None:
        groups = [
            distributed.new_group(list(pipe.workers(number))) if replicas > 1 else None
            for number, replicas in enumerate(pipe.replicas)
        ]
        self._group = groups[stage]

    def add_up(
        self,
        gradients: Mapping[str, torch.Tensor],
        parameters: Mapping[str, torch.Tensor],
        num_minibatches: int | None,
    ) -> dict[str, torch.Tensor]:
        """Sums over all replicas; over so many minibatches of this one, means over those of all.

        A replica that had no minibatch takes part with zeros. Alone, gradients stay as they are.
        """
        if self._group is None:
            return dict(gradients)
        added: dict[str, torch.Tensor] = {}
        for dtype in {parameter.dtype for parameter in parameters.values()}:
            names = [name for name, one in parameters.items() if one.dtype == dtype]
            whole = [gradients.get(name, torch.zeros_like(parameters[name])) for name in names]
            count = torch.tensor([float(num_minibatches or 0)], dtype=dtype)
            bucket = torch.cat([*(one.reshape(-1) for one in whole), count])
            distributed.all_reduce(bucket, group=self._group)
            if num_minibatches is not None:
                bucket /= bucket[-1].clone()
            parts = torch.split(bucket[:-1], [one.numel() for one in whole])
            shaped = [part.view_as(one) for part, one in zip(parts, whole, strict=True)]
            added |= dict(zip(names, shaped, strict=True))
        return added
