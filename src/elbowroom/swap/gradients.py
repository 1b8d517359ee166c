"""Gradients that leave as the backward makes them, and come back before they are added to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from elbowroom.core.errors import InputError
from elbowroom.swap.away import AwayTensor, Leaving, Place
from elbowroom.swap.link import Link


class LeavingGradients:
    """Hooks of parameters, in the thread of the backward, that send each gradient away.

    The copy of a gradient is waited for at the next hook: one that is copied and one that is made
    are held at a time. Gradients below 1 KiB and sparse ones stay, and so do all where
    torch.distributed is initialized: whoever averages them does so after these hooks.

    Args:
        link: where they go.
        takes_norms: take the norm of each gradient as it leaves.

    """

    def __init__(self, link: Link, *, takes_norms: bool) -> None:
        self._link = link
        self._takes_norms = takes_norms
        self._leaving: Leaving | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have the gradients of parameters leave from now on, if they have any.

        Raises InputError if another optimizer has them leave already.
        """
        for parameter in parameters:
            _check_unwatched(parameter)
        for parameter in parameters:
            if parameter.requires_grad:
                self._watch(parameter)

    def _watch(self, parameter: nn.Parameter) -> None:
        reference = weakref.ref(parameter)

        def arriving(_: torch.Tensor) -> None:
            if (watched := reference()) is not None:
                self.settle()
                Place(watched).bring()

        self._hooks += [
            parameter.register_hook(arriving),  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(self._send),  # type: ignore[no-untyped-call]
        ]

    def settle(self) -> None:
        """Wait for the gradient that leaves, if one does, and let it go. Raises SwapError."""
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return
        tensor, norm = leaving.place.get(), None
        if self._takes_norms and tensor is not None:
            norm = _norm(tensor)
        del tensor
        away = leaving.finish()
        if away is not None:
            away.taken_norm = norm

    def send(self, parameters: Iterable[nn.Parameter]) -> None:
        """Send away those that are here. Raises TierFullError and SwapError."""
        for parameter in parameters:
            self._send(parameter)
        self.settle()

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        """Scale all gradients so that their total norm is at most ``most``. Returns that norm.

        It is to the bit that of ``torch.nn.utils.clip_grad_norm_`` without foreach. Gradients that
        are away are scaled as they come back.
        """
        having = [parameter for parameter in parameters if parameter.grad is not None]
        total = _total([self._norm_of(parameter) for parameter in having])
        for parameter in having:
            gradient = parameter.grad
            if isinstance(gradient, AwayTensor):
                gradient.clips = (*gradient.clips, (most, total))
                gradient.taken_norm = None
            else:
                nn.utils.clip_grads_with_norm_([parameter], most, total)
        return total

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _send(self, parameter: nn.Parameter) -> None:
        self.settle()
        if not (distributed.is_available() and distributed.is_initialized()):
            self._leaving = Place(parameter).leave(self._link)

    def _norm_of(self, parameter: nn.Parameter) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if not isinstance(gradient, AwayTensor):
            return _norm(gradient)
        if gradient.taken_norm is not None:
            return gradient.taken_norm
        coming = Place(parameter).come_back()
        assert coming is not None
        coming.arrive()
        norm = _norm(parameter.grad)
        coming.leave(self._link)
        return norm


def _check_unwatched(parameter: nn.Parameter) -> None:
    """Raise InputError if the gradients of a parameter leave already."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    if any(
        isinstance(getattr(hook, "__self__", None), LeavingGradients) for hook in hooks.values()
    ):
        raise InputError(
            f"a parameter of shape {tuple(parameter.shape)} belongs to another SwappedOptimizer: "
            "close that one first, or give each its own parameters"
        )


def _norm(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    with torch.no_grad():
        norm: torch.Tensor = torch.linalg.vector_norm(gradient, 2.0)
    return norm


def _total(norms: list[torch.Tensor]) -> torch.Tensor:
    """Norm of norms, in PyTorch's order: it takes one data type after the other."""
    if not norms:
        return torch.tensor(0.0)
    groups = _group_tensors_by_device_and_dtype([norms])  # type: ignore[list-item]
    ordered = [norm for (lists, _) in groups.values() for norm in lists[0]]
    return _norm(torch.stack(ordered))  # type: ignore[arg-type]
