"""Checks before the first update: what stages and microbatches give, the model gives as it is.

Each is made while a worker has the whole model, and leaves the model and Python's state as they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError, SplitError
from elbowroom.pipeline.microbatches import microbatches, pairs_in
from elbowroom.pipeline.options import LossFunction, StageOptions
from elbowroom.training.microbatch import Minibatch
from elbowroom.training.outcome import RELATIVE_ERROR, is_close, seed_all, untouched
from elbowroom.training.python_state import PythonState
from elbowroom.training.stage import StageModule
from elbowroom.training.traced import TracedModel
from elbowroom.training.tracing import called
from elbowroom.training.values import copy_of, tensors_in

_AUTOCAST_ERROR = 3e-2
_LEAST_ERROR = 1e-6

Pair = tuple[Any, Any]
"""Inputs and targets."""


class _Given(NamedTuple):
    """What calls in a row gave, the buffers after them, and whether they drew random numbers."""

    outputs: list[list[torch.Tensor]]
    buffers: list[torch.Tensor]
    is_random: bool


def check_stages(
    traced: TracedModel,
    stages: Sequence[StageModule],
    batches: Sequence[Minibatch],
    options: StageOptions,
) -> None:
    """Compare what the stages give, one after the other, with what the model gives as it is.

    The minibatches, or the microbatches that they come in, follow each other, so that what is kept
    in buffers is seen, too. Stages may draw random numbers in another order: of a model that does,
    the whole graph is run instead. Raises SplitError where they differ, and InputError for inputs
    that the graph does not hold for.
    """
    model = traced.model
    named = dict(_named(batches))
    for inputs in named.values():
        traced.named_inputs(inputs)

    def in_stages(inputs: Any) -> Any:
        loaded = traced.named_inputs(inputs)
        given: Any = ()
        for stage in stages:
            given = stage(*given, *(loaded[name] for name in stage.loads))
        return given

    expected = _run(model, lambda inputs: called(model, inputs), named.values(), options)
    found = _run(
        model, traced.graph.run if expected.is_random else in_stages, named.values(), options
    )
    for name, one, other in zip(named, expected.outputs, found.outputs, strict=True):
        if not _are_close(one, other, options):
            raise SplitError(
                f"{name}: the stages give something else than the model as it is, "
                f"which was traced with the first one: let the forward do the same with each"
            )
    if not _are_close(expected.buffers, found.buffers, options):
        raise SplitError("the stages leave other buffers than the model: change them in one module")


def _named(batches: Sequence[Minibatch]) -> Iterator[tuple[str, Any]]:
    """Inputs of each minibatch, or of each microbatch it comes in, by what it is called."""
    for number, batch in enumerate(batches):
        pairs = pairs_in(batch)
        for part, (inputs, _) in enumerate(pairs):
            yield f"minibatch {number}" + f", microbatch {part}" * (len(pairs) > 1), inputs


def _run(
    model: nn.Module,
    run: Callable[[Any], Any],
    several: Iterable[Any],
    options: StageOptions,
) -> _Given:
    with untouched(model), torch.enable_grad(), options.computing():
        seed_all()
        before = torch.get_rng_state()
        outputs = [
            [tensor.detach().clone() for tensor in tensors_in(run(copy_of(inputs)))]
            for inputs in several
        ]
        buffers = [buffer.detach().clone() for buffer in model.buffers()]
        return _Given(outputs, buffers, not torch.equal(torch.get_rng_state(), before))


def _are_close(
    one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], options: StageOptions
) -> bool:
    error = _AUTOCAST_ERROR if options.autocast else RELATIVE_ERROR
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(is_close(a, b, error) for a, b in pairs)


def loss_as_it_is(
    model: nn.Module, loss_fn: LossFunction, batch: Pair, options: StageOptions
) -> float | None:
    """The loss of a minibatch as a plain loop has it; None if random numbers are drawn for it.

    Raises InputError for a loss that depends on other parameters than through the outputs, or that
    changes what the model reads.
    """
    inputs, targets = copy_of(batch)
    with untouched(model, loss_fn), torch.enable_grad(), options.computing():
        before = torch.get_rng_state()
        outputs = pytree.tree_map_only(torch.Tensor, _as_given, called(model, inputs))
        given = {id(tensor) for tensor in tensors_in(outputs)}
        python = PythonState(model)
        loss = loss_fn(outputs, targets)
        if changed := python.changed():
            raise InputError(
                f"loss_fn changes '{changed[0]}', which the model reads: the stages with the model "
                f"do not see that. Give it as an input"
            )
        _check_leaves(loss, {id(p): name for name, p in model.named_parameters()}, given)
        drawn = not torch.equal(torch.get_rng_state(), before)
        return None if drawn else float(loss.detach())


def _as_given(tensor: torch.Tensor) -> torch.Tensor:
    """An output as the loss gets it from the stages: a tensor of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _check_leaves(loss: torch.Tensor, names: dict[int, str], given: set[int] | None = None) -> None:
    """Check that a loss depends on outputs alone. Raises InputError for other parameters.

    Parameters of others than the model are seen where ``given`` has what the loss is given.
    """
    for leaf in _leaves(loss):
        name = names.get(id(leaf))
        if name is None and (given is None or id(leaf) in given):
            continue
        if name is None:
            raise InputError(
                "loss_fn reads a parameter that is none of the model's, which no stage trains: "
                "make it a part of the model, which returns what the loss needs"
            )
        raise InputError(
            f"loss_fn reads the parameter '{name}' itself, but minibatches run with versions of "
            f"it: let the model return what the loss needs"
        )


