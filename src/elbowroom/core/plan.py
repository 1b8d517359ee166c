"""Plans: frozen, printable, with a JSON round trip. Whatever a run needs to know is in its plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from elbowroom.core.action import Fetch

PoolMode = Literal["none", "mapped", "streamed"]
FetchOrder = Literal["peak-shift", "sliced"]

POOL_MODES: tuple[PoolMode, ...] = get_args(PoolMode)
FETCH_ORDERS: tuple[FetchOrder, ...] = get_args(FetchOrder)


@dataclass(frozen=True)
class PoolShare:
    """One rank's part in a pool: which layers it owns, and how it borrows the others.

    owners[l] is the rank that keeps layer l. A pool of one rank owns every layer: that is what
    ``mode`` "none" means. ``fetches`` is one forward pass' worth of copies, in order; it is empty
    unless ``mode`` is "streamed".
    """

    mode: PoolMode
    rank: int
    num_ranks: int
    owners: tuple[int, ...]
    num_slots: int = 0
    fetches: tuple[Fetch, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "owners": list(self.owners),
            "fetches": [str(fetch) for fetch in self.fetches],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> PoolShare:
        return PoolShare(
            **{
                **data,
                "owners": tuple(data["owners"]),
                "fetches": tuple(Fetch.parse(text) for text in data["fetches"]),
            }
        )


@dataclass(frozen=True)
class MemoryAccount:
    """Where the memory of one replica goes, in bytes; ``planning.memory`` makes it.

    Sizes are those of the replica with the most weights, so that every replica fits. The cache
    is handed out in blocks of ``block_tokens`` tokens; vLLM keeps block 0 for itself, and it is
    counted in ``num_kv_blocks``, as vLLM does when it reports its cache size.
    """

    memory_bytes: int
    replicated_bytes: int
    ffn_bytes: int
    slot_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_tokens: int

    @property
    def weight_bytes(self) -> int:
        """Weights that stay: replicated parts and this replica's share of the FFN layers."""
        return self.replicated_bytes + self.ffn_bytes

    @property
    def num_kv_blocks(self) -> int:
        return self.kv_bytes // (self.kv_bytes_per_token * self.block_tokens)

    @property
    def num_kv_tokens(self) -> int:
        return self.num_kv_blocks * self.block_tokens


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is told besides the pool. ``None`` leaves the choice to vLLM."""

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    served_model_names: tuple[str, ...]
    seed: int = 0
    enforce_eager: bool = True
    prefix_caching: bool = True
    runner: str = "auto"
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunPlan:
    """One run of one model on a group of equal replicas."""

    model_dir: str
    account: MemoryAccount
    shares: tuple[PoolShare, ...]
    cores: tuple[tuple[int, ...], ...]
    engine: EngineOptions

    @property
    def num_replicas(self) -> int:
        return len(self.shares)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shares": [share.to_json() for share in self.shares]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RunPlan:
        engine = data["engine"]
        return RunPlan(
            model_dir=data["model_dir"],
            account=MemoryAccount(**data["account"]),
            shares=tuple(PoolShare.from_json(share) for share in data["shares"]),
            cores=tuple(tuple(cores) for cores in data["cores"]),
            engine=EngineOptions(
                **{
                    **engine,
                    "served_model_names": tuple(engine["served_model_names"]),
                    "extra": tuple(engine["extra"]),
                }
            ),
        )
