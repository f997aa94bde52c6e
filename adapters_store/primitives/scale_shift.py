"""scale_shift: delta = (scale - 1) * y + shift, so that one adapter alone gives scale * y + shift.

Tensors: scale (d_out,), shift (d_out,); one of them may be left out. Source: SSF, Lian et al. 2022 (arXiv 2210.08823);
also IA3's output scaling and bias tuning. Cost: two vectors per site.
"""

import torch
from torch import Tensor

from adapters_store.errors import KeysError
from adapters_store.primitives.affine import AffineBank
from adapters_store.primitives.base import Entry, Place, Primitive, check_names, check_shape, wide


def check(place: Place, entry: Entry) -> None:
    """Raises KeysError or ShapeError if the entry does not fit the place."""
    check_names(entry, set(), {"scale", "shift"}, set())
    if not entry.tensors:
        raise KeysError(f"scale_shift at {entry.site} needs 'scale', 'shift' or both")
    for name in entry.tensors:
        check_shape(entry, name, (place.d_out,))


def delta(place: Place, entry: Entry, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001  # one signature for all
    """(scale - 1) * y + shift. y: (tokens, d_out); returns (tokens, d_out) float32."""
    gain, shift = _parts(entry)
    return gain * wide(y) + shift


def _parts(entry: Entry) -> tuple[Tensor, Tensor]:
    some = wide(next(iter(entry.tensors.values())))
    scale, shift = entry.tensors.get("scale"), entry.tensors.get("shift")
    gain = torch.zeros_like(some) if scale is None else wide(scale) - 1
    return gain, torch.zeros_like(some) if shift is None else wide(shift)


class ScaleShiftBank(AffineBank):
    """Gain scale - 1 on the site's output."""

    def prepare(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """(scale - 1, shift), float32 on the device."""
        gain, shift = _parts(entry)
        return gain.to(self.device), shift.to(self.device)

    def source(self, x: Tensor, y: Tensor) -> Tensor:
        """The output itself."""
        return wide(y)


PRIMITIVE = Primitive("scale_shift", check, delta, ScaleShiftBank)
