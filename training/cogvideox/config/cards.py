"""Lists the cards for which --dry_run predicts a run without having one: memory and rates.

The row of the H100 was measured: products of 17776 x 3072 x 12288, copies of pinned memory, and attention of 48 heads
of 64 and 17776 tokens at the rate of complete steps. That is 0.92 of the rate of a short measurement, because the card
reaches its power limit (``kernels_ms`` in benchmarks/results/bench_5b-*.json). All other rows are derived from
published specifications: memory, dense bf16 TFLOP/s with fp32 sums, bandwidth, and the generation of PCI Express. Of
these, training reaches shares: of arithmetic and of bandwidth the shares that the H100 reaches, of PCI Express 0.8, and
in attention the shares that FlashAttention 2 reaches on an A100 with heads of 64. So their seconds are rough: cooling,
power limits and slower slots of the mainboard change them.

The rate of tensors that two cards exchange was measured on two H200 with NVLink, which the H100 has, too. That of the
A100 is 2/3 of it. Cards without NVLink exchange at the rate of a copy: half of a tensor goes through the host.
This module needs only the standard library.
"""

from dataclasses import dataclass

MATMUL_SHARE = 0.73  # 725 of the 989 TFLOP/s of an H100
MEMORY_SHARE = 0.84  # 2.8 of its 3.35 TB/s
ATTENTION_SHARES = (0.6, 0.5)  # of forward and of backward
PCIE_SHARE = 0.8
BOTH_WAYS = 1.6  # both directions of copies together, relative to one: 1.58 for the host of an H100, 1.74 of an H200
NVLINK_3, NVLINK_4 = 1.6e11, 2.4e11  # bytes/s of tensors that two cards exchange
PCIE_4, PCIE_4_X8, PCIE_5 = 31.5, 15.75, 63.0  # GB/s in one direction


@dataclass(frozen=True)
class Card:
    """Holds what a prediction needs to know about a GPU.

    Attributes:
        gib: Memory in GiB.
        matmul: FLOP/s of bf16 matrix products.
        attention: FLOP/s of attention in forward and backward, by backend; the fastest backend is first.
        memory: Bytes/s of the card's memory.
        copies: Bytes/s between host and card, in one direction.
        exchange: Bytes/s of tensors that two cards exchange for --sequence_parallel.
    """

    gib: float
    matmul: float
    attention: dict[str, tuple[float, float]]
    memory: float
    copies: float
    exchange: float


def specified(
    gib: float, tflops: float, gb_per_second: float, pcie: float, backend: str = "flash", exchange: float | None = None
) -> Card:
    """Returns a card by its published specifications: memory, dense bf16 TFLOP/s, and the GB/s of memory and bus."""
    forward, backward = (share * tflops * 1e12 for share in ATTENTION_SHARES)
    memory, copies = MEMORY_SHARE * gb_per_second * 1e9, PCIE_SHARE * pcie * 1e9
    return Card(gib, MATMUL_SHARE * tflops * 1e12, {backend: (forward, backward)}, memory, copies, exchange or copies)


HOPPER = {"flash-4": (526e12, 497e12), "cudnn": (394e12, 396e12), "flash": (295e12, 254e12)}
CARDS = {
    "rtx3060": specified(12, 25.5, 360, PCIE_4),
    "rtx3090": specified(24, 71, 936, PCIE_4),
    "rtx4060ti": specified(16, 44, 288, PCIE_4_X8),
    "rtx4070": specified(12, 58, 504, PCIE_4),
    "rtx4080": specified(16, 97.5, 717, PCIE_4),
    "rtx4090": specified(24, 165, 1008, PCIE_4),
    "rtx5090": specified(32, 209.5, 1792, PCIE_5, "cudnn"),
    "a6000": specified(48, 155, 768, PCIE_4),
    "l40s": specified(45, 362, 864, PCIE_4),  # of 48, because error correction takes a part
    "a100-40": specified(40, 312, 1555, PCIE_4, exchange=NVLINK_3),
    "a100": specified(80, 312, 2039, PCIE_4, exchange=NVLINK_3),
    "h100": Card(79.6, 725e12, HOPPER, 2.8e12, 51.6e9, NVLINK_4),
    "h200": Card(140, 725e12, HOPPER, MEMORY_SHARE * 4.8e12, 51.6e9, NVLINK_4),
}
