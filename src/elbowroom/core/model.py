"""Facts about a model, read from its directory without touching a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from elbowroom.core.errors import InputError, UnsupportedModelError
from elbowroom.core.kv_cache import AttentionLayers
from elbowroom.core.model_config import ModelConfig, read_config, resolve_dtype
from elbowroom.core.model_shapes import (
    KNOWN_TYPES,
    PLAIN_DTYPES,
    Stored,
    config_shapes,
    file_tensors,
    weight_files,
)
from elbowroom.core.model_weights import (
    CountedWeights,
    Weights,
    computes_in_fp8,
    count_weights,
    forms_of,
    quantised,
)
from elbowroom.core.weight_forms import QuantisedWeights

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STORAGE_BYTES = {**DTYPE_BYTES, "fp8": 1}
"""Bytes per element of stored tensors: weights and KV cache may be smaller than activations."""

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
"""Weights that vLLM reads, and plans do not."""

_GIVE_MORE = ("falcon",)
"""Types whose feed-forward modules, as vLLM has them, give a bias to be added later."""

BuildTensors = Callable[[Path], Mapping[str, Stored]]
"""Gives the tensors of the architecture that a model folder's config names."""


@dataclass(frozen=True)
class ModelFacts:
    """Shapes of a decoder, as element counts, so that sizes can be computed for any dtype.

    ``ffn[l]`` counts the feed-forward matrices of layer l, which the pool holds once; ``rest``
    counts everything else (attention, embeddings, head, norms, biases), of which ``others[l]`` are
    the other matrices of layer l, and ``outside`` elements are of parts that text does not pass. In
    a mixture of experts, ``experts[l]`` is the part of ``ffn[l]`` that lies in routed experts, of
    which a token takes ``experts_per_token``. With ``ties_embeddings`` the embedding is the head.

    ``pair_flops`` are a layer's FLOPs for a query and a key of all heads, ``latent_flops`` those
    for a cached latent vector (0 without latent attention). ``dtype`` is what the model computes
    in; weights that are not quantised, and the KV cache, are stored in it too unless
    ``weight_dtype`` and ``kv_dtype`` say otherwise. ``max_model_len`` is the most tokens of a row.

    ``has_weights`` is False when only the config was there. ``cannot_pool`` says why no pool can
    hold the layers, and ``cannot_ship`` why rows cannot be shipped in one, None where they can.
    ``not_tried_on_gpus`` says what kind of pool was run on CPUs alone. ``quantised`` is None for
    weights that are not.
    """

    name: str
    model_type: str
    dtype: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    max_model_len: int
    attention: AttentionLayers
    ffn: tuple[Weights, ...]
    rest: Weights
    others: tuple[Weights, ...]
    pair_flops: int
    latent_flops: int = 0
    outside: int = 0
    ties_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    experts: tuple[Weights, ...] = ()
    has_weights: bool = True
    computes_in_fp8: bool = False
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    cannot_pool: str | None = None
    cannot_ship: str | None = None
    not_tried_on_gpus: str | None = None
    quantised: QuantisedWeights | None = None

    @property
    def cannot_pool_here(self) -> str | None:
        """``cannot_pool``, or what else is in the way of a pool of these files."""
        return self.cannot_pool or (None if self.has_weights else "it has no .safetensors files")

    @property
    def ffn_elements(self) -> tuple[int, ...]:
        return tuple(weights.elements for weights in self.ffn)

    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def weight_element_bytes(self) -> int:
        """Bytes of a weight that is not quantised."""
        return STORAGE_BYTES[self.weight_dtype or self.dtype]

    def ffn_bytes(self) -> tuple[int, ...]:
        return tuple(weights.num_bytes(self.weight_element_bytes()) for weights in self.ffn)

    def ffn_bytes_of(self, expert_ranks: int) -> list[int]:
        """``ffn_bytes`` of a replica that has one in ``expert_ranks`` of the routed experts."""
        element = self.weight_element_bytes()
        experts = [weights.num_bytes(element) for weights in self.experts] or [0] * self.num_layers
        return [
            size - of_experts * (expert_ranks - 1) // expert_ranks
            for size, of_experts in zip(self.ffn_bytes(), experts, strict=True)
        ]

    def other_bytes(self) -> int:
        """Bytes of the matrices in layers outside the FFNs."""
        return sum(weights.num_bytes(self.weight_element_bytes()) for weights in self.others)

    def replicated_bytes(self) -> int:
        """Bytes of all weights outside the FFNs; ``weight_dtype`` leaves embeddings and head."""
        plain = self.rest.elements - self.rest.packed
        kept = min(plain, 2 * self.vocab_size * self.hidden_size)
        others = (plain - kept) * self.weight_element_bytes()
        return self.rest.packed_bytes + kept * self.dtype_bytes() + others

    def uses_fp8(self) -> bool:
        """Whether products run at the device's rate for 8-bit numbers."""
        return self.computes_in_fp8 or self.weight_dtype == "fp8"

    def head_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    def dense_ffn_elements(self, layer: int) -> int:
        """Elements of layer ``layer``'s feed-forward network outside routed experts."""
        return self.ffn[layer].elements - (self.experts[layer].elements if self.experts else 0)

    def active_ffn_elements(self, layer: int) -> float:
        """Elements of layer ``layer``'s feed-forward network that one token is multiplied with."""
        if not self.experts:
            return self.ffn[layer].elements
        share = self.experts_per_token / self.num_experts
        return self.ffn[layer].elements - self.experts[layer].elements * (1 - share)

    def touched_ffn_elements(self, layer: int, num_tokens: float) -> float:
        """Elements of layer ``layer``'s feed-forward network that ``num_tokens`` tokens read.

        With even routing: no token takes a given expert with probability (1 - k/E)^n.
        """
        if not self.experts:
            return self.ffn[layer].elements
        left_out = float((1 - self.experts_per_token / self.num_experts) ** num_tokens)
        return self.ffn[layer].elements - self.experts[layer].elements * left_out

    def kv_element_bytes(self) -> int:
        return STORAGE_BYTES[self.kv_dtype or self.dtype]

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> int:
        """Bytes of a token that every layer keeps, on one device of a replica, with padding."""
        layers, groups = self.attention.groups()
        of_layer = self.attention.layer_elements(tensor_parallel) * self.kv_element_bytes()
        return len(groups) * layers * of_layer

    def divides_among(self, tensor_parallel: int) -> bool:
        """Whether heads can be divided among so many devices, as vLLM asks for."""
        heads = self.attention.num_heads
        return self.num_heads % tensor_parallel == 0 and gcd(heads, tensor_parallel) in (
            heads,
            tensor_parallel,
        )


