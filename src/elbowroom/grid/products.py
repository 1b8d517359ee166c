"""Linear layers, embeddings and attention on parts; sums over input features are left pending."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from elbowroom.core.windows import part_of
from elbowroom.grid.call import Call
from elbowroom.grid.parts import Part, product_type, zeros_like_computed
from elbowroom.training.operations.operation import Attention, DotAttention, Embedding


def linear(call: Call) -> Part:
    return call.output(F.linear(call.source.local, call.weight(), call.bias()))


def embedding(call: Call) -> Part:
    """Rows of the table that this worker has; zeros for others, which other workers add."""
    weight, padding = call.weight(), call.settings(Embedding).padding_idx
    places = call.source.local
    inputs = call.placement.inputs
    if not inputs:
        return call.output(F.embedding(places, weight, padding))
    layout = call.placement.computed
    size = _table_rows(call)
    worker = call.channel.worker
    first, behind = part_of(size, layout.product(inputs), layout.number(worker, inputs))
    is_here = (places >= first) & (places < behind)
    local = (places - first).where(is_here, 0)
    found = F.embedding(local, weight) if len(weight) else weight.new_zeros(*places.shape, 0)
    if padding is not None and first <= padding < behind:
        is_padding = (places == padding).unsqueeze(-1)
        found = torch.where(is_padding, found.detach(), found)
    return call.output(found * is_here.unsqueeze(-1))


def _table_rows(call: Call) -> int:
    return call.operation.shape.weights // call.operation.shape.num_features


def attention(call: Call) -> Part:
    """Self-attention over this worker's heads; their outputs are summands."""
    settings = call.settings(Attention)
    source = call.source.local
    layer = call.operation.shape
    width = layer.num_features // settings.heads
    joint = F.linear(source, call.weight("in_proj_weight"), call.parameter("in_proj_bias"))
    shape = (*source.shape[:-1], joint.shape[-1] // 3 // width, width)
    query, key, value = (each.view(shape).transpose(1, 2) for each in joint.chunk(3, -1))
    mask = call.parameter("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # the module's says where not to look, the function's where to
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=settings.is_causal and mask is None
    )
    flat = attended.transpose(1, 2).flatten(2)
    bias = None if call.placement.pending else call.parameter("out_proj.bias")
    return call.output(F.linear(flat, call.weight("out_proj.weight"), bias))


def dot_attention(call: Call) -> Part:
    settings = call.settings(DotAttention)
    query, key, value = (source.local for source in call.sources)
    if not query.numel():
        nothing = zeros_like_computed(call.local_shape, query, key, value)
        return call.output(nothing.to(product_type(query, key)))
    is_grouped = query.shape[1] != key.shape[1]
    return call.output(
        F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=settings.is_causal,
            scale=settings.scale,
            enable_gqa=is_grouped,
        )
    )
