"""A model loader for vLLM, which loads what a replica borrows one layer at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.model_executor.offloader.base import get_offloader

from elbowroom.core.errors import PoolError
from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.engine.vllm_seam.worker import PoolOffloader

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
"""The number of a layer in a checkpoint's name: the first part that is one."""


def register_loader() -> None:
    """Let --load-format name this loader."""
    register_model_loader(CONFIG_KEY)(PoolModelLoader)


class PoolModelLoader(DefaultModelLoader):
    """vLLM's default loader, which passes over the layers that are not this replica's to keep.

    Those are loaded, processed and given up afterwards, one after the other. All tensors that a
    checkpoint has under a layer's number come then, whatever module they belong to.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        own = copy.copy(load_config)
        own.load_format = "safetensors"
        super().__init__(own)
        self._passed_over: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._loaded: set[str] | None = None  # names so far, of models that tell them

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        _offloader().take_layers(model)
        return model

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        later = self._passed_over = {layer: [] for layer in _offloader().loader.layers_to_read()}
        for name, weight in super().get_all_weights(model_config, model):
            match = _LAYER.search(name)
            number = int(match.group(1)) if match else None
            if number in later:
                later[number].append((name, weight))
            else:
                yield name, weight

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        super().load_weights(model, model_config)
        loader = _offloader().loader
        for layer in loader.layers_to_read():
            loaded = model.load_weights(iter(self._passed_over.pop(layer)))
            if self._loaded is not None:
                self._loaded |= loaded
            for module in loader.modules_of(layer):
                _process(module)
            loader.take(layer)
        if self._loaded is not None:
            super().track_weights_loading(
                model, self._loaded, model_config.quantization is not None
            )

    def track_weights_loading(
        self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Remember what is loaded so far: the check is due when all is."""
        self._loaded = loaded_weights

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        _offloader().attach()
        return model


def _process(module: nn.Module) -> None:
    """Bring a module's weights into their kernels' form now, and not again with all others."""
    methods: dict[int, Any] = {}
    for part in module.modules():
        method = getattr(part, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            weight = next(part.parameters(recurse=False), None)
            device = torch.device("cpu") if weight is None else weight.device
            with device_loading_context(part, device):
                method.process_weights_after_loading(part)
            methods[id(method)] = method
    for method in methods.values():
        method.process_weights_after_loading = _nothing


def _nothing(*_: object) -> None:
    """Do nothing: it is done."""


def _offloader() -> PoolOffloader:
    offloader = get_offloader()
    if not isinstance(offloader, PoolOffloader):
        raise PoolError("--load-format elbowroom is for replicas of a pool: leave it out")
    return offloader
