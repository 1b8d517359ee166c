"""Hardware facts: devices and the links between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import tomli_w

from elbowroom.core.errors import InputError


@dataclass(frozen=True)
class Rate:
    """A peak rate per second, and the fraction of it that real kernels reach."""

    peak: float
    fraction: float = 1.0

    @property
    def achieved(self) -> float:
        return self.peak * self.fraction


@dataclass(frozen=True)
class MatmulPoint:
    """Measured speed of a matrix product with ``rows`` rows, in weight elements per second."""

    rows: int
    elements_per_second: float


@dataclass(frozen=True)
class Device:
    """One device: rates in FLOP/s and bytes/s, memory in bytes, fixed costs in seconds.

    ``matmul`` is empty for presets; a product then takes the larger of the time to read its weights
    and the time for its FLOPs. ``copies_overlap`` means that a copy engine works beside the
    kernels; where it is False (a CPU core), a copy costs compute time. ``maps_peers`` means that
    kernels read a peer's memory as fast as their own.
    """

    name: str
    memory_bytes: int
    memory_fraction: float
    flops: Rate
    flops_fp8: Rate
    memory_bandwidth: Rate
    attention_flops: Rate
    attention_bandwidth: Rate
    elementwise_bandwidth: Rate
    layer_seconds: float
    iteration_seconds: float
    row_seconds: float
    copies_overlap: bool = True
    maps_peers: bool = False
    matmul: tuple[MatmulPoint, ...] = ()

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.memory_fraction)

    def with_rates(self, change: Callable[[Rate], Rate], factor: float) -> Device:
        """A copy of the device with ``change`` applied to every rate.

        Measured products take ``factor`` times as long.
        """
        points = (MatmulPoint(p.rows, p.elements_per_second / factor) for p in self.matmul)
        return replace(
            self,
            flops=change(self.flops),
            flops_fp8=change(self.flops_fp8),
            memory_bandwidth=change(self.memory_bandwidth),
            attention_flops=change(self.attention_flops),
            attention_bandwidth=change(self.attention_bandwidth),
            elementwise_bandwidth=change(self.elementwise_bandwidth),
            matmul=tuple(points),
        )

    def matmul_seconds(
        self, rows: float, read: float, active: float, read_bytes: float, is_fp8: bool = False
    ) -> float:
        """Seconds for a product of ``rows`` rows with a matrix in this device's memory.

        Args:
            rows: rows (tokens) of the left side.
            read: weight elements that are read.
            active: weight elements that each row is multiplied with; equals ``read`` except in
                mixtures of experts.
            read_bytes: their bytes.
            is_fp8: whether the product is computed at the FP8 rate.

        """
        if not read:  # a layer without such a network
            return 0.0
        if self.matmul:
            # In a mixture each row meets only part of the weights read: per matrix, this many rows
            # on average.
            return read / self._elements_per_second(rows * active / read)
        flops = self.flops_fp8 if is_fp8 else self.flops
        return max(
            read_bytes / self.memory_bandwidth.achieved,
            2 * rows * active / flops.achieved,
        )

    def _elements_per_second(self, rows: float) -> float:
        """Weight elements per second of a product with ``rows`` rows, from the measured points.

        Seconds per element are interpolated linearly between points, and beyond the last point grow
        in proportion to ``rows``.
        """
        points = [point.rows for point in self.matmul]
        seconds = [1 / point.elements_per_second for point in self.matmul]
        if rows > points[-1]:
            return points[-1] / (rows * seconds[-1])
        return 1 / float(np.interp(rows, points, seconds))


@dataclass(frozen=True)
class Link:
    """A link that joins devices at one level of the hierarchy.

    ``num_devices`` devices reach each other; each sends with ``bandwidth`` bytes/s and receives
    with the same. In a ``mesh`` that is the bandwidth between each two of them. A ``network`` leads
    out of a node. ``latency_seconds`` is the time from requesting a small message to having it.
    """

    name: str
    num_devices: int
    bandwidth: Rate
    latency_seconds: float
    mesh: bool = False
    network: bool = False

    def transfer_seconds(self, num_bytes: float) -> float:
        """Seconds to move ``num_bytes``: latency plus bytes / bandwidth (alpha-beta model)."""
        return self.latency_seconds + num_bytes / self.bandwidth.achieved

    def all_reduce_seconds(self, num_bytes: float, num_devices: int) -> float:
        """Seconds to all-reduce ``num_bytes`` over p devices: the better of one shot and a ring.

        In one shot each device reads the buffers of the p-1 others. A ring sends 2 (p-1) messages
        of n/p bytes (Thakur et al. 2005, alpha-beta). In a mesh all links of a device work at once.
        """
        if num_devices == 1:
            return 0.0
        others = num_devices - 1
        num_bytes /= others if self.mesh else 1
        one_shot = self.transfer_seconds(others * num_bytes)
        ring = 2 * others * self.transfer_seconds(num_bytes / num_devices)
        return min(one_shot, ring)


@dataclass(frozen=True)
class Cluster:
    """Equal devices, and their links from the nearest level to the farthest.

    ``uncertainty`` is the relative error of times computed from these facts; it sets the width of a
    prediction's interval. ``sources`` says where the numbers come from.
    """

    name: str
    num_devices: int
    device: Device
    links: tuple[Link, ...]
    uncertainty: float = 0.35
    sources: dict[str, str] = field(default_factory=dict, hash=False)

    def link(self, num_devices: int) -> Link:
        """The nearest level that joins ``num_devices`` devices. Raises InputError if none does."""
        for link in self.links:
            if link.num_devices >= num_devices:
                return link
        raise InputError(
            f"{self.name} has no link that joins {num_devices} devices: add one to its [[links]]"
        )

    @property
    def node_devices(self) -> int:
        """Number of devices that reach each other without a network."""
        return max((link.num_devices for link in self.links if not link.network), default=1)

    def of_nodes(self, name: str, num_nodes: int, node_devices: int) -> Cluster:
        """A cluster of ``num_nodes`` nodes with ``node_devices`` such devices each.

        This cluster is one whole node: links that join no more than its devices stay in a node, and
        others join nodes. Raises InputError for more devices than a node, or the links, can have.
        """
        total = num_nodes * node_devices
        if not 0 < node_devices <= self.num_devices:
            raise InputError(
                f"{name}: a node has 1 to {self.num_devices} devices of {self.name}; give "
                f"{self.name}-2x{self.num_devices} for two nodes"
            )
        links: list[Link] = []
        joined = 1
        for link in self.links:
            there = node_devices if link.num_devices <= self.num_devices else total
            if (reached := min(link.num_devices, there)) > joined:
                links.append(replace(link, num_devices=reached))
                joined = reached
        if joined < total or num_nodes < 1:
            most = self.links[-1].num_devices // node_devices
            raise InputError(f"{name}: give 1 to {most} nodes of {node_devices}")
        return replace(self, name=name, num_devices=total, links=tuple(links))

    def with_memory(self, memory_bytes: int) -> Cluster:
        """The same cluster, with ``memory_bytes`` usable by the engine on each device."""
        device = replace(self.device, memory_bytes=memory_bytes, memory_fraction=1.0)
        return replace(self, device=device)

    def slowed(self, factor: float) -> Cluster:
        """The same cluster with everything a device does taking ``factor`` times as long."""

        def slower(rate: Rate) -> Rate:
            return replace(rate, fraction=rate.fraction / factor)

        device = self.device.with_rates(slower, factor)
        slow = replace(
            device,
            layer_seconds=device.layer_seconds * factor,
            iteration_seconds=device.iteration_seconds * factor,
            row_seconds=device.row_seconds * factor,
        )
        return replace(self, device=slow)

    def to_toml(self) -> str:
        """The cluster as TOML text, which ``read_cluster`` reads back as an equal cluster."""
        table = asdict(self)
        table["device"]["memory"] = table["device"].pop("memory_bytes")
        return tomli_w.dumps(table)
