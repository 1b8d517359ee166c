"""Passes of vLLM take turns with what is run for peers, and each has its own forward context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elbowroom.core.errors import PoolError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.pool.turns import Turns

pytestmark = pytest.mark.vllm

SHARE = plan_shares((1, 1), 2, "shipped", 1, ship_bytes=1, ship_below_rows=1)[0]
CPU = torch.device("cpu")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module whose passes take turns, as it was before and will be after."""
    from vllm.v1.worker import gpu_model_runner

    monkeypatch.setattr(gpu_model_runner, "set_forward_context", _original())
    return gpu_model_runner


@pytest.fixture
def config() -> Iterator[Any]:
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def test_a_pass_has_the_turn_until_it_ends(runner: Any, config: Any) -> None:
    turns = _turns()
    with runner.set_forward_context(None, config):
        assert not turns.try_serve()
    assert turns.try_serve()
    turns.end_serving()
    with pytest.raises(ZeroDivisionError), runner.set_forward_context(None, config):
        raise ZeroDivisionError
    assert turns.try_serve()


def test_what_is_served_has_a_context_of_its_own(runner: Any, config: Any) -> None:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    turns = _turns()
    config.compilation_config.static_forward_context["layer"] = object()
    with runner.set_forward_context("attention of the pass", config):
        of_pass = get_forward_context()
        with turns.context(3):
            assert get_forward_context() is not of_pass
            assert get_forward_context().attn_metadata is None
            assert "layer" in get_forward_context().no_compile_layers
        assert get_forward_context() is of_pass
    config.compilation_config.static_forward_context.clear()  # as an engine does when it ends
    with turns.context(3):
        assert "layer" in get_forward_context().no_compile_layers
    assert not is_forward_context_available()


def test_who_serves_beside_its_passes_takes_no_turns(runner: Any, config: Any) -> None:
    from elbowroom.engine.vllm_seam.forward_context import turns_of_passes

    streamed = plan_shares((1, 1), 2, "streamed", 1)[0]
    assert turns_of_passes(streamed, CPU) is None
    assert turns_of_passes(SHARE, torch.device("cuda")) is None
    assert turns_of_passes(SHARE, CPU, is_divided=True) is None
    assert runner.set_forward_context is _original()


def test_passes_that_begin_elsewhere_are_refused(
    runner: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(runner, "set_forward_context")
    with pytest.raises(PoolError, match="--pool streamed"):
        _turns()


def _original() -> Any:
    from vllm.forward_context import set_forward_context

    return set_forward_context


def _turns() -> Turns:
    from elbowroom.engine.vllm_seam.forward_context import turns_of_passes

    turns = turns_of_passes(SHARE, CPU)
    assert turns is not None
    return turns
