"""What a cluster is made of: accelerators, and the links between them, as their makers publish them."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ltd.errors import ConfigError

MOST_GPUS = 1 << 20
DEFAULTED = ("product_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency", "usable_memory",
             "fused", "overlap", "scatter_cost")
"""Entries that have a default; all but the last are shares."""


@dataclass(frozen=True)
class Cluster:
    """Rates are for one accelerator and one direction; GB is 10^9 bytes.

    Args:
        gpus: accelerators in all.
        gpu: name of the kind.
        memory_gb: of one accelerator.
        peak_tflops: dense products in 16 bits.
        memory_gb_per_second: of its memory.
        gpus_per_node: that share the fast links.
        node_gb_per_second: to others of its node.
        network_gb_per_second: to other nodes.
        product_efficiency: share of the peak that large matrix products reach.
        attention_efficiency: the same of fused attention.
        memory_efficiency: share of the memory's rate that elementwise operations reach.
        link_efficiency: share of a link's rate that collectives reach.
        usable_memory: share of the memory that tensors may take; the rest is for the driver, libraries and fragments.
        fused: share of the memory traffic between products that a compiler leaves.
        overlap: share of a stage's computation that can hide data-parallel communication.
        scatter_cost: bytes that a reduce-scatter moves, as a multiple of a ring's; 2 for an all-reduce, as in gloo.
    """

    gpus: int
    gpu: str
    memory_gb: float
    peak_tflops: float
    memory_gb_per_second: float
    gpus_per_node: int
    node_gb_per_second: float
    network_gb_per_second: float
    product_efficiency: float = 0.75
    attention_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    usable_memory: float = 0.92
    fused: float = 1.0
    overlap: float = 0.8
    scatter_cost: float = 1.0

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gb * 1e9 * self.usable_memory)

    def link(self, group: int, stride: int) -> float:
        """Bytes a second at which a collective runs over a group of processes.

        Args:
            group: number of processes.
            stride: distance between the numbers of neighbours.
        """
        if group * stride <= self.gpus_per_node:
            return self.node_gb_per_second * 1e9 * self.link_efficiency
        # Rings over several nodes use the adapters of all members on a node.
        members = max(1, self.gpus_per_node // stride)
        return min(self.node_gb_per_second, self.network_gb_per_second * members) * 1e9 * self.link_efficiency

    def message_link(self, group: int) -> float:
        """Bytes a second at which each process of a group of neighbours sends to others of it, all at once."""
        return self.link(group, 1 if group <= self.gpus_per_node else self.gpus_per_node)


GPUS: dict[str, dict[str, Any]] = {
    "v100": {"memory_gb": 32, "peak_tflops": 125, "memory_gb_per_second": 900, "gpus_per_node": 8,
             "node_gb_per_second": 150, "network_gb_per_second": 12.5},
    "a100-40": {"memory_gb": 40, "peak_tflops": 312, "memory_gb_per_second": 1555, "gpus_per_node": 8,
                "node_gb_per_second": 300, "network_gb_per_second": 25},
    "a100": {"memory_gb": 80, "peak_tflops": 312, "memory_gb_per_second": 2039, "gpus_per_node": 8,
             "node_gb_per_second": 300, "network_gb_per_second": 25},
    "h100": {"memory_gb": 80, "peak_tflops": 989, "memory_gb_per_second": 3350, "gpus_per_node": 8,
             "node_gb_per_second": 450, "network_gb_per_second": 50,
             "product_efficiency": 0.65, "attention_efficiency": 0.35},
    "h100-pcie": {"memory_gb": 80, "peak_tflops": 756, "memory_gb_per_second": 2000, "gpus_per_node": 8,
                  "node_gb_per_second": 64, "network_gb_per_second": 50,
                  "product_efficiency": 0.65, "attention_efficiency": 0.35},
    "h200": {"memory_gb": 141, "peak_tflops": 989, "memory_gb_per_second": 4800, "gpus_per_node": 8,
             "node_gb_per_second": 450, "network_gb_per_second": 50,
             "product_efficiency": 0.65, "attention_efficiency": 0.35},
    "b200": {"memory_gb": 180, "peak_tflops": 2250, "memory_gb_per_second": 8000, "gpus_per_node": 8,
             "node_gb_per_second": 900, "network_gb_per_second": 50,
             "product_efficiency": 0.65, "attention_efficiency": 0.35},
    "mi300x": {"memory_gb": 192, "peak_tflops": 1307, "memory_gb_per_second": 5300, "gpus_per_node": 8,
               "node_gb_per_second": 448, "network_gb_per_second": 50, "product_efficiency": 0.55},
}
"""Data sheets of the makers, for machines of eight with one network adapter for each accelerator (V100: 100 Gb/s, A100:
200 Gb/s, later ones 400 Gb/s). Efficiencies are ours: what large products reach of the peak under the power limit;
attention on NVIDIA's newer ones is that of FlashAttention-2 on H100 (https://arxiv.org/abs/2407.08608)."""


