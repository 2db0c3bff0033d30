"""Every random draw as a function of (seed, visit, sample, purpose): no state to save, the same on any number of ranks.

A visit is how many times a sample has been drawn before: it plays the part of the epoch. Standard library only;
torch numbers are drawn from the same keys in data/dataset.py.
"""

import hashlib


def key_of(*parts: object) -> int:
    """A 63-bit number out of the parts. torch's CPU generator uses the low 32 bits of a seed."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*parts: object) -> float:
    """One number in [0, 1)."""
    return (key_of(*parts) >> 10) / 2**53  # 53 bits: a larger number could round up to 1
