"""What a sequence's own past and its logit_bias change in its logits.

For every token that is concerned, and for no other, in this order:

    x = x / repetition if x >= 0 else x * repetition      tokens of the prompt and the output (CTRL, 4.1; transformers)
    x = x - count * frequency - presence                  tokens of the output, count: how often each came (OpenAI)
    x = x + bias                                          tokens that logit_bias names (OpenAI)

A sequence keeps a table with one line per such token, of which a new token changes one; nothing is as long as the
vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Table = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class Penalties:
    """The table of one sequence. A line: a token, what its logit is divided or multiplied by, what is added to it."""

    def __init__(
        self,
        prompt: Sequence[int],
        bias: Mapping[int, float],
        vocab_size: int,
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        self._remembers = repetition != 1 or presence != 0 or frequency != 0
        repeated = prompt if repetition != 1 else ()
        # An embedding may know tokens that the head cannot give.
        tokens = [token for token in dict.fromkeys([*bias, *repeated]) if 0 <= token < vocab_size]
        self._bias = bias
        self._counts: dict[int, int] = {}
        self._lines = {token: line for line, token in enumerate(tokens)}
        self._ids = np.array(tokens, np.int64)
        seen = set(repeated)
        self._factors = np.array([repetition if token in seen else 1 for token in tokens], np.float32)
        self._shifts = np.array([bias.get(token, 0) for token in tokens], np.float32)

    def copy(self) -> "Penalties":
        """The same table, to go its own way."""
        found = copy.copy(self)
        vars(found).update({name: copy.copy(value) for name, value in vars(self).items()})
        return found

    @property
    def table(self) -> Table:
        """Ids, factors and shifts, each (lines,). Views: they hold until the next note."""
        lines = len(self._lines)
        return self._ids[:lines], self._factors[:lines], self._shifts[:lines]

    def note(self, token: int) -> None:
        """Count a token of the output."""
        if not self._remembers:
            return
        count = self._counts[token] = self._counts.get(token, 0) + 1
        line = self._lines.setdefault(token, len(self._lines))
        if line == len(self._ids):
            self._grow()
        self._ids[line] = token
        self._factors[line] = self._repetition
        self._shifts[line] = self._bias.get(token, 0) - count * self._frequency - self._presence

    def _grow(self) -> None:
        """Twice the room, so that a long output costs one copy per token, amortised."""
        room = 2 * len(self._ids) + 32
        self._ids = np.resize(self._ids, room)
        self._factors = np.resize(self._factors, room)
        self._shifts = np.resize(self._shifts, room)


def penalise(logits: Tensor, penalties: Mapping[int, Penalties]) -> None:
    """Change rows of logits (n, vocab), contiguous, in place, each by its own penalties."""
    tables = [one.table for one in penalties.values()]
    starts = np.array(list(penalties), np.int64) * logits.shape[1]
    places = np.concatenate([start + ids for start, (ids, _, _) in zip(starts, tables, strict=True)])
    at = torch.from_numpy(places).to(logits.device)  # (lines of all,), in the flat logits
    factors = torch.from_numpy(np.concatenate([table[1] for table in tables])).to(logits.device)
    shifts = torch.from_numpy(np.concatenate([table[2] for table in tables])).to(logits.device)
    x = logits.view(-1).gather(0, at)
    logits.view(-1).scatter_(0, at, torch.where(x < 0, x * factors, x / factors).add_(shifts))
