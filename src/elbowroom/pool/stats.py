"""Counters of a pool, as the replica keeps them and as the live view and the report show them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class PoolStats:
    """Counters of one replica since its start. They add up over the parts of a pool.

    ``owned_bytes``, ``mapped_bytes`` and ``slot_bytes`` are weights that it holds or sees now;
    ``streamed_bytes`` counts every copy. ``wait_seconds`` is how long compute waited for weights,
    or for rows that it had shipped, which includes the owner's compute. Iterations are counted by
    how borrowed layers were run.
    """

    owned_bytes: int = 0
    mapped_bytes: int = 0
    slot_bytes: int = 0
    streamed_bytes: int = 0
    streamed_iterations: int = 0
    shipped_iterations: int = 0
    shipped_rows: int = 0
    served_rows: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: PoolStats) -> PoolStats:
        return PoolStats(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )

    def after(self, before: PoolStats) -> PoolStats:
        """Counters of a replica that was started again, whose earlier process had ``before``.

        They tell what it holds now, and all that both processes did.
        """
        counted = {
            field.name: getattr(before, field.name) + getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("owned_bytes", "mapped_bytes", "slot_bytes")
        }
        return replace(self, **counted)