def mean_of_means(
    model: nn.Module, loss_fn: LossFunction, batches: Sequence[Pair], count: int
) -> str | None:
    """What to say if the loss of a minibatch is not the mean of its microbatches' losses.

    Compared in ``eval()``, as norms over a batch differ by design.
    """
    for number, batch in enumerate(batches):
        with untouched(model, loss_fn), torch.no_grad():
            model.eval()
            whole, *parts = (
                float(loss_fn(called(model, inputs), targets))
                for inputs, targets in copy_of([batch, *microbatches(batch, count)])
            )
        mean = sum(parts) / count
        if not _is_near(whole, mean, RELATIVE_ERROR):
            return (
                f"the loss of minibatch {number} is {whole:.6g}, but the mean over its {count} "
                f"microbatches, which is trained, {mean:.6g}: rows do not count alike, as with "
                f"ignore_index"
            )
    return None


class FirstLoss:
    """A loss function that, when it is first called, checks that stages do not change it.

    ``expected`` is the loss of that minibatch as a plain loop has it; None compares nothing. Raises
    InputError for another loss, and for one that depends on parameters of ``model`` otherwise than
    through its outputs.
    """

    def __init__(
        self, loss_fn: LossFunction, model: nn.Module, expected: float | None, options: StageOptions
    ) -> None:
        self._loss_fn, self._expected = loss_fn, expected
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._error = _AUTOCAST_ERROR if options.autocast else RELATIVE_ERROR
        self._is_first = True

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        loss = self._loss_fn(outputs, targets)
        if self._is_first:
            self._is_first = False
            self._check(loss)
        return loss

    def _check(self, loss: torch.Tensor) -> None:
        _check_leaves(loss, self._names)
        found = float(loss.detach())
        if self._expected is not None and not _is_near(self._expected, found, self._error):
            raise InputError(
                f"the loss of the first minibatch is {found:.6g}, and that of the model as it is "
                f"{self._expected:.6g}: let loss_fn read nothing but outputs and targets"
            )


def _is_near(one: float, other: float, error: float) -> bool:
    is_same = one == other or (one != one and other != other)  # NaN is like NaN
    return is_same or abs(one - other) <= error * abs(one) + _LEAST_ERROR


def _leaves(loss: torch.Tensor) -> Iterator[object]:
    """Tensors that a gradient of the loss would be added to."""
    seen: set[object] = set()
    queue: list[Any] = [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        queue += [before for before, _ in node.next_functions]
