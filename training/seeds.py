"""Random generators that depend on what they are for and on nothing else.

A generator made of (seed, task, purpose, epoch) gives a task the same values whichever other tasks train along, and a
resumed run needs no random state in its checkpoint.
"""

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the parts' text."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def permutation(size: int, *parts: object) -> list[int]:
    """0 … size - 1 in an order that the parts decide."""
    order: list[int] = torch.randperm(size, generator=generator(*parts)).tolist()
    return order
