"""Which adapters a recorded decoding step can serve, and what must stay as it is for that.

A recorded step (a CUDA graph, a tape) calls a low-rank kernel at every site that has such adapters. The kernel finds
them by slot in the site's table, so adapters come and go under it; other primitives choose what to run by looking at
the batch, which a recording does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Bank
from adapters_store.sites import Sites

# A bank's table if the kernel serves all that is resident in it; its `layout` tells what calls depend on
TableOf = Callable[[Bank], Any]


@dataclass(frozen=True)
class Layout:
    """What recorded calls of adapters depend on besides their buffers.

    sites: all of them. tables: those that have low-rank adapters, and the layout of their tables. slots: some of each
    of these, any will do. others: slots that have more than such adapters.
    """

    sites: tuple[str, ...]
    tables: tuple[tuple[str, object], ...]
    slots: tuple[int, ...] = field(compare=False)
    others: frozenset[int] = field(compare=False)

    @staticmethod
    def of(sites: Sites, table_of: TableOf) -> "Layout":
        """The layout as it is."""
        banks = [(name, bank, table_of(bank)) for name, site in sites.items() for bank in site.banks.values()]
        others = frozenset(slot for _, bank, table in banks if table is None for slot in bank.slots)
        slots, tables = set(), []
        for name, bank, table in banks:
            own = next((slot for slot in bank.slots if slot not in others), None)
            if table is not None and own is not None:
                slots.add(own)
                tables.append((name, table.layout))
        return Layout(tuple(sites), tuple(tables), tuple(sorted(slots)), others)

    def serves(self, batch: MixedBatch) -> bool:
        """True if low-rank kernels are all that the batch needs."""
        return self.others.isdisjoint(batch.active)

    def standing(self, rows: int, sites: Sites) -> MixedBatch:
        """The batch that sites see while a step of single tokens is recorded: it makes all of them call."""
        mix = Mix(self.slots, np.ones((len(self.slots), sites.num_layers), np.float32)) if self.slots else None
        return MixedBatch.of([(rows, mix)], sites.num_layers, sites.device)
