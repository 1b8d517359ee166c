"""Normalizations on all workers of a grid against torch on the whole tensor."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor, nn

from elbowroom.core.errors import InputError
from elbowroom.grid.norms import Running, batch_norm, group_norm, layer_norm
from elbowroom.grid.parts import Part, cut
from elbowroom.grid.transport import Channel, Counted
from elbowroom.plans.grid_layout import Layout
from tests.grid.twins import MOST, Split, check, layout_of, note, on_grid, random_layout

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = 100
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normal(*shape: int, mean: float = 1.0) -> Tensor:
    return mean + 3 * torch.randn(shape, dtype=torch.float64)


def draw_shape(rng: random.Random, num_dims: int, features: int) -> tuple[int, ...]:
    return (rng.randint(1, 5), features, *(rng.randint(1, 9) for _ in range(num_dims)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("uses_batch", [True, False])
def test_batch_norm(momentum: float | None, uses_batch: bool) -> None:
    rng, seen = random.Random(1), Counter[str]()
    torch.manual_seed(1)
    for case in range(CASES):
        num_dims = rng.randint(0, 3)
        shape = draw_shape(rng, num_dims, 5)
        if math.prod(shape) == 5:
            continue
        procs = 64 if case == 0 else rng.choice([2, 3, 4, 5, 6, 7, 8, 9])
        layout = random_layout(rng, procs, range(2 + num_dims), 2 + num_dims)
        norm = BATCH_NORMS[num_dims](5, momentum=momentum, dtype=torch.float64)
        norm.running_mean.copy_(normal(5))
        norm.running_var.uniform_(1, 2)
        norm.num_batches_tracked.fill_(3)
        norm.train(uses_batch)
        before = copy.deepcopy(norm)
        splits = [Split((layout.dims[1],))] * 2
        updated: dict[int, Running] = {}

        def on_part(part: Part, own: Sequence[Tensor], channel: Channel) -> Part:
            rows = part.box[1:2]
            running = Running(
                cut(before.running_mean, rows).clone(),  # noqa: B023
                cut(before.running_var, rows).clone(),  # noqa: B023
                before.num_batches_tracked.clone(),  # noqa: B023
                momentum,
            )
            updated[part.worker] = running  # noqa: B023
            return batch_norm(
                part,
                own[0],
                own[1],
                channel,
                eps=1e-5,
                uses_batch=uses_batch,
                running=running,
            )

        def on_whole(whole: Tensor, own: Sequence[Tensor]) -> Tensor:
            return torch.func.functional_call(norm, {"weight": own[0], "bias": own[1]}, (whole,))  # noqa: B023

        x, parameters = normal(*shape), [torch.randn(5).double(), torch.randn(5).double()]
        check(on_part, on_whole, layout, x, parameters, (layout, shape), splits=splits)
        for worker, running in updated.items():
            rows = layout.box(worker, shape)[1:2]
            for one, other in [
                (cut(norm.running_mean, rows), running.mean),
                (cut(norm.running_var, rows), running.variance),
            ]:
                assert (one - other).abs().sum() <= MOST * 10, (layout, shape)
            assert torch.equal(norm.num_batches_tracked, running.num_batches)
        if num_dims:
            note(seen, layout, shape, shape)
        seen["features"] += layout.parts[1] > 1
    assert_hard(seen)


def test_batch_norm_without_parameters_and_of_one_element() -> None:
    layout = layout_of([2, 1, 2])
    check(
        lambda part, _, channel: batch_norm(part, None, None, channel),
        lambda x, _: F.batch_norm(x, None, None, training=True),
        layout,
        normal(3, 2, 5),
    )
    with pytest.raises(InputError, match="batch normalization"):
        on_grid(
            lambda part, _, channel: batch_norm(part, None, None, channel),
            layout,
            normal(1, 2, 1),
            (),
            normal(1, 2, 1),
        )


@pytest.mark.parametrize("groups", [None, 2])
def test_statistics_far_from_zero(groups: int | None) -> None:
    """A mean of 10,000 deviations leaves 12 digits; sums of squares would leave 8."""
    check(
        lambda part, _, channel: (
            batch_norm(part, None, None, channel)
            if groups is None
            else group_norm(part, groups, None, None, channel)
        ),
        lambda x, _: (
            F.batch_norm(x, None, None, training=True)
            if groups is None
            else F.group_norm(x, groups)
        ),
        layout_of([2, 1, 3]),
        normal(4, 4, 50, mean=3e4),
        most=1e-10,
    )


def test_statistics_of_halves_are_kept_in_single_precision() -> None:
    """The mean of 100,000 half-precision numbers near 100 is right to single precision."""
    x = (100 + torch.randn(4, 1, 25_000)).half()
    plain = F.batch_norm(x.float(), None, None, training=True)
    direction = torch.randn(x.shape).half()
    found = on_grid(
        lambda part, _, channel: batch_norm(part, None, None, channel),
        layout_of([2, 1, 4]),
        x,
        (),
        direction,
    )
    assert found.output.dtype == found.input_gradient.dtype == torch.half
    assert (found.output.float() - plain).abs().max() < 4e-3


@pytest.mark.parametrize("is_instance", [True, False])
def test_group_norm(is_instance: bool) -> None:
    rng, seen = random.Random(2), Counter[str]()
    torch.manual_seed(2)
    for case in range(CASES):
        num_dims = rng.randint(1, 3)
        groups = 12 if is_instance else rng.choice([1, 2, 3, 4, 6])
        shape = draw_shape(rng, num_dims, 12)
        if math.prod(shape[2:]) * 12 // groups == 1:
            continue
        procs = 64 if case == 0 else rng.choice([2, 3, 4, 5, 6, 7, 8, 9])
        layout = random_layout(rng, procs, range(2 + num_dims), 2 + num_dims)
        if groups % layout.parts[1]:
            layout = layout.without(1)
        parameters = [torch.randn(12).double(), torch.randn(12).double()]
        check(
            lambda part, own, channel: group_norm(part, groups, *own, channel),  # noqa: B023
            lambda x, own: F.group_norm(x, groups, *own),  # noqa: B023
            layout,
            normal(*shape),
            parameters,
            (layout, shape, groups),
            splits=[Split((layout.dims[1],))] * 2,
        )
        note(seen, layout, shape, shape)
        seen["features"] += layout.parts[1] > 1
    assert_hard(seen)


def assert_hard(seen: Counter[str]) -> None:
    least = {"features": 5, "batch and space": 5, "workers without input": 10, "replicas": 5}
    assert all(seen[hard] >= number for hard, number in least.items()), seen


def test_groups_in_several_parts_are_refused() -> None:
    with pytest.raises(InputError, match="3 groups in 2 parts"):
        on_grid(
            lambda part, _, channel: group_norm(part, 3, None, None, channel),
            layout_of([1, 2, 1]),
            normal(1, 6, 4),
            (),
            normal(1, 6, 4),
        )


@pytest.mark.parametrize("num_dims", [1, 2])
def test_layer_norm(num_dims: int) -> None:
    layout = layout_of([2, 3, 1], replicas=2) if num_dims == 1 else layout_of([4, 1, 1])
    x = normal(3, 5, 4)
    shape = tuple(x.shape[-num_dims:])
    check(
        lambda part, own, _: layer_norm(part, num_dims, *own),
        lambda whole, own: F.layer_norm(whole, shape, *own),
        layout,
        x,
        [torch.randn(shape).double(), torch.randn(shape).double()],
    )
    with pytest.raises(InputError, match="layer normalization"):
        on_grid(lambda part, _, __: layer_norm(part, 1, None, None), layout_of([1, 1, 2]), x, (), x)


@pytest.mark.parametrize("layout", [layout_of([2, 1, 2, 2]), layout_of([1, 2, 3, 1], replicas=2)])
def test_one_round_of_messages_each_way(layout: Layout) -> None:
    """Each worker sends two numbers a feature to each with which it shares, and back."""
    x, parameters = normal(4, 6, 6, 6), [torch.ones(6).double(), torch.zeros(6).double()]
    found = on_grid(
        lambda part, own, channel: batch_norm(part, *own, channel),
        layout,
        x,
        parameters,
        torch.randn_like(x),
        splits=[Split((layout.dims[1],))] * 2,
    )
    features = 6 // layout.parts[1]
    sharing = math.prod(parts for dim, parts in enumerate(layout.parts) if dim != 1)
    messages = layout.num_workers * (sharing - 1)
    sent = Counted(messages, messages * 2 * features * 8)
    assert found.sent == {"forward": sent, "backward": sent}
