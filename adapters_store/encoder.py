"""One forward of the backbone over rows of any lengths and mixes, to pooled hidden states.

Packed where the model's attention goes through the model library's attention interface and packing gives the same
hidden states as padding (found out by a probe when the encoder is made), padded otherwise. The model is any
AutoModel-like module; this file needs its forward's signature and its config, and imports no model library.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from adapters_store import linear_layers, rotary
from adapters_store.errors import UnsupportedError
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.packing import PACKED, packed, runs_of
from adapters_store.places import in_eval
from adapters_store.sites import Sites, exclude_odd

Rows = Sequence[Sequence[int]]


class Encoder:
    """A frozen backbone with its sites, ready to run mixed batches. Not thread-safe: one batch at a time."""

    def __init__(self, model: nn.Module, *, pad_id: int = 0, keeps_reference: bool = False) -> None:
        """model: an AutoModel-like backbone without a task head; it is frozen and put into evaluation mode."""
        config: Any = model.config
        self.model = in_eval(model)
        self.hidden_size = int(config.hidden_size)
        self.sites = Sites(model, self.hidden_size, keeps_reference=keeps_reference)
        self.num_layers = self.sites.num_layers
        self.device, self.dtype = self.sites.device, self.sites.dtype
        if self.device.type == "cpu":
            rotary.install(model)
        self.pad_id = pad_id
        self.pooler = _take_pooler(model)
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.first_position = _first_position(model)
        self._windows: set[int] = set()  # of attention in the last packed forward
        self._probe = _probe_rows(int(config.vocab_size), pad_id)
        self.is_packed = self._try_packing()
        self.is_laid_out = False
        with torch.no_grad():
            exclude_odd(self.sites, self.run_probe, self.tokens_run([len(row) for row in self._probe]))

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        config: Any = self.model.config
        names = ("max_position_embeddings", "n_positions", "seq_length")  # the last one is Bloom's
        positions = next((int(found) for name in names if (found := getattr(config, name, None))), 512)
        return min(positions, _unscaled_positions(config) or positions) - self.first_position

    def tokens_run(self, lengths: Sequence[int]) -> int:
        """Tokens that a batch of rows of these lengths computes, padding included."""
        return sum(lengths) if self.is_packed else len(lengths) * max(lengths, default=0)

    def pool(
        self, rows: Rows, mixes: Sequence[Mix | None], poolings: Sequence[str], *, reference: bool = False
    ) -> Tensor:
        """Pooled hidden states of each row under its mix, in one forward.

        rows: token ids; mixes: one per row, None for the bare backbone; poolings: "mean", "cls", "last" or "pooler".
        Returns (rows, hidden_size) float32. reference=True runs the slow specification (needs keeps_reference).
        """
        order = self.order(rows, mixes)
        lengths = [len(rows[i]) for i in order]
        batch = MixedBatch.of([(len(rows[i]), mixes[i]) for i in order], self.num_layers, self.device)
        ordered = [rows[i] for i in order]
        hidden = self._packed(ordered, batch, reference) if self.is_packed else self._padded(ordered, batch, reference)
        pooled = self._pool_runs(hidden, lengths, [poolings[i] for i in order], batch, reference)
        place = torch.empty(len(order), dtype=torch.int64)
        place[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return pooled.index_select(0, place.to(self.device))

    def states(self, rows: Rows, mixes: Sequence[Mix | None], *, reference: bool = False) -> list[Tensor]:
        """Hidden states of each row's tokens under its mix, (length, hidden_size) each, in one forward."""
        order = self.order(rows, mixes)
        batch = MixedBatch.of([(len(rows[i]), mixes[i]) for i in order], self.num_layers, self.device)
        run = self._packed if self.is_packed else self._padded
        pieces = torch.split(run([rows[i] for i in order], batch, reference), [len(rows[i]) for i in order])
        by_row = dict(zip(order, pieces, strict=True))
        return [by_row[i] for i in range(len(rows))]

    def order(self, rows: Rows, mixes: Sequence[Mix | None]) -> list[int]:
        """In what order rows run: by length, so that neighbours share attention calls.

        With gradients first by mix, so that neighbours share an adapter's products too (primitives/differentiable.py).
        """
        of_mix = {id(mix): n for n, mix in enumerate(mixes)} if torch.is_grad_enabled() else {}
        return sorted(range(len(rows)), key=lambda i: (of_mix.get(id(mixes[i]), 0), len(rows[i])))

    def _packed(self, rows: Rows, batch: MixedBatch, reference: bool) -> Tensor:
        """(tokens, d) hidden states, rows side by side."""
        lengths = [len(row) for row in rows]
        ids = torch.tensor([[token for row in rows for token in row]], device=self.device)  # (1, tokens)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(self.device) + self.first_position
        with self.sites.mixing(batch, reference=reference), packed(lengths) as self._windows:
            return self._forward(input_ids=ids, position_ids=positions)[0]

    def _padded(self, rows: Rows, batch: MixedBatch, reference: bool) -> Tensor:
        """(tokens, d) hidden states, rows side by side, padding taken out again."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad_id)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        padded = batch.with_lengths([ids.shape[1]] * len(rows))
        with self.sites.mixing(padded, reference=reference):
            hidden = self._forward(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return hidden[mask.bool().to(self.device)]

    def _forward(self, **inputs: Tensor) -> Tensor:
        config: Any = self.model.config
        if "token_type_ids" in self._accepts and getattr(config, "type_vocab_size", None):
            # only where they have a table of their own: GPT-2 looks token types up among its word embeddings
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        switches: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepts else {}
        model: Any = self.model
        hidden: Tensor | None = getattr(model(**inputs, **switches), "last_hidden_state", None)
        if hidden is None:
            raise UnsupportedError(f"{type(model).__name__} gives no hidden states; give a model without a task head")
        return hidden

    def _pool_runs(
        self, hidden: Tensor, lengths: Sequence[int], poolings: Sequence[str], batch: MixedBatch, reference: bool
    ) -> Tensor:
        """(rows, d) float32 from packed hidden states; equal rows sum in equal order whatever their neighbours."""
        pieces, row = [], 0
        for start, count, length in runs_of(lengths):
            states = hidden[start : start + count * length].view(count, length, -1)
            pieces.append(_pool(states, poolings[row : row + count]))
            row += count
        pooled = torch.cat(pieces)
        if "pooler" not in poolings:
            return pooled
        if self.pooler is None:
            raise ValueError("this backbone has no pooler; pool with 'mean', 'cls' or 'last'")
        with self.sites.mixing(batch.with_lengths([1] * len(lengths)), reference=reference):
            through = self.pooler(pooled[:, None].to(self.dtype)).float().view_as(pooled)
        chosen = torch.tensor([pooling == "pooler" for pooling in poolings], device=self.device)
        return torch.where(chosen[:, None], through, pooled)

    def _try_packing(self) -> bool:
        """True if packing gives what padding gives; leaves the model set up for the way that serves."""
        model: Any = self.model
        if "position_ids" not in self._accepts or not hasattr(model, "set_attn_implementation"):
            return False
        usual = model.config._attn_implementation  # noqa: SLF001  # the library has no public way to ask
        batch = MixedBatch.of([(len(row), None) for row in self._probe], self.num_layers, self.device)
        with torch.no_grad():
            expected = self._padded(self._probe, batch, reference=False)
            model.set_attn_implementation(PACKED)
            if self._agrees(self._probe, batch, expected):
                return True
        model.set_attn_implementation(usual)
        return False

    def _agrees(self, rows: Rows, batch: MixedBatch, expected: Tensor) -> bool:
        try:
            found = self._packed(rows, batch, reference=False)
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError, AttributeError):
            return False  # this family's forward cannot be packed; padding serves it
        if _has_windows(self.model.config) and not self._windows:
            return False  # its windows are in its masks only, which packed attention does not read
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.05
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))

    @torch.no_grad()
    def lay_out(self) -> bool:
        """Lay out linear layers for the CPU's kernel (linear_layers.py): for serving, where no weight is trained.

        Returns whether any are laid out.
        """
        self.is_laid_out = linear_layers.lay_out(self.model, self.sites.linear_layers, self.run_probe)
        return self.is_laid_out

    def run_probe(self) -> Tensor:
        """(n, d) hidden states of a few rows without mixes, and what the pooler makes of them if there is one."""
        batch = MixedBatch.of([(len(row), None) for row in self._probe], self.num_layers, self.device)
        hidden = (self._packed if self.is_packed else self._padded)(self._probe, batch, reference=False)
        if self.pooler is None:
            return hidden
        tokens = self.tokens_run([len(row) for row in self._probe])
        repeated = hidden.repeat(2, 1)[:tokens]  # as many as the sites count, padding included
        return torch.cat([hidden, self.pooler(repeated[:, None])])


def _probe_rows(vocab_size: int, pad_id: int) -> list[list[int]]:
    """Three rows of different lengths without padding tokens."""
    rows = [[(7 * i + 3 * n + 11) % (vocab_size - 2) + 1 for i in range(n)] for n in (5, 9, 9)]
    return [[token if token != pad_id else token + 1 for token in row] for row in rows]


def _has_windows(config: Any) -> bool:
    """True if some layers look only so far back, or within chunks."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any(kind in ("sliding_attention", "chunked_attention") for kind in types)
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _first_position(model: nn.Module) -> int:
    """Position of a row's first token: RoBERTa and its kin begin behind their embedding's padding_idx."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _unscaled_positions(config: Any) -> int | None:
    """Positions up to which LongRoPE (Phi-3 128k) keeps its factors; None for other models.

    Beyond, the model library changes them for the whole batch by its longest row, and rows would see their neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found) if found else None


def _take_pooler(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The model's pooler, taken out of its forward: it would pool the packed sequence as if it were one row.

    It takes (rows, length, d) and gives (rows, d).
    """
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    model.pooler = None  # type: ignore[assignment]
    activation = getattr(model, "pooler_activation", None)
    if isinstance(pooler, nn.Linear) and isinstance(activation, nn.Module):  # ALBERT keeps the two apart
        dense = pooler
        return lambda states: activation(dense(states[:, 0]))
    return pooler


def _pool(states: Tensor, poolings: Sequence[str]) -> Tensor:
    """states: (rows, length, d) of equal length; returns (rows, d) float32."""
    first, last = states[:, 0].float(), states[:, -1].float()
    if set(poolings) <= {"cls", "pooler"}:
        return first
    mean = states.float().mean(dim=1)
    by_name = {"mean": mean, "last": last, "cls": first, "pooler": first}
    if len(set(poolings)) == 1:
        return by_name[poolings[0]]
    return torch.stack([by_name[pooling][i] for i, pooling in enumerate(poolings)])