def model_name(model_dir: Path) -> str:
    """The name of a model: its repository's on the hub, or its folder's."""
    folder = model_dir.resolve()
    return repository_of(folder) or folder.name


def read_model(
    model_dir: Path,
    dtype: str = "auto",
    is_pooling: bool = False,
    build: BuildTensors | None = None,
) -> ModelFacts:
    """Facts of a Hugging Face model directory, from ``config.json`` and safetensors headers.

    Without weight files the config alone is enough for the types in ``KNOWN_TYPES``, and with
    ``build`` for every architecture that it knows. ``dtype`` "auto" takes what vLLM would take;
    ``is_pooling`` is for an engine that makes embeddings.

    Raises InputError when a file is missing or corrupt.
    """
    config = read_config(model_dir)
    files = weight_files(model_dir)
    tensors = file_tensors(files) if files else _config_tensors(config, model_dir, build)
    counted = _count(tensors, config, model_dir)
    has_experts = any(weights.elements for weights in counted.experts)
    if has_experts and not config.num_experts:
        raise InputError("config.json names no number of experts, but the weights hold experts")
    quantised_weights = forms_of(counted, config)
    return ModelFacts(
        name=model_name(model_dir),
        model_type=config.model_type,
        dtype=_dtype(config, _stored_dtype(tensors), dtype, is_pooling),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        max_model_len=config.max_model_len,
        attention=config.attention,
        ffn=tuple(counted.ffn),
        rest=counted.rest,
        others=tuple(counted.others),
        pair_flops=config.pair_flops,
        latent_flops=config.latent_flops,
        outside=counted.outside,
        ties_embeddings=config.ties_embeddings,
        num_experts=config.num_experts if has_experts else 0,
        experts_per_token=max(1, config.experts_per_token) if has_experts else 0,
        experts=tuple(counted.experts) if has_experts else (),
        has_weights=bool(files),
        computes_in_fp8=computes_in_fp8(config.quantization),
        cannot_pool=_cannot_pool(counted, quantised_weights),
        cannot_ship=_cannot_ship(config, counted, has_experts),
        not_tried_on_gpus=_not_tried_on_gpus(config, has_experts),
        quantised=quantised_weights,
    )


