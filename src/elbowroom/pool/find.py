"""Finding what a pool holds of a decoder layer: its feed-forward modules, by what they contain."""

from __future__ import annotations

from torch import nn

FFN_NAMES = frozenset(
    {
        *("mlp", "feed_forward", "feedforward", "ffn", "mixer", "moe"),
        *("block_sparse_moe", "block_sparse_mlp", "shared_mlp", "residual_mlp"),
    }
)
"""Names that feed-forward modules have in their layer. Where a layer has any of these, its other
children are not considered."""

_LEAST_SHARE = 1 / 8
"""Children with fewer bytes than this part of the largest one stay with every replica."""


def find_modules(block: nn.Module) -> dict[str, nn.Module]:
    """The children of a decoder layer that hold its feed-forward weights, by name.

    They are those that contain no attention (nor another layer that mixes tokens: vLLM derives all
    of them from a class of that name), and whose bytes are at least an eighth of the largest such
    child's. Layers without any are those of hybrids that only mix tokens. Works on shapes alone.
    """
    matrices = {
        name: child
        for name, child in block.named_children()
        if not _mixes_tokens(child) and any(weight.dim() >= 2 for weight in child.parameters())
    }
    named = {name: child for name, child in matrices.items() if name in FFN_NAMES}
    sizes = {name: _num_bytes(child) for name, child in (named or matrices).items()}
    least = max(sizes.values(), default=0) * _LEAST_SHARE
    return {name: matrices[name] for name, size in sizes.items() if size >= least}


def _mixes_tokens(module: nn.Module) -> bool:
    return any(
        "attention" in kind.__name__.lower()
        for part in module.modules()
        for kind in type(part).mro()
    )


def _num_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
