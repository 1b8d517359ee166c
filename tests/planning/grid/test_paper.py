"""The paper's closed forms, worked out by hand, and what it says of AlexNet."""

from math import log2

import pytest

from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.paper import PaperForms, crossovers
from elbowroom.planning.grid.settings import KNL, GridLink
from tests.planning.grid.models import convolutions, perceptron

LINK = GridLink(1e-6, 1e9)


def test_crossovers_of_alexnet_are_the_papers() -> None:
    found = {name: round(batch, 2) for name, batch in crossovers(known_net("alexnet"))}
    convolutional = {"conv1": 0.24, "conv2": 3.76, "conv3": 11.69, "conv4": 13.63, "conv5": 10.22}
    assert {name: found[name] for name in convolutional} == convolutional
    assert [round(found[name]) for name in ("fc6", "fc7", "fc8")] == [3351, 2731, 891]


@pytest.mark.parametrize(
    ("net", "procs", "batch", "by_batch", "best"),
    [
        ("alexnet", 8, 2048, 72.86, 36.78),
        ("alexnet", 32, 2048, 80.72, 25.49),
        ("alexnet", 128, 2048, 82.73, 16.52),
        ("alexnet", 512, 2048, 83.28, 11.23),
        ("alexnet", 512, 512, 83.28, 8.23),
        ("alexnet", 1024, 512, None, 7.47),
        ("alexnet", 2048, 512, None, 6.94),
        ("alexnet", 4096, 512, None, 6.53),
        ("vgg16", 8, 256, 161.59, 28.68),
        ("vgg16", 512, 2048, 184.67, 31.27),
        ("vgg16", 512, 512, 184.67, 25.62),
        ("vgg16", 512, 64, None, 22.20),
    ],
)
def test_closed_forms_give_these_milliseconds(
    net: str, procs: int, batch: int, by_batch: float | None, best: float
) -> None:
    forms = PaperForms(known_net(net).for_batch(batch), procs, KNL)
    plain, found = forms.batch(), forms.best()
    assert found is not None
    assert round(1e3 * found.seconds, 2) == pytest.approx(best, abs=0.0051)
    assert (plain is None) == (by_batch is None)
    if plain is not None:
        assert round(1e3 * plain.seconds, 2) == pytest.approx(by_batch, abs=0.0051)


def test_linear_layers_share_the_best_grid() -> None:
    """Two layers, 4 workers: Pr = 2 by hand, and no other is better."""
    shapes = perceptron(400, 1000, 500, 200)
    plan = PaperForms(shapes, 4, LINK).best()
    assert plan is not None and {grid.outputs for grid in plan.layers} == {2}
    assert {grid.batch for grid in plan.layers} == {2}
    first, second = plan.terms
    assert first.gather == pytest.approx(1e-6 + 4 * 400 / 2 * 500 / 2 / 1e9)
    assert first.inputs == 0
    assert second.inputs == pytest.approx(2 * (1e-6 + 4 * 400 / 2 * 500 / 2 / 1e9))
    assert second.weights == pytest.approx(2 * (1e-6 + 4 * 500 * 200 / 2 / 2 / 1e9))


def test_past_the_batch_convolutions_take_rows_of_a_neighbour() -> None:
    shapes = convolutions(2, 8, 3, 4, 4)
    plan = PaperForms(shapes, 8, LINK).best()
    assert plan is not None
    conv0, conv1, _ = plan.layers
    assert (conv0.batch, conv0.space) == (2, (4, 1)) == (conv1.batch, conv1.space)
    row = 4 * 1 * 8 / 1e9  # bytes of a row of one channel of one sample, as seconds
    assert plan.terms[0].halo == pytest.approx(1e-6 + 3 * row)  # nothing goes back to the input
    assert plan.terms[1].halo == pytest.approx(2 * (1e-6 + 4 * row))
    weights = 4 * 3 * 4 * 9
    assert plan.terms[0].weights == pytest.approx(2 * (1e-6 * log2(8) + weights * 7 / 8 / 1e9))


def test_more_workers_than_rows_have_no_plan() -> None:
    assert PaperForms(convolutions(1, 4, 3, 4), 8, LINK).best() is None
    assert PaperForms(convolutions(1, 4, 3, 4), 8, LINK).batch() is None
