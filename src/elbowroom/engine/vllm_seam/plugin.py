"""The ``vllm.general_plugins`` entry point. Inert unless our replica loads it."""

from __future__ import annotations

import os
import sys

from elbowroom.engine.vllm_seam import CONFIG_KEY, REPLICA_MARK

_PACKAGE = "vllm.model_executor.offloader"
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def register() -> None:
    """Stand in front of vLLM's choice of offloader, which sees every decoder layer as it is built.

    Runner modules copy the function's name when they are imported, and vLLM loads plugins before
    that; where a runner was imported earlier, its copy is replaced too.
    """
    import vllm.model_executor.offloader as package  # vLLM has imported it by now
    from vllm.platforms import current_platform

    original = package.create_offloader
    if getattr(original, CONFIG_KEY, False):
        return

    def create_offloader(offload_config: object) -> object:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        wanted = (config.additional_config or {}).get(CONFIG_KEY) if config else None
        if not wanted:
            return original(offload_config)
        from elbowroom.engine.vllm_seam.compilation import check_compilation
        from elbowroom.engine.vllm_seam.worker import PoolOffloader

        check_compilation(wanted, config.compilation_config)
        parallel = config.parallel_config
        return PoolOffloader.from_config(
            wanted,
            parallel.world_size,
            parallel.tensor_parallel_size,
            config.model_config.dtype if config.model_config else None,
        )

    if REPLICA_MARK in os.environ and current_platform.is_cpu():  # NCCL opens no port for one rank
        from elbowroom.engine.vllm_seam.single_rank import keep_off_network

        keep_off_network()
    if REPLICA_MARK in os.environ:
        from elbowroom.engine.vllm_seam.loader import register_loader

        register_loader()
    setattr(create_offloader, CONFIG_KEY, True)
    for name in (_PACKAGE, *_RUNNERS):
        if name in sys.modules:
            sys.modules[name].create_offloader = create_offloader  # type: ignore[attr-defined]
