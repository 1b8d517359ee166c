"""The plugin changes nothing for engines that do not ask for it."""

from __future__ import annotations

import importlib.metadata

import pytest

from elbowroom.core.errors import PoolError
from elbowroom.engine.vllm_seam import plugin
from elbowroom.plans.pool import PoolShare

pytestmark = pytest.mark.vllm


def test_vllm_finds_the_entry_point() -> None:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="elbowroom")
    assert [entry.load() for entry in entries] == [plugin.register]


def test_inert_without_our_config() -> None:
    from vllm.config import OffloadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import offloader

    plugin.register()
    registered = offloader.create_offloader
    plugin.register()
    assert offloader.create_offloader is registered  # twice is once
    assert type(registered(OffloadConfig())) is offloader.NoopOffloader
    with set_current_vllm_config(VllmConfig()):
        assert type(registered(OffloadConfig())) is offloader.NoopOffloader


def test_takes_over_with_our_config() -> None:
    from vllm.config import OffloadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import offloader

    from elbowroom.engine.vllm_seam import worker

    plugin.register()
    share = PoolShare("none", rank=0, num_ranks=1, owners=(0,))
    asks = VllmConfig(additional_config={plugin.CONFIG_KEY: {"share": share.to_json()}})
    with set_current_vllm_config(asks):
        assert type(offloader.create_offloader(OffloadConfig())) is worker.PoolOffloader


def test_replicas_of_several_ranks_are_refused() -> None:
    from elbowroom.engine.vllm_seam.worker import PoolOffloader

    share = PoolShare("none", rank=0, num_ranks=1, owners=(0,))
    with pytest.raises(PoolError, match="2 ranks"):
        PoolOffloader.from_config({"share": share.to_json()}, world_size=2)
