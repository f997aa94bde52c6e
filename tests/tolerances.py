"""How close two ways to compute the same must come, by dtype, relative to the largest number of the output."""

import torch
from torch import Tensor

# float32: sums in another order. bfloat16 (8 bits): roundings of hidden values, of each adapter's delta and of the sum.
OUTPUT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
    """Both are the same numbers to the dtype's tolerance, times a factor for deep chains of sums."""
    assert found.shape == expected.shape
    scale = expected.float().abs().max().clamp(min=1.0)
    apart = (found.float() - expected.float()).abs().max() / scale
    assert apart <= factor * OUTPUT[dtype], f"apart by {apart:.2e} of the output's scale"


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Both are the same bit for bit: signs of zeros and payloads of NaNs included."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert found.dtype == expected.dtype
    assert torch.equal(found.contiguous().view(whole), expected.contiguous().view(whole))
