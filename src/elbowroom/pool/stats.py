"""What a pool counts: in the replica that counts it, in the live view and in the report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class PoolStats:
    """Counters of one replica since its start. Bytes mapped count once, streamed at every copy.

    ``wait_seconds`` is how long compute waited for weights, or for rows that it had shipped, which
    includes the owner's compute. Iterations are counted by how borrowed layers were run.
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

    def after(self, before: PoolStats) -> PoolStats:
        """Of a replica that was started again: what it holds now, and all that both lives did."""
        counted = {
            field.name: getattr(before, field.name) + getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("owned_bytes", "mapped_bytes", "slot_bytes")
        }
        return replace(self, **counted)
