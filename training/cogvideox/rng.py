"""Computes every random number as a function of (seed, visit, sample, purpose).

There is therefore no random state to save, and the numbers are the same on any number of ranks. The visit is the number
of times that a sample has been used before, and takes the place of the epoch. data/dataset.py seeds the generators of
torch with the same keys. This module needs only the standard library.
"""

import hashlib


def key_of(*parts: object) -> int:
    """Returns a 63-bit hash of the parts. The CPU generator of torch uses only the low 32 bits of a seed."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*parts: object) -> float:
    """Returns a number in [0, 1) that is determined by the parts."""
    return (key_of(*parts) >> 10) / 2**53  # 53 bits: a larger number could round up to 1
