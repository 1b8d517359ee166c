"""The plugin changes nothing for engines that do not ask for it."""

from __future__ import annotations

import importlib.metadata

import pytest

from elbowroom.app.plan_settings import PlanSettings
from elbowroom.core.errors import PoolError
from elbowroom.core.units import MIB
from elbowroom.engine.vllm_seam import plugin
from elbowroom.plans.pool import PoolMode, PoolShare
from tests.demo_job import DEMO
from tests.jobs.plans import plan_here

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


@pytest.mark.parametrize(("on_gpus", "pool"), [(False, "none"), (True, "none"), (True, "mapped")])
def test_without_a_pool_an_engine_on_gpus_is_left_to_itself(
    monkeypatch: pytest.MonkeyPatch, on_gpus: bool, pool: PoolMode
) -> None:
    """On a CPU all layouts run our kernel, so that they give the same to the last bit."""
    from elbowroom.engine.vllm_seam import server

    settings = PlanSettings(DEMO / "model", replicas=2, pool=pool, memory_bytes=64 * MIB)
    plan = plan_here(settings)
    monkeypatch.setattr(server.current_platform, "is_cuda", lambda: on_gpus)
    is_ours = "--additional-config" in server.engine_arguments(plan, 0, "run")
    assert is_ours == (pool != "none" or not on_gpus)
