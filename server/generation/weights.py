"""Distributions over tokens as whole numbers: exact sums, so that nothing depends on who sums in which order.

A choice must not change with what runs beside it, and sums of floats do: batch shape and device decide their order. A
token's weight is therefore a whole number,

    weight = round(2^S * exp((x - max(x)) / temperature)),  S = 52 - bits of the vocabulary's size,

held in float32 (24 bits are as many as exp gives) and summed in float64, where sums below 2^53 are exact in any order.
What is lost are tokens with less than 2^-S of the best one's probability; S is 36 for 50k tokens.

Every cut (top_k, top_p, min_p) keeps the tokens of at least some weight, so equals share their fate. So does
transformers' top_k; its top_p parts equals by the order of an unstable sort.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # tokens per block; maxima and running sums look through blocks first, then through one block
WINDOW = 256  # top_p looks among so many of the heaviest tokens first; to sort 8192 takes twice as long


def likeliest(x: Tensor) -> Tensor:
    """The first token of the highest logit: (n, vocab) -> (n,).

    Torch's argmax is not vectorised on CPU: it takes 4 times as long for 64 rows of 8192.
    """
    block = torch.cat([part.amax(-1) for part in _blocks(x)], 1).argmax(1, keepdim=True)
    ids = _ids_of_block(block, x.shape[1])
    return ids.gather(1, x.gather(1, ids).argmax(1, keepdim=True)).squeeze(1)


def weigh(x: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Weights (n, vocab) float32 of logits x (n, vocab), each row at its temperature."""
    slopes = torch.tensor([[math.log2(math.e) / temperature] for temperature in temperatures], device=x.device)
    powers = (x - x.amax(-1, keepdim=True)).mul_(slopes)
    return _exp2(powers).mul_(_scale(x.shape[1])).round_()


def _exp2(powers: Tensor) -> Tensor:
    """2^powers, in place, the same bits wherever in a batch a number stands.

    On CPU by numpy: torch's exp2 gives other bits at the end of a thread's share, where numbers do not fill a vector;
    its exp takes twice as long.
    """
    if powers.is_cuda:
        return powers.exp2_()
    np.exp2(powers.numpy(), out=powers.numpy())
    return powers


def _scale(vocab_size: int) -> float:
    """The heaviest weight in every row, 2^S: a vocabulary of them sums to less than 2^52."""
    return 2.0 ** (52 - vocab_size.bit_length())


def cut(weights: Tensor, least: Tensor) -> None:
    """Set to 0, in place, the weights (n, vocab) below least (n, 1), whole numbers both.

    By w + w * clamp(w - least, -1, 0): comparing with a broadcast side is not vectorised and takes 4 times as long.
    """
    weights.addcmul_(weights, (weights - least).clamp_(-1, 0))


def least_by_share(weights: Tensor, min_p: Sequence[float]) -> Tensor:
    """The lightest weight (n, 1) that may stay if it has at least min_p of the heaviest one's."""
    scale = _scale(weights.shape[1])
    return torch.tensor([[math.ceil(scale * share)] for share in min_p], dtype=torch.float32, device=weights.device)


def least_by_rank(weights: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """The lightest weight (n, 1) that top_k (0: all) and then top_p keep of weights (n, vocab)."""
    k = torch.tensor(top_k, device=weights.device).unsqueeze(1)
    p = torch.tensor(top_p, dtype=torch.float64, device=weights.device).unsqueeze(1)
    mass = _block_sums(weights).sum(1, keepdim=True)
    vocab_size = weights.shape[1]
    width = min(vocab_size, max(WINDOW, 1 + max(top_k)))
    least, is_inside = _least_of_nucleus(_heaviest(weights, width), mass, k, p)
    if width < vocab_size and not bool(is_inside.all()):
        rest = (~is_inside).nonzero()[:, 0]
        least[rest], _ = _least_of_nucleus(_heaviest(weights[rest], vocab_size), mass[rest], k[rest], p[rest])
    return least


def _heaviest(weights: Tensor, width: int) -> Tensor:
    """The heaviest weights (n, width), heaviest first."""
    if weights.is_cuda:
        return weights.topk(width).values
    array = weights.numpy()
    if width < array.shape[1]:  # partition and sort are vectorised in numpy; torch's topk takes 8 times as long
        array = np.partition(array, -width, axis=1)[:, -width:]
    return torch.from_numpy(np.sort(array, axis=1)[:, ::-1].copy())


def _least_of_nucleus(heaviest: Tensor, mass: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The lightest weight that stays, and whether it is certain that no weight outside the window decides: (n, 1) both.

    heaviest: (n, width), heaviest first. mass: (n, 1), of the whole row. k, p: (n, 1).
    """
    has_k = k > 0
    cut(heaviest, heaviest.gather(1, k.clamp(1, heaviest.shape[1]) - 1) * has_k)
    sums = _block_sums(heaviest)
    mass_inside = sums.sum(1, keepdim=True)
    # A token stays while those before it have less than p of the mass. In whole numbers: at most ceil(p * mass) - 1.
    target = (p * torch.where(has_k, mass_inside, mass)).ceil_().sub_(1).clamp_(min=0)
    rank = _passing(heaviest, sums, target)
    goes_on = has_k & (heaviest[:, -1:] > 0)  # equals of the k-th may lie outside
    return heaviest.gather(1, rank), (mass_inside > target) & ~goes_on


def inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of weights (n, vocab) passes this part of the whole, and whether it does.

    uniform: (n,) in [0, 1). Returns (n,) and (n,) bool: False for rows of zeros or NaN, whose token means nothing.
    """
    sums = _block_sums(weights)
    mass = sums.sum(1, keepdim=True)
    target = torch.minimum((uniform.unsqueeze(1) * mass).floor_(), mass - 1)
    return _passing(weights, sums, target).squeeze(1), (mass >= 1).squeeze(1)


def _passing(weights: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """The first place (n, 1) in weights (n, d) at which the running sum exceeds target (n, 1). sums: of the blocks."""
    ends = sums.cumsum(1)  # (n, blocks)
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    target = target - ends.gather(1, block) + sums.gather(1, block)
    ids = _ids_of_block(block, weights.shape[1])
    ends = weights.gather(1, ids).cumsum(1, dtype=torch.float64)  # (n, BLOCK)
    return ids.gather(1, torch.searchsorted(ends, target, right=True).clamp_(max=BLOCK - 1))


def _block_sums(weights: Tensor) -> Tensor:
    """(n, d) -> (n, blocks) float64."""
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in _blocks(weights)], 1)


def _blocks(x: Tensor) -> list[Tensor]:
    """Views (n, blocks, d) of x (n, vocab): the whole blocks, and the shorter one at the end if there is one."""
    whole = x.shape[1] // BLOCK * BLOCK
    parts = [x[:, :whole].view(len(x), whole // BLOCK, BLOCK), x[:, whole:].unsqueeze(1)]
    return [part for part in parts if part.numel()]


def _ids_of_block(block: Tensor, size: int) -> Tensor:
    """Places (n, BLOCK) in each row's block (n, 1) of rows of this size.

    Where the last block is shorter, its last place again and again: it comes too late to be first in anything.
    """
    return (block * BLOCK + torch.arange(BLOCK, device=block.device)).clamp_(max=size - 1)
