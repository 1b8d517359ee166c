"""What attention layers keep of a row's tokens, in groups of layers, as vLLM's cache does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayers:
    """Attention layers: ``windows[l]`` is how many tokens layer l attends to, 0 for all.

    A layer keeps ``head_elements`` numbers for a token and each of ``num_heads`` heads: a key and a
    value, or in multi-head latent attention one latent vector for all heads. ``is_known`` is False
    where the model keeps something else, too.
    """

    windows: tuple[int, ...]
    head_elements: int
    num_heads: int
    is_known: bool = True

    def layer_elements(self, tensor_parallel: int = 1) -> int:
        """Elements of a token in one layer, on one device of a replica.

        Heads are divided among devices; a device has at least one, so fewer heads than devices are
        held more than once.
        """
        return self.head_elements * -(-self.num_heads // tensor_parallel)

    def groups(self) -> tuple[int, tuple[int, ...]]:
        """Layers of one group, and the window of each group.

        vLLM gives blocks to groups of equally many layers of one kind. The rarer kind sets their
        size, unless the kinds are nearly equal; what is left over is padded
        (``_get_kv_cache_groups_uniform_page_size``).
        """
        kinds = {window: self.windows.count(window) for window in dict.fromkeys(self.windows)}
        fewest, most = min(kinds.values()), max(kinds.values())
        size = most if most < 1.5 * fewest else fewest
        groups = [window for window, count in kinds.items() for _ in range(-(-count // size))]
        return size, tuple(groups)


@dataclass(frozen=True)
class KvGroups:
    """How many tokens of a row each group of layers keeps: ``most[g]`` at most, 0 for all.

    Costs are in tokens that every group keeps, so that a row in a model without windows costs its
    own tokens.
    """

    most: tuple[int, ...] = (0,)

    def row_tokens(self, num_tokens: float, block_tokens: int = 1) -> int:
        """Cost of a row of ``num_tokens`` tokens, in whole blocks.

        A group with a window takes a block more: the window may begin inside one.
        """
        blocks = 0
        for most in self.most:
            kept = min(num_tokens, most) if most else num_tokens
            blocks += int(-(-kept // block_tokens)) + (most > 0)
        return int(-(-blocks * block_tokens // len(self.most)))

    def longest_row(self, num_tokens: int, block_tokens: int, most: int) -> int:
        """Tokens of the longest row, up to ``most``, that costs no more than ``num_tokens``."""
        return (
            bisect_right(
                range(most + 1), num_tokens, lo=1, key=lambda n: self.row_tokens(n, block_tokens)
            )
            - 1
        )


def kv_groups(windows: Sequence[int], tokens_in_flight: int) -> KvGroups:
    """Groups with these windows; a window keeps what is being computed besides."""
    return KvGroups(tuple(window and window - 1 + tokens_in_flight for window in windows))
