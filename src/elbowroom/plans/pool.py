"""Plans of a weight pool: frozen, printable, with a JSON round trip.

Whatever a run needs to know is in its plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.core.files import read_json, write_json
from elbowroom.core.kv_cache import KvGroups
from elbowroom.plans.pool_actions import Fetch

PoolMode = Literal["none", "mapped", "streamed", "shipped"]
FetchOrder = Literal["peak-shift", "sliced", "in-order"]

POOL_MODES: tuple[PoolMode, ...] = get_args(PoolMode)
FETCH_ORDERS: tuple[FetchOrder, ...] = get_args(FetchOrder)
_FORMAT, _VERSION = "elbowroom run plan", 1

NO_OWNER = -1
"""Owner of a layer without a feed-forward network."""


@dataclass(frozen=True)
class Layout:
    """Arrangement of replicas of one model on devices.

    ``num_groups`` groups of ``num_ranks`` replicas, each of ``tensor_parallel`` devices; the
    replicas of a group share one pool. ``pool`` "streamed" is the SiDP paper's WaS; "shipped" is
    its WaS+CaS: small batches are shipped to the owners instead.

    A replica may be a pipeline of ``pipeline_parallel`` stages of so many devices, and the replicas
    of a group may divide the experts of a mixture among them (``expert_parallel``, without a pool):
    both are planned, and not run.
    """

    tensor_parallel: int
    num_ranks: int
    num_groups: int
    pool: PoolMode
    num_slots: int = 0
    pipeline_parallel: int = 1
    expert_parallel: bool = False

    @property
    def is_run(self) -> bool:
        """Whether this version can run it: layouts are planned that are to be compared with."""
        several_pools = self.num_groups > 1 and self.pool != "none"
        return self.pipeline_parallel == 1 and not self.expert_parallel and not several_pools

    @property
    def expert_ranks(self) -> int:
        """Replicas among which a mixture's experts are divided."""
        return self.num_ranks if self.expert_parallel else 1

    @property
    def streams(self) -> bool:
        """Whether borrowed layers are copied into slots."""
        return self.pool in ("streamed", "shipped")

    @property
    def ships(self) -> bool:
        """Whether rows of small batches may go to a layer's owner instead."""
        return self.pool == "shipped"

    @property
    def num_replicas(self) -> int:
        return self.num_ranks * self.num_groups

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.num_replicas

    def __str__(self) -> str:
        groups = f"g{self.num_groups}" if self.num_groups > 1 else ""
        slots = f" {self.num_slots} slots" if self.num_slots else ""
        stages = f"p{self.pipeline_parallel}" if self.pipeline_parallel > 1 else ""
        pool = "experts divided" if self.expert_parallel else self.pool
        return f"t{self.tensor_parallel}{stages}d{self.num_ranks}{groups} {pool}{slots}"


@dataclass(frozen=True)
class PoolShare:
    """One replica's part in a pool: which layers it owns, and how it borrows the others.

    ``owners[l]`` is the number, within the group, of the replica that keeps layer l, or
    ``NO_OWNER``. In a pool of one replica that one owns every layer: this is what ``mode`` "none"
    means; without any owner, vLLM keeps the layers to itself. ``fetches`` lists the copies of one
    forward pass, in order; it is empty unless ``mode`` is "streamed" or "shipped".

    A batch of fewer than about ``ship_below_rows`` rows may be shipped to the owners instead, if it
    has no more than ``ship_bytes``, the size of a buffer; 0 never ships.
    """

    mode: PoolMode
    rank: int
    num_ranks: int
    owners: tuple[int, ...]
    num_slots: int = 0
    fetches: tuple[Fetch, ...] = ()
    ship_below_rows: int = 0
    ship_bytes: int = 0

    @property
    def streams(self) -> bool:
        """Whether borrowed layers are copied into slots."""
        return self.mode in ("streamed", "shipped")

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
class MemoryBudget:
    """Division of one replica's memory, in bytes; ``planning.pool.memory`` computes it.

    Sizes are those of the replica with the most weights, so that every replica fits. The cache is
    handed out in blocks of ``block_tokens`` tokens; vLLM keeps block 0 for itself, and it is
    counted in ``num_kv_blocks``, as vLLM does when it reports its cache size.

    ``kv_group_tokens`` has the most tokens that each group of layers keeps of a row, 0 for all.
    ``kv_is_known`` is False where layers keep something else, too, of which the cache is taken.
    """

    memory_bytes: int
    replicated_bytes: int
    ffn_bytes: int
    slot_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_tokens: int
    kv_group_tokens: tuple[int, ...] = (0,)
    kv_is_known: bool = True

    @staticmethod
    def from_json(data: dict[str, Any]) -> MemoryBudget:
        """Read a budget. Raises KeyError, TypeError or ValueError for one that cannot be."""
        groups = tuple(data.get("kv_group_tokens", (0,)))
        budget = MemoryBudget(**{**data, "kv_group_tokens": groups})
        sizes = [*groups, *(value for key, value in data.items() if key != "kv_group_tokens")]
        if not groups or not all(isinstance(size, int) for size in sizes) or min(groups) < 0:
            raise ValueError("its budget has something else than whole numbers")
        if min(budget.block_tokens, budget.kv_bytes_per_token) < 1:
            raise ValueError("its budget has blocks without tokens, or tokens without bytes")
        return budget

    @property
    def weight_bytes(self) -> int:
        """Resident weights: replicated parts and this replica's share of the FFN layers."""
        return self.replicated_bytes + self.ffn_bytes

    @property
    def num_kv_blocks(self) -> int:
        return self.kv_bytes // (self.kv_bytes_per_token * self.block_tokens)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that every layer can keep."""
        return self.num_kv_blocks * self.block_tokens

    @property
    def kv_groups(self) -> KvGroups:
        return KvGroups(self.kv_group_tokens)

    def kv_tokens_of(self, row_tokens: int) -> int:
        """Tokens that the cache holds of rows of ``row_tokens`` tokens, as vLLM counts them.

        More than ``num_kv_tokens`` where layers keep only a window of each row.
        """
        blocks = -(-row_tokens // self.block_tokens)
        cost = self.kv_groups.row_tokens(row_tokens, self.block_tokens)
        return self.num_kv_tokens * blocks * self.block_tokens // cost

    def kv_tokens_text(self, row_tokens: int) -> str:
        """``kv_tokens_of``, for people."""
        return str(max(0, self.kv_tokens_of(row_tokens))) if self.kv_is_known else "not known"

    def kept_by_every_layer(self, num_tokens: int, row_tokens: int) -> int:
        """The inverse of ``kv_tokens_of``: the tokens that every layer could keep instead."""
        blocks = -(-row_tokens // self.block_tokens)
        cost = self.kv_groups.row_tokens(row_tokens, self.block_tokens)
        return num_tokens * cost // (blocks * self.block_tokens)


@dataclass(frozen=True)
class EngineOptions:
    """Engine options besides the pool. ``None`` leaves the choice to vLLM."""

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    served_model_names: tuple[str, ...]
    seed: int = 0
    prefix_caching: bool = True
    kv_dtype: str | None = None
    extra: tuple[str, ...] = ()


TokenKind = Literal["prompt", "output"]
"""Speed is told in output tokens, or in prompt tokens where nothing is generated."""


@dataclass(frozen=True)
class Prediction:
    """Predicted duration of a job on a cluster, when every row reaches its output limit.

    Answering the rows is expected to take between ``low_seconds`` and ``high_seconds``; start-up is
    not counted. A job that generates nothing has no output tokens.
    """

    cluster: str
    num_rows: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    low_seconds: float
    high_seconds: float

    @property
    def rated_by(self) -> TokenKind:
        return "output" if self.output_tokens else "prompt"

    @property
    def rated_tokens(self) -> int:
        """Tokens by which speed is told."""
        return self.output_tokens or self.prompt_tokens

    @property
    def tokens_per_second(self) -> float:
        return self.rated_tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.1f} {self.rated_by} tokens/s, {self.seconds:.1f} s "
            f"({self.low_seconds:.1f} to {self.high_seconds:.1f})"
        )


