"""When each gradient of a step was complete, against hooks and a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from elbowroom.core.step_profile import ReadyGradient
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from tests.swap.models import MAKERS, Case, make
from tests.swap.steps import SMALLEST, needed_meter, plain_step, profiled


class Clock:
    """Counts autograd's packs and unpacks."""

    def __init__(self) -> None:
        self.num_ticks = 0

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_ticks += 1
        return tensor


@contextmanager
def watched(case: Case, clock: Clock) -> Iterator[list[ReadyGradient]]:
    """The gradients that come while the block runs, in their order."""
    ready: list[ReadyGradient] = []

    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ready.append(ReadyGradient(clock.num_ticks - 1, parameter.grad.nbytes))

    hooks = [
        parameter.register_post_accumulate_grad_hook(take) for parameter in case.model.parameters()
    ]
    yield ready
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_the_plain_backward_in_its_order(link: Link, name: str) -> None:
    case, clock = make(name), Clock()
    plain_step(case)
    with watched(case, clock) as expected, saved_tensors_hooks(clock.count, clock.count):
        case.loss().backward()
    profile = profiled(case, link)
    assert list(profile.gradients) == expected
    total = sum(gradient.num_bytes for gradient in profile.gradients)
    assert total == sum(parameter.nbytes for parameter in case.model.parameters())
    assert all(gradient.tick >= profile.num_forward_ticks - 1 for gradient in profile.gradients)


def test_of_several_backwards_the_last_completes_a_gradient(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    once = profiled(case, link)

    def twice() -> None:
        case.loss().backward()
        case.loss().backward()

    profile = profiled(case, link, twice)
    assert len(profile.gradients) == len(once.gradients)
    assert [each.tick for each in profile.gradients] == [
        each.tick + once.num_ticks for each in once.gradients
    ]


def test_what_a_later_backward_adds_to_comes_later(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    *_, head = case.model.children()

    def body() -> None:
        case.loss().backward()
        head(torch.ones(4, 16)).pow(2).sum().backward()

    profile = profiled(case, link, body)
    sizes = [gradient.num_bytes for gradient in profile.gradients]
    assert sorted(sizes[-2:]) == sorted(parameter.nbytes for parameter in head.parameters())
    assert profile.gradients[-1].tick > profile.gradients[0].tick


def test_what_is_frozen_has_no_gradient(link: Link) -> None:
    case = make("cnn")
    first, *_ = case.model.parameters()
    first.requires_grad_(False)
    plain_step(case)
    assert len(profiled(case, link).gradients) == len(list(case.model.parameters())) - 1


def test_a_recorder_is_told_nothing_after_its_step(link: Link) -> None:
    case = make("cnn")
    recorder = StepRecorder(case.model, needed_meter(), 0, SMALLEST)
    step = SwappedStep(None, link, Candidates(case.model, SMALLEST), observer=recorder)
    with recorder.recording():
        with step.hooks():
            case.loss().backward()
        step.end()
    before = recorder.profile().gradients
    case.loss().backward()
    assert recorder.profile().gradients == before
