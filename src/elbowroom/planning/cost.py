"""The cost of one iteration of one replica: a roofline per layer part, transfers, collectives.

Every term is a sum of bytes over a rate, FLOPs over a rate, or a fixed cost; the rates and their
sources are facts of the cluster (``core/cluster.py``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.cluster import Cluster, Link
from elbowroom.core.model import ModelFacts
from elbowroom.core.model_weights import Weights

_TILE_ROWS = 64
"""Rows of the smallest tile of a matrix product on the tensor cores of Hopper (PTX: wgmma.m64)."""

Tokens = TypeVar("Tokens", float, NDArray[np.float64])


class Batch(NamedTuple):
    """Rows and tokens that one replica computes in one iteration.

    ``context_tokens`` sums what the decode rows read from the KV cache; ``prefill_pairs`` sums the
    query-key pairs of ``prefill_rows`` prompts (n^2 / 2 for a prompt of n tokens taken whole).
    """

    decode_rows: float
    context_tokens: float
    prefill_tokens: float = 0.0
    prefill_pairs: float = 0.0
    prefill_rows: float = 0.0

    @property
    def num_tokens(self) -> float:
        return self.decode_rows + self.prefill_tokens

    @property
    def num_rows(self) -> float:
        """Rows scheduled in the iteration; each gets at most one token, however long its prompt."""
        return self.decode_rows + self.prefill_rows


class IterationCost(NamedTuple):
    """Seconds of compute in one iteration, by part, with all weights present."""

    projections: float
    kv_read: float
    prefill_attention: float
    ffn: float
    head: float
    collectives: float
    layers: float
    engine: float

    @property
    def total(self) -> float:
        return sum(self)


class Term(NamedTuple):
    """One line of an explanation: a term of the cost, its unit and its source."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class CostModel:
    """Times of one model on replicas of a cluster.

    A replica has ``stages`` x ``tensor_parallel`` devices. ``expert_ranks`` replicas divide the
    experts of a mixture, and all have as many rows as this one.
    """

    model: ModelFacts
    cluster: Cluster
    tensor_parallel: int = 1
    stages: int = 1
    expert_ranks: int = 1

    def iteration(self, batch: Batch) -> IterationCost:
        """Seconds of one iteration on local weights (roofline, SiDP section 2: T(B)).

        A pipeline has its rows in as many parts as it has stages, each in another stage: all rows
        are done once when a part has passed every stage (GPipe without its fill and drain).
        """
        tokens, rows = batch.num_tokens / self.stages, batch.num_rows / self.stages
        context, decode_rows = batch.context_tokens / self.stages, batch.decode_rows / self.stages
        return IterationCost(
            projections=self.model.num_layers * self.projection_seconds(tokens),
            kv_read=float(self.kv_read_seconds(context, decode_rows)),
            prefill_attention=self.prefill_attention_seconds(
                batch.prefill_pairs / self.stages, batch.prefill_tokens / self.stages
            ),
            ffn=self.ffn_seconds(tokens),
            head=self.head_seconds(rows),
            collectives=self.collective_seconds(tokens),
            layers=self.model.num_layers * self.small_kernels_seconds(tokens),
            engine=self.engine_seconds(batch.num_rows),
        )

    def projection_seconds(self, rows: float) -> float:
        """Seconds of one layer's attention matrices: bytes, or 2 FLOPs per row and element.

        Of the mean layer, where layers differ.
        """
        elements, num_bytes = self._projections
        return self._matmul(rows, elements, elements, num_bytes)

    def kv_read_seconds(self, context_tokens: Tokens, rows: float) -> Tokens:
        """Seconds of decode attention in all layers: it reads what each keeps of the rows, once.

        A layer with a window reads no more of a row than that; rows count with their mean. A latent
        vector takes every head's FLOPs, which may take longer than reading it.
        """
        seconds: Tokens = context_tokens * 0.0
        for window, count in self._windows.items():
            read = np.minimum(context_tokens, rows * window) if window else context_tokens
            seconds = seconds + read * (self._kv_token_seconds * count)
        return seconds

    def prefill_attention_seconds(self, pairs: float, tokens: float) -> float:
        """Seconds of prompt attention in all layers, for ``pairs`` query-key pairs.

        Two products per pair and head. In a layer with a window, each of the ``tokens`` meets no
        more keys than that.
        """
        all_pairs = sum(
            count * (min(pairs, tokens * window) if window else pairs)
            for window, count in self._windows.items()
        )
        flops = self.model.pair_flops * all_pairs
        return flops / self.tensor_parallel / self.cluster.device.attention_flops.achieved

    def ffn_layer_seconds(self, layer: int, rows: float) -> float:
        """Seconds of one layer's feed-forward network; in a mixture, of the experts touched.

        A device that has one expert in ``expert_ranks`` takes the rows of all replicas to those.
        Devices compute an expert's rows in tiles, the last of which may be nearly empty.
        """
        model, ranks = self.model, self.expert_ranks
        dense = model.dense_ffn_elements(layer)
        touched = (model.touched_ffn_elements(layer, rows * ranks) - dense) / ranks
        active = model.active_ffn_elements(layer) - dense
        if touched and not self.cluster.device.matmul:
            of_expert = rows * active / touched
            active *= ceil(of_expert / _TILE_ROWS) * _TILE_ROWS / of_expert
        read_bytes = self._ffn_bytes[layer] * (dense + touched) / max(1, model.ffn[layer].elements)
        return self._matmul(rows, dense + touched, dense + active, read_bytes)

    def ffn_seconds(self, rows: float) -> float:
        return sum(
            count * self.ffn_layer_seconds(layer, rows) for layer, count in self._layer_kinds
        )

    def head_seconds(self, rows: float) -> float:
        elements = self.model.head_elements()
        return self._matmul(rows, elements, elements, elements * self.model.dtype_bytes())

    def small_kernels_seconds(self, rows: float) -> float:
        """Seconds of one layer's norms, rotary embedding, activation and residuals.

        The time to launch them, plus bytes over bandwidth: two norms read and write the hidden
        state and the residual (8 h), residuals and rotary embedding another 4 h; the activation
        reads gate and up and writes their product (3 w).
        """
        model, device = self.model, self.cluster.device
        elements = 12 * model.hidden_size + 3 * model.intermediate_size / self.tensor_parallel
        num_bytes = rows * elements * model.dtype_bytes()
        return device.layer_seconds + num_bytes / device.elementwise_bandwidth.achieved

    def collective_seconds(self, rows: float) -> float:
        """Seconds of all layers' collectives.

        Two all-reduces of the hidden state per layer, after attention and after the FFN (Megatron);
        rows that go to the replicas of their experts and back; and what a stage sends to the next.
        """
        ranks, model = self.tensor_parallel, self.model
        num_bytes = rows * model.hidden_size * model.dtype_bytes()
        seconds = 0.0
        if ranks > 1:
            link = self.cluster.link(ranks)
            seconds += 2 * model.num_layers * link.all_reduce_seconds(num_bytes, ranks)
        if self.expert_ranks > 1:
            link = self.cluster.link(ranks * self.expert_ranks)
            others = min(model.experts_per_token, self.expert_ranks) * num_bytes / ranks
            seconds += 2 * len(self._expert_layers) * link.transfer_seconds(others)
        if self.stages > 1:
            link = self.cluster.link(ranks * self.stages)
            seconds += self.stages * link.transfer_seconds(num_bytes / ranks)
        return seconds

    def engine_seconds(self, rows: float) -> float:
        """Seconds of scheduling, sampling and detokenising in one iteration."""
        device = self.cluster.device
        return device.iteration_seconds + rows * device.row_seconds

    def peer_link(self, num_ranks: int) -> Link:
        """The nearest link that joins the devices of ``num_ranks`` replicas."""
        return self.cluster.link(num_ranks * self.tensor_parallel)

    def ffn_layer_bytes(self, layer: int) -> float:
        """One device's share of a layer's feed-forward weights, in bytes."""
        return self._ffn_bytes[layer] / self.tensor_parallel

    def hidden_bytes(self, rows: float) -> float:
        """One device's share of the hidden state of ``rows`` rows, in bytes."""
        return rows * self.model.hidden_size * self.model.dtype_bytes() / self.tensor_parallel

    def fetch_layer_seconds(self, layer: int, num_ranks: int) -> float:
        """Seconds to pull one device's share of a layer from its owner, alone on the link."""
        return self.peer_link(num_ranks).transfer_seconds(self.ffn_layer_bytes(layer))

    def fetch_seconds(self, num_ranks: int) -> float:
        """Seconds to fetch all borrowed layers, one after the other.

        In a group of d = ``num_ranks`` replicas, (d-1)/d of the layers are borrowed.
        """
        if num_ranks == 1:
            return 0.0
        layers = sum(
            count * self.fetch_layer_seconds(layer, num_ranks) for layer, count in self._layer_kinds
        )
        return layers * (num_ranks - 1) / num_ranks

    def round_trip_seconds(self, rows: float, num_ranks: int) -> float:
        """Seconds to ship one layer's FFN input rows to the owner, and the output rows back."""
        return 2 * self.peer_link(num_ranks).transfer_seconds(self.hidden_bytes(rows))

    def explain(self, batch: Batch) -> list[Term]:
        """Every term of an iteration's cost, with its unit and source."""
        cost, device = self.iteration(batch), self.cluster.device
        measured = "measured products" if device.matmul else "max(bytes/bandwidth, FLOPs/rate)"
        model = self.model
        return [
            Term("projections", cost.projections, "s", f"attention matrices, {measured}"),
            Term("KV read", cost.kv_read, "s", "what layers keep of rows / attention bandwidth"),
            Term("prefill attention", cost.prefill_attention, "s", "FLOPs of query-key pairs"),
            Term("FFN", cost.ffn, "s", f"gate, up, down, {measured}"),
            Term("head", cost.head, "s", f"vocabulary x hidden, {measured}"),
            Term("collectives", cost.collectives, "s", "2 all-reduces per layer, alpha-beta"),
            Term("small kernels", cost.layers, "s", f"{model.num_layers} x (launches + bytes)"),
            Term("engine", cost.engine, "s", "iteration_seconds + rows x row_seconds"),
            Term("iteration", cost.total, "s", "sum"),
        ]

    def _matmul(self, rows: float, read: float, active: float, read_bytes: float) -> float:
        ranks, is_fp8 = self.tensor_parallel, self.model.uses_fp8()
        return self.cluster.device.matmul_seconds(
            rows, read / ranks, active / ranks, read_bytes / ranks, is_fp8
        )

    @cached_property
    def _ffn_bytes(self) -> tuple[int, ...]:
        return self.model.ffn_bytes()

    @cached_property
    def _windows(self) -> Counter[int]:
        """Layers by their window; 0 is none."""
        return Counter(self.model.attention.windows)

    @cached_property
    def _kv_token_seconds(self) -> float:
        """Seconds in which a layer reads what it keeps of a token, and multiplies it if latent."""
        model, device = self.model, self.cluster.device
        elements = model.attention.layer_elements(self.tensor_parallel)
        flops = model.latent_flops / self.tensor_parallel
        reading = elements * model.kv_element_bytes() / device.attention_bandwidth.achieved
        return max(reading, flops / device.attention_flops.achieved)

    @cached_property
    def _projections(self) -> tuple[float, float]:
        """Elements and bytes of a layer's matrices outside the FFN, on average."""
        model, each = self.model, self.model.weight_element_bytes()
        elements = sum(weights.elements for weights in model.others)
        num_bytes = sum(weights.num_bytes(each) for weights in model.others)
        return elements / model.num_layers, num_bytes / model.num_layers

    @cached_property
    def _expert_layers(self) -> list[int]:
        return [layer for layer, weights in enumerate(self.model.experts) if weights.elements]

    @cached_property
    def _layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """One layer of each kind, and the number of layers like it; most models have one kind."""
        experts = self.model.experts or (Weights(),) * self.model.num_layers
        kinds: dict[tuple[Weights, Weights], list[int]] = {}
        for layer, sizes in enumerate(zip(self.model.ffn, experts, strict=True)):
            kinds.setdefault(sizes, []).append(layer)
        return tuple((layers[0], len(layers)) for layers in kinds.values())