def check_runnable(model: ModelFacts, model_dir: Path, pool: str | None) -> None:
    """Check that an engine can run the model, in the pool that is asked for.

    Raises InputError for a folder without weights, and UnsupportedModelError for a model that no
    pool can hold where one is asked for.
    """
    others = any(any(model_dir.glob(pattern)) for pattern in OTHER_WEIGHTS)
    if not model.has_weights and not others:
        raise InputError(f"{model_dir} has no weights: download the whole model")
    why = model.cannot_pool_here
    if why and pool not in (None, "none"):
        raise UnsupportedModelError(f"{model.name} cannot be pooled: {why}. Use --pool none")


def repository_of(folder: Path) -> str | None:
    """Hub name of a folder in the Hugging Face cache; None for any other folder."""
    snapshots, repository = folder.parent, folder.parent.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return None


def _config_tensors(
    config: ModelConfig, model_dir: Path, build: BuildTensors | None
) -> Mapping[str, Stored]:
    """The tensors that a config stands for."""
    if config.model_type in KNOWN_TYPES:
        shapes = config_shapes(config.text)
        tensors: Mapping[str, Stored] = {
            name: Stored(shape, None) for name, shape in shapes.items()
        }
    elif build is not None:
        tensors = build(model_dir)
    else:
        raise InputError(
            f"{model_dir} has no .safetensors files, and what tensors a '{config.model_type}' has "
            f"is not known without transformers: pip install 'elbowroom[cpu]'"
        )
    return tensors


def _count(tensors: Mapping[str, Stored], config: ModelConfig, model_dir: Path) -> CountedWeights:
    """Count the weights. Raises InputError where the config says of them what cannot be."""
    try:
        return count_weights(quantised(tensors, config), config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{model_dir / 'config.json'} cannot be used: {error}") from error


def _cannot_pool(counted: CountedWeights, quantised: QuantisedWeights | None) -> str | None:
    """Why no pool can hold the layers of a model."""
    if quantised is not None and not quantised.stays_in_tensors:
        return f"its weights are quantised ({quantised.method})"
    if not any(weights.elements for weights in counted.ffn):
        return f"none of its {len(counted.ffn)} layers has feed-forward matrices"
    return None


def _not_tried_on_gpus(config: ModelConfig, has_experts: bool) -> str | None:
    if has_experts:
        return "a mixture"
    if config.quantization is not None:
        return "quantised weights"
    return None if config.is_native else "a model of vLLM's Transformers backend"


def _cannot_ship(config: ModelConfig, counted: CountedWeights, has_experts: bool) -> str | None:
    """Why rows cannot be shipped in a pool: an owner answers rows with rows, and nothing else."""
    if has_experts:
        return "vLLM's kernel for experts on CPUs was seen to end a process that served peers"
    if config.model_type in _GIVE_MORE:
        return "its feed-forward modules give something beside their rows"
    return "its layers have several feed-forward modules" if counted.is_loose else None


def _stored_dtype(tensors: Mapping[str, Stored]) -> str:
    """The dtype to which all plain tensors can be converted."""
    found = {PLAIN_DTYPES.get(tensor.dtype or "") for tensor in tensors.values()} - {None}
    return str(found.pop()) if len(found) == 1 else "float32"


def _dtype(config: ModelConfig, stored: str, asked: str, is_pooling: bool) -> str:
    dtype = resolve_dtype(config, stored, asked, is_pooling)
    if dtype == "float16" and config.needs_bfloat16:
        raise InputError(
            f"--dtype float16: vLLM computes a '{config.model_type}' in bfloat16 or float32 only"
        )
    if dtype not in DTYPE_BYTES:
        raise InputError(f"dtype '{dtype}' is not one of {', '.join(DTYPE_BYTES)}: set --dtype")
    return dtype