@dataclass(frozen=True)
class RunPlan:
    """A run of one model on equal replicas; each replica has a share, different within a group.

    ``made_for`` names the job that the plan was made for: files, or lengths.
    """

    model_dir: str
    budget: MemoryBudget
    shares: tuple[PoolShare, ...]
    cores: tuple[tuple[int, ...], ...]
    engine: EngineOptions
    layout: Layout | None = None
    prediction: Prediction | None = None
    made_for: str = ""

    @property
    def num_replicas(self) -> int:
        return len(self.shares)

    @property
    def shared_bytes(self) -> int:
        """Bytes that replicas of a pool share: all layers in it, and mailboxes for shipping."""
        if all(share.mode == "none" for share in self.shares):
            return 0
        width = self.layout.tensor_parallel if self.layout else 1
        mailboxes = sum(2 * (share.num_ranks - 1) * share.ship_bytes for share in self.shares)
        return width * self.num_replicas * self.budget.ffn_bytes + mailboxes

    def shipping_below(self, num_rows: int) -> RunPlan:
        """The same plan with ``num_rows`` as the threshold between shipping and streaming."""
        shares = tuple(replace(share, ship_below_rows=num_rows) for share in self.shares)
        return replace(self, shares=shares)

    def to_json(self) -> dict[str, Any]:
        shares = [share.to_json() for share in self.shares]
        return {"format": _FORMAT, "version": _VERSION, **asdict(self), "shares": shares}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RunPlan:
        """Build a plan from its JSON form.

        Raises KeyError, TypeError or ValueError for what ``to_json`` never writes.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"its \"format\" must be '{_FORMAT}'")
        if data.get("version") != _VERSION:
            raise ValueError(f"it has version {data.get('version')!r}, and this is for {_VERSION}")
        engine, layout, prediction = data["engine"], data.get("layout"), data.get("prediction")
        return RunPlan(
            model_dir=data["model_dir"],
            budget=MemoryBudget.from_json(data["budget"]),
            shares=tuple(PoolShare.from_json(share) for share in data["shares"]),
            cores=tuple(tuple(cores) for cores in data["cores"]),
            engine=EngineOptions(
                **{
                    **engine,
                    "served_model_names": tuple(engine["served_model_names"]),
                    "extra": tuple(engine["extra"]),
                }
            ),
            layout=Layout(**layout) if layout else None,
            prediction=Prediction(**prediction) if prediction else None,
            made_for=str(data.get("made_for", "")),
        )


def read_any_plan(path: Path) -> RunPlan:
    """Read a plan that ``elbowroom plan --json`` wrote. Raises InputError for anything else."""
    data = read_json(path)
    try:
        plan = RunPlan.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no plan of `elbowroom plan --json`: {error}") from error
    if plan.layout is None:
        raise InputError(f"{path} names no layout: make it again with `elbowroom plan --json`")
    return plan


def write_run_plan(path: Path, plan: RunPlan) -> None:
    """Write a plan as JSON, atomically. Raises OutputError."""
    write_json(path, plan.to_json())
