"""In which order the native kernel goes through a batch: panels of tokens, in each its adapters, for each its tokens.

A panel is what one thread works on at a time. A mix with many tokens has panels of its own: they use the same adapters,
so each of their outputs is read and written once. Tokens of mixes that have few, such as those of decoding rows, share
panels, so that an adapter's factors, which are what costs there, are read once for all who use it.
Results do not depend on it: a token's sums run in the order of its own adapters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.mixing import MixedBatch

PANEL = 256  # tokens of a panel at most; PANEL in lowrank.c
LONG = 64  # tokens of a panel of one mix at most
FEW = 16  # tokens that are worth a panel of their own

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Panels:
    """The tables of the C struct `plan`; the last row of panels and groups says where the one before ends."""

    panels: Table  # (panels + 1, 2) first token, first group
    tokens: Table  # (tokens,) row of x and y
    groups: Table  # (groups + 1, 2) slot, first use
    uses: Table  # (uses, 2) index into tokens, index into the weights

    @staticmethod
    def of(batch: MixedBatch, threads: int) -> "Panels":
        """Panels for the tokens that have a mix; for each thread one, if there are tokens enough."""
        tokens, mix, starts, panel = _cut(batch, threads)
        num_pairs = np.diff(batch.mix_offset)[mix]  # (tokens,)
        token = np.repeat(np.arange(len(tokens)), num_pairs)  # (uses,)
        begin = np.cumsum(num_pairs) - num_pairs
        pair = np.arange(len(token)) + np.repeat(batch.mix_offset[mix] - begin, num_pairs)
        key = panel[token] * (batch.max_slot + 1) + batch.pair_slot[pair]
        order = np.argsort(key, kind="stable")
        key = key[order]
        first_use = np.flatnonzero(np.diff(key, prepend=-1))  # (groups,)
        panel_of_group, slot = np.divmod(key[first_use], batch.max_slot + 1)
        first_group = np.searchsorted(panel_of_group, np.arange(len(starts) + 1))
        return Panels(
            _table(np.append(starts, len(tokens)), first_group),
            tokens,
            _table(np.append(slot, 0), np.append(first_use, len(key))),
            _table(token[order], pair[order]),
        )


def _cut(batch: MixedBatch, threads: int) -> tuple[Table, Table, Table, Table]:
    """Tokens in the order of panels and the mix of each; the first token of each panel, and the panel of each token."""
    is_long = batch.tokens_of_mix >= FEW  # (mixes,)
    tokens = np.flatnonzero(batch.mix_of_token >= 0)
    key = (np.arange(len(is_long)) + len(is_long) * is_long)[batch.mix_of_token[tokens]]  # the long ones last
    order = np.argsort(key, kind="stable")
    tokens, key = tokens[order], key[order]
    mix = batch.mix_of_token[tokens]
    at = np.arange(len(tokens))
    num_short = int(np.count_nonzero(key < len(is_long)))
    short = min(PANEL, max(1, -(-num_short // threads)))
    long = min(LONG, max(FEW, -(-(len(tokens) - num_short) // threads)))
    is_start = np.where(at < num_short, at % short, (at - np.searchsorted(key, key)) % long) == 0
    return tokens, mix, np.flatnonzero(is_start), np.cumsum(is_start) - 1


def _table(*columns: Table) -> Table:
    """The columns side by side, as C has them."""
    return np.ascontiguousarray(np.stack(columns, axis=1))
