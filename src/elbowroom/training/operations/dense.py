"""Rules of linear layers, norms, embeddings, attention and dropout."""

from __future__ import annotations

import math

from elbowroom.training.operations.call import Call, Found, Read
from elbowroom.training.operations.operation import (
    Attention,
    DotAttention,
    Dropout,
    Embedding,
    Norm,
    Pointwise,
    Source,
)
from elbowroom.training.operations.pointwise import identity


def linear(call: Call) -> Found:
    source = call.source()
    call.must_be(len(call.tensor(source).shape) >= 2, "there is no batch")
    parameters = {"weight": call.needs("weight"), **call.roles("bias")}
    weight = call.state[parameters["weight"]]
    call.must_be(weight.ndim == 2, "the weight is no matrix")
    return Found(
        kind="linear",
        sources=(source,),
        features=len(call.out.shape) - 1,
        parameters=parameters,
        flops=2.0 * math.prod(call.out.shape) * weight.shape[1],
    )


def embedding(call: Call) -> Found:
    source = call.source()
    weight = call.needs("weight")
    call.must_be(call.constant("max_norm") is None, "max_norm")
    call.constant("norm_type")
    call.must_be(not call.constant("scale_grad_by_freq", False), "scale_grad_by_freq")
    call.must_be(not call.constant("sparse", False), "sparse gradients")
    row = call.constant("padding_idx")
    rows = call.state[weight].shape[0]
    if call.constant("is_aten", False):
        row = None if row is None or row < 0 else row
    elif row is not None and row < 0:
        row += rows
    features = len(call.out.shape) - 1
    parameters = {"weight": weight}
    return Found("embedding", (source,), Embedding(row), features, parameters=parameters)


def batch_norm(call: Call) -> Found:
    source = call.source()
    shape = call.tensor(source).shape
    call.must_be(len(shape) >= 2, "there is no batch")
    call.constant("cudnn_enabled")
    parameters = call.roles("weight", "bias", "running_mean", "running_var")
    parameters |= call.roles("num_batches_tracked")
    running = [role in parameters for role in ("running_mean", "running_var")]
    call.must_be(all(running) or not any(running), "one running statistic only")
    uses_batch = bool(call.constant("training", False)) or not all(running)
    momentum = call.constant("momentum", 0.1)
    settings = Norm(call.constant("eps", 1e-5), momentum, uses_batch)
    return Found("batch_norm", (source,), settings, 1, parameters=parameters, matrices=())


def group_norm(call: Call) -> Found:
    source = call.source()
    shape = call.tensor(source).shape
    call.must_be(len(shape) >= 2, "there is no batch")
    call.constant("cudnn_enabled")
    parameters, groups = call.roles("weight", "bias"), call.constant("num_groups")
    settings = Norm(call.constant("eps", 1e-5))
    return Found(
        "group_norm", (source,), settings, 1, parameters=parameters, matrices=(), groups=groups
    )


def instance_norm(call: Call) -> Found:
    """A group norm with a group for each channel, if it keeps no statistics."""
    source = call.source()
    shape = call.tensor(source).shape
    call.must_be(len(shape) == call.constant("num_space", len(shape) - 2) + 2, "there is no batch")
    call.must_be(len(shape) > 2, "there is no space")
    call.must_be(not call.roles("running_mean", "running_var"), "running statistics")
    call.must_be(call.constant("use_input_stats", True) is True, "use_input_stats")
    call.constant("cudnn_enabled")
    call.constant("momentum")
    parameters = call.roles("weight", "bias")
    settings = Norm(call.constant("eps", 1e-5))
    return Found(
        "group_norm", (source,), settings, 1, parameters=parameters, matrices=(), groups=shape[1]
    )


def layer_norm(call: Call) -> Found:
    source = call.source()
    shape = call.tensor(source).shape
    normalized = call.constant("normalized_shape")
    num_dims = 1 if isinstance(normalized, int) else len(normalized)
    call.must_be(num_dims < len(shape), "there is no batch")
    call.constant("cudnn_enable")
    call.must_be(num_dims == 1, "a norm of more than features")
    features = len(shape) - 1
    call.must_be(call.tensor(source).features == features, "features that are not last")
    parameters = call.roles("weight", "bias")
    settings = Norm(call.constant("eps", 1e-5))
    return Found("layer_norm", (source,), settings, features, parameters=parameters, matrices=())


def attention(call: Call) -> Found:
    """Self-attention of ``nn.MultiheadAttention``, whose weights nobody reads."""
    sources = [call.source(key) for key in ("query", "key", "value")]
    call.must_be(len(set(sources)) == 1, "attention to something else")
    shape = call.tensor(sources[0]).shape
    call.must_be(len(shape) == 3 and call.constant("batch_first") is True, "batch_first")
    call.must_be(not call.constant("dropout", 0.0), "dropout of scores")
    needs_weights = call.constant("need_weights", True)
    call.constant("average_attn_weights")
    is_causal = bool(call.constant("is_causal", False))
    call.must_be(not (is_causal and needs_weights), "is_causal with weights")
    mask = call.roles("attn_mask")
    if mask:
        call.must_be(call.state[mask["attn_mask"]].ndim == 2, "a mask for each head")
    parameters = {role: call.needs(role) for role in ("in_proj_weight", "out_proj.weight")}
    parameters |= call.roles("in_proj_bias", "out_proj.bias") | ({} if is_causal else mask)
    heads = call.constant("num_heads")
    samples, tokens, width = shape
    scores = 4.0 * samples * tokens * tokens * width
    return Found(
        kind="attention",
        sources=(sources[0],),
        settings=Attention(heads, is_causal),
        features=2,
        parameters=parameters,
        matrices=("in_proj_weight", "out_proj.weight"),
        groups=heads,
        flops=8.0 * samples * tokens * width * width + scores,
    )


def dot_attention(call: Call) -> Found:
    sources = tuple(call.source(key) for key in ("query", "key", "value"))
    query, key, value = (call.tensor(source).shape for source in sources)
    call.must_be(len(query) == len(key) == len(value) == 4, "other dimensions than 4")
    call.must_be(query[0] == key[0] and key[:2] == value[:2], "batches of unlike number")
    is_grouped = bool(call.constant("enable_gqa", False)) and query[1] % key[1] == 0
    call.must_be(query[1] == key[1] or is_grouped, "heads of unlike number")
    call.must_be(call.raw("attn_mask") is None, "a mask")
    call.must_be(not call.constant("dropout_p", 0.0), "dropout of scores")
    settings = DotAttention(bool(call.constant("is_causal", False)), call.constant("scale"))
    samples, heads, tokens, width = query
    flops = 2.0 * samples * heads * tokens * key[2] * (width + value[3])
    return Found("dot_attention", sources, settings, 1, groups=heads, flops=flops)


def dropout(call: Call) -> Found:
    source = call.source()
    p, is_active = call.constant("p", 0.5), call.constant("training", True)
    call.constant("inplace")
    if is_active and p:
        return Found("dropout", (source,), Dropout(float(p)))
    return Found("pointwise", (source,), Pointwise(identity, (Source(0),)))


def first_of_pair(call: Call) -> Found:
    """What an attention attends to, of the pair that it gives: the layer's own output here."""
    source = call.raw("input")
    call.must_be(isinstance(source, Read), "the input is no layer's output")
    return Found("pointwise", (source.layer,), Pointwise(identity, (Source(0),)))
