"""GPUs as the driver's tool tells of them."""

from __future__ import annotations

import pytest

from elbowroom.core.gpus import find_gpus, in_order_of
from tests.fake_gpus import Show, show_gpus  # noqa: F401 (a fixture)


def test_memory_and_names(show_gpus: Show) -> None:  # noqa: F811
    show_gpus(2)
    first, second = find_gpus()
    assert (first.name, first.memory_bytes, first.free_bytes) == (
        "NVIDIA H100",
        80000 * 2**20,
        70000 * 2**20,
    )
    assert (first.entry, second.entry) == ("GPU-0abc", "GPU-1abc")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("2,0", "20"), ("GPU-1a", "1"), ("", ""), ("1,GPU-0abc,7,2", "10"), ("-1", "")],
)
def test_only_what_cuda_shows_in_its_order(
    show_gpus: Show,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    expected: str,
) -> None:
    show_gpus(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.entry[4] for gpu in find_gpus()) == expected


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_gpus() == ()


def test_a_driver_that_fails_shows_none(show_gpus: Show) -> None:  # noqa: F811
    show_gpus(0)
    assert find_gpus() == ()


def test_replicas_take_turns(show_gpus: Show) -> None:  # noqa: F811
    show_gpus(4)
    gpus = find_gpus()
    order = ["".join(gpu.entry[4] for gpu in in_order_of(r, 2, gpus)) for r in range(3)]
    assert order == ["0123", "2301", "0123"]
