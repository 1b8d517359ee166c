"""Any optimizer of PyTorch with its state and gradients away, except while they are used."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn, optim

from elbowroom.core.errors import InputError
from elbowroom.swap.away import Place
from elbowroom.swap.gradients import LeavingGradients
from elbowroom.swap.link import Link
from elbowroom.swap.tier import FileTier, Tier
from elbowroom.swap.updates import Updates

ALONE = frozenset(
    getattr(optim, name)
    for name in (
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon"),
        *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
    if hasattr(optim, name)
)
"""Optimizers of PyTorch that update each parameter from its own gradient and state alone."""

_REFUSED_FLAGS = ("foreach", "fused", "capturable", "differentiable")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class SwappedOptimizer(optim.Optimizer):
    """An optimizer whose state and gradients are in a slow tier between their uses.

    It updates one parameter after the other by the optimizer's own code, with results that are
    bitwise the same, and holds gradients and state of at most two parameters at once. Gradients
    leave in the backward, as they are made. ``param_groups``, ``state`` and ``defaults`` are the
    optimizer's own, so learning rate schedulers and checkpoints work as they are.

    What is away raises SwapError when it is read. ``gradients`` and ``state_dict`` bring it back;
    ``send_away`` lets it leave again. Tensors that you hold stay where they are. Where
    torch.distributed is initialized, gradients stay until ``zero_grad``: they are averaged only
    after they are made.

    Args:
        optimizer: its parameters are on the CPU. Use it no longer itself.
        clip_norm: limit of the total norm of all gradients, as ``torch.nn.utils.clip_grad_norm_``
            clips them; ``last_norm`` is what it was before the last step.
        tier: a folder on disk, or a tier; by default the folder for temporary files.
        link: a link to use, which is not closed with this, instead of a tier.
        link_timeout_seconds: longest wait for one copy before the link is given up.
        updates_alone: your promise, for an optimizer that is not PyTorch's own, that it updates
            each parameter from its own gradient and state alone.

    Raises InputError for optimizers, groups and parameters for which this cannot work.

    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        *,
        clip_norm: float | None = None,
        tier: Tier | Path | str | None = None,
        link: Link | None = None,
        link_timeout_seconds: float = 120.0,
        updates_alone: bool = False,
    ) -> None:
        _check_optimizer(optimizer, updates_alone)
        for group in optimizer.param_groups:
            _check_group(group)
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"clip_norm is {clip_norm}: give a limit above 0")
        if link is not None and tier is not None:
            raise InputError("give SwappedOptimizer a tier or a link, not both")
        self._inner = optimizer
        self.clip_norm = clip_norm
        self.last_norm: torch.Tensor | None = None
        self._link = link or _new_link(tier, link_timeout_seconds)
        self._updates = Updates(optimizer, self._link)
        self._gradients = LeavingGradients(self._link, takes_norms=clip_norm is not None)
        own_link = self._link if link is None else None
        self._closing = weakref.finalize(self, _close, self._gradients, own_link)
        try:
            self._gradients.watch(list(self._parameters()))
            self.send_away()
        except BaseException:
            self.close()
            raise
        self._take_hooks()

    # What is the optimizer's own. Properties: loading a state replaces these objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    @property
    def link(self) -> Link:
        """The link; its totals say what was moved."""
        return self._link

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient. Returns what the closure returns.

        Raises SwapError if the link or the tier fails; the message says how many parameters were
        updated. Nothing that was here is lost then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gradients.settle()
        if self.clip_norm is not None:
            self.last_norm = self._gradients.clip(self._parameters(), self.clip_norm)
        self._updates.run()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or have them be zeros, which leave too. Raises SwapError."""
        self._gradients.settle()
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            if set_to_none:
                parameter.grad = None
                continue
            Place(parameter).bring()
            parameter.grad.detach_().zero_()
            self._gradients.send([parameter])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises InputError as the constructor does."""
        self._inner.add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            self._gradients.watch(group["params"])
        except InputError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own state dict, with all state brought back. Raises SwapError.

        The state stays here as long as you hold the result; it leaves with the next ``step`` or
        ``send_away`` after that.
        """
        self._updates.bring_state()
        whole = self._inner.state_dict()
        entries = whole["state"].items()
        # Copies of the dictionaries, as placeholders will be put into those of the optimizer.
        whole["state"] = {key: dict(value) for key, value in entries}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of this optimizer or of a plain one. It leaves as ``state_dict`` says."""
        self._inner.load_state_dict(state_dict)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """The context in which all gradients are here, to be read or changed.

        That needs the memory of all of them. Raises SwapError.
        """
        self._gradients.settle()
        for parameter in self._parameters():
            Place(parameter).bring()
        yield
        self._gradients.send(self._parameters())

    def send_away(self) -> None:
        """Send away what is here and held by nobody else. Raises TierFullError and SwapError.

        ``step`` does this for what it updates. It is of use after a state was loaded or saved.
        """
        self._gradients.send(self._parameters())
        self._updates.send_state()

    def close(self) -> None:
        """Release the tier, with what is in it. Take ``state_dict`` before if it is needed."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take_hooks(self) -> None:
        """Share the optimizer's hooks, and take those of its step, which it must not run again."""
        for name in (*_STEP_HOOKS, *_STATE_HOOKS):
            setattr(self, name, getattr(self._inner, name))
        for name in _STEP_HOOKS:
            setattr(self._inner, name, OrderedDict())
        self._patch_step_function()

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


def swapped_to(tier: Path | None) -> Callable[[optim.Optimizer, float | None], SwappedOptimizer]:
    """Makes of an optimizer and a limit for the norm of gradients one that swaps to a folder."""

    def swapped(optimizer: optim.Optimizer, clip_norm: float | None) -> SwappedOptimizer:
        return SwappedOptimizer(optimizer, clip_norm=clip_norm, tier=tier)

    return swapped


def _new_link(tier: Tier | Path | str | None, timeout_seconds: float) -> Link:
    chosen = tier if isinstance(tier, Tier) else FileTier(Path(tier) if tier else None)
    return Link(chosen, timeout_seconds=timeout_seconds)


def _close(gradients: LeavingGradients, link: Link | None) -> None:
    gradients.close()
    if link is not None:
        link.close()


def _check_optimizer(optimizer: optim.Optimizer, updates_alone: bool) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, optim.LBFGS | optim.SparseAdam | SwappedOptimizer):
        raise InputError(
            f"{name} cannot be swapped: give one that updates each parameter from its own dense "
            "gradient, such as AdamW"
        )
    if type(optimizer) not in ALONE and not updates_alone:
        raise InputError(
            f"{name} is not among PyTorch's own optimizers: if it updates each parameter from its "
            "own gradient and state alone, say so with updates_alone=True"
        )


def _check_group(group: dict[str, Any]) -> None:
    """Raise InputError for a group that cannot be updated one parameter after the other."""
    for flag in _REFUSED_FLAGS:
        if group.get(flag):
            raise InputError(
                f"the optimizer has {flag}={group[flag]}, which a SwappedOptimizer cannot keep: it "
                f"updates one parameter at a time; make the optimizer without {flag}"
            )
    for parameter in group["params"]:
        shape = tuple(parameter.shape)
        if hasattr(parameter, "_local_tensor"):
            raise InputError(
                f"a parameter of shape {shape} is a DTensor, as FSDP2 makes: swapping its state is "
                "not supported yet, use the optimizer plainly"
            )
        if parameter.device.type != "cpu":
            raise InputError(
                f"a parameter of shape {shape} is on {parameter.device}: only those on the CPU "
                "can be swapped yet"
            )