def peak_tflops(device_name: str) -> float | None:
    """Dense 16-bit peak of an accelerator by the name that its driver gives it, in TFLOP/s; None for others."""
    kinds = [kind for kind in GPUS if all(word in device_name.lower() for word in kind.split("-"))]
    return float(GPUS[max(kinds, key=len)]["peak_tflops"]) if kinds else None


def known_cluster(gpus: int, gpu: str) -> Cluster:
    """A cluster of a known kind of accelerator.

    Raises:
        ConfigError: the kind is unknown, or there are none.
    """
    if gpu.lower() not in GPUS:
        raise ConfigError(f"--gpu = {gpu.strip() or repr(gpu)}: not in the table; use {', '.join(GPUS)}, or describe "
                          "it in a --cluster file")
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus = {gpus}: must be from 1 to {MOST_GPUS}; give the number of accelerators")
    return Cluster(gpus, gpu.lower(), **GPUS[gpu.lower()])


def read_cluster(path: Path, gpus: int | None) -> Cluster:
    """The cluster that a TOML file describes: fields of `Cluster`; with `gpu` of the table the others may be left out.

    Args:
        gpus: in place of the file's number.

    Raises:
        ConfigError: everything that is wrong with the file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cluster = {path}: cannot be read as TOML: {error}; correct the file") from error
    kinds = {field.name: field.type for field in fields(Cluster)}
    problems = [f"{name}: no entry of a cluster; known are {', '.join(kinds)}" for name in content if name not in kinds]
    for name, value in content.items():
        if name == "overlap" and value == 0 and not isinstance(value, bool):
            continue  # nothing hides communication
        if name in kinds and name != "gpu" and (isinstance(value, bool) or not isinstance(value, int | float)
                                                or not 0 < value < 1e9):
            problems.append(f"{name} = {value!r}: must be a number above 0 and below 1e9")
        elif name in DEFAULTED[:-1] and not 0 < value <= 1:
            problems.append(f"{name} = {value!r}: a share, so at most 1")
        elif name in ("gpus", "gpus_per_node") and not isinstance(value, int):
            problems.append(f"{name} = {value!r}: must be a whole number")
    kind = content.get("gpu", "accelerator")
    if not isinstance(kind, str):
        problems.append(f"gpu = {kind!r}: must be the name of a kind")
    known = GPUS.get(kind.lower(), {}) if isinstance(kind, str) else {}
    missing = f" (gpu = {kind} is not in the table: {', '.join(GPUS)})" if "gpu" in content and not known else ""
    values = {**known, **content, "gpu": kind} | ({"gpus": gpus} if gpus is not None else {})
    required = [field.name for field in fields(Cluster) if field.name not in (*DEFAULTED, "gpu")]
    problems += [f"{name} is missing" + (": give it, or --gpus" if name == "gpus" else missing)
                 for name in required if name not in values]
    if problems:
        raise ConfigError(f"--cluster = {path}: " + "; ".join(problems) + "; correct the file")
    if not 1 <= values["gpus"] <= MOST_GPUS:
        raise ConfigError(f"--cluster = {path}: gpus = {values['gpus']}: must be from 1 to {MOST_GPUS}; give the "
                          "number of accelerators")
    return Cluster(**values)
