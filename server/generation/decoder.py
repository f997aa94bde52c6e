"""A causal backbone that runs steps: some tokens of many sequences in one forward, keys and values kept in pages.

Packed where the family's attention can be replaced, else padded; which of the two, and whether at all, is found out
when the decoder is made: chunked and mixed steps must give the logits of plain forwards without any cache. A family
that cannot be right is refused by name.
"""

import inspect
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from adapters_store.errors import UnsupportedError
from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.packing import PACKED, attending
from server.generation import native_attention
from server.generation.attention import KVMemory, PagedAttention
from server.generation.graphs import GraphedDecode, StepBuffers
from server.generation.narrowing import last_block, narrowing
from server.generation.padded import PagedCache
from server.generation.pages import PAGE, PagePool, pages_for
from server.generation.plan import Chunk, Plan
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from server.generation.taped import RowBuffers, TapedDecode, plays_right

_PROBE_LENGTHS = (21, 5, 37)  # over, within and at the border of pages
_FAILURES = (ValueError, RuntimeError, IndexError, TypeError, KeyError, AttributeError, NotImplementedError)


class Decoder:
    """Runs plans on one backbone. Not thread-safe: it lives on the engine's thread."""

    def __init__(self, language: LanguageModel, *, kv_bytes: int, max_length: int | None = None) -> None:
        """kv_bytes: memory for keys and values; max_length: longest sequence, prompt and output, in tokens.

        Raises UnsupportedError for a family that cannot be served right, ValueError for too little memory, or for more
        than the system gives.
        """
        self.language = language
        self.encoder = language.encoder
        config: Any = self.encoder.model.config
        self._accepts = set(inspect.signature(self.encoder.model.forward).parameters)
        self.is_packed = config._attn_implementation == PACKED  # noqa: SLF001  # no public way to ask
        self._last: tuple[list[tuple[int, Mix | None]], MixedBatch] | None = None
        self.graphs: GraphedDecode | TapedDecode | None = None
        self.forward_s = 0.0  # spent in the model, in all
        self._last_block = last_block(self.encoder) if self.is_packed else None
        self.memory = self._probed_narrow(config) or self._probed(config)
        has_tapes = self._plays_right()
        num_pages = kv_bytes // self.memory.page_bytes
        self.max_length = min(max_length or self.encoder.max_length, self.encoder.max_length, num_pages * PAGE)
        if self.max_length < PAGE:
            raise ValueError(
                f"{kv_bytes} bytes of KV memory are {num_pages} pages of {PAGE} tokens "
                f"({self.memory.page_bytes} bytes each): too few for any request"
            )
        try:
            self.memory = self.memory.resized(num_pages)
        except (RuntimeError, OSError, OverflowError) as error:
            raise ValueError(f"the system does not give {kv_bytes} bytes of KV memory: {error}") from error
        self.graphs = self._taped(self.max_length) if has_tapes else None

    def use_graphs(self, *, captures: bool) -> None:
        """Run steps of single tokens over static buffers from now on; captures: as CUDA graphs."""
        self.graphs = GraphedDecode(
            self._over_buffers, self.encoder.sites, idle_page=self.memory.idle_page, captures=captures
        )

    @property
    def attention_path(self) -> str:
        """Which form of attention serves decoding rows, for people."""
        if not self.is_packed:
            return "the model's own, over padded rows"
        if self.encoder.device.type != "cpu":
            return f"torch on {self.encoder.device}"
        if not native_attention.supports(self.encoder.dtype, self.encoder.device):
            return f"torch, in {str(self.encoder.dtype).removeprefix('torch.')}"
        return native_attention.status().detail

    @property
    def decoding_path(self) -> str:
        """How steps of single tokens run, for people."""
        if self.graphs is None:
            return "through the model's own code"
        name = "CUDA graphs" if isinstance(self.graphs, GraphedDecode) else "tapes of what the model computes"
        return name if self.graphs.failure is None else f"{name}, not everywhere: {self.graphs.failure}"

    @property
    def is_narrowed(self) -> bool:
        """True if the last block runs for the tokens that choose only (narrowing.py)."""
        return self._last_block is not None

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read: 0 to this, exclusive."""
        model: Any = self.encoder.model
        return int(model.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()  # what torch does behind every small call to be ready for gradients adds up
    def forward(self, plan: Plan) -> Tensor:
        """(choosing, vocab_size) float32: logits behind the last token of each chunk that is its sequence's last."""
        start = time.perf_counter()
        logits = self.graphs.logits(plan, self._batch(plan.rows)) if self.graphs and plan.is_decode else None
        if logits is None:
            logits = self._eager(plan)
        self.forward_s += time.perf_counter() - start
        return logits

    @torch.inference_mode()
    def likeliest(self, plan: Plan) -> Tensor | None:
        """(choosing,) int64: the first token of the highest of the same logits, by less work than all of them are.

        -1 where the highest is not a finite number. None, and nothing is computed, where there is no such way.
        """
        if isinstance(self.graphs, GraphedDecode) or not self.language.finds_likeliest(len(plan.choosing)):
            return None
        start = time.perf_counter()
        tokens = self.graphs.likeliest(plan, self._batch(plan.rows)) if self.graphs and plan.is_decode else None
        if tokens is None:
            tokens = self._eager(plan, likeliest=True)
        self.forward_s += time.perf_counter() - start
        return tokens

    def _eager(self, plan: Plan, *, likeliest: bool = False) -> Tensor:
        hidden = self._packed(plan) if self.is_packed else self._padded(plan)
        if not plan.choosing:
            return hidden.new_zeros(0, 1).float()
        if len(hidden) > len(plan.choosing):
            hidden = hidden.index_select(0, torch.tensor(plan.choosing, device=hidden.device))
        return self._ahead(hidden, likeliest=likeliest)

    def _ahead(self, hidden: Tensor, *, likeliest: bool) -> Tensor:
        """What hidden states (n, d) say of the next tokens: the likeliest (n,), or the logits (n, vocab_size)."""
        return self.language.likeliest(hidden) if likeliest else self.language.logits(hidden)

    def _over_buffers(self, buffers: StepBuffers | RowBuffers, batch: MixedBatch, likeliest: bool = False) -> Tensor:
        """What is ahead of each row; launches only, nothing waits for the device."""
        ids, positions = buffers.ids[None], buffers.positions[None] + self.encoder.first_position
        made = ids.new_ones(1, 1, 1, 1)  # a mask of this shape is taken as it is; else the model looks at the positions
        with self.encoder.sites.mixing(batch), attending(PagedAttention(self.memory, cast(Plan, buffers))):
            hidden = self._model(input_ids=ids, position_ids=positions, attention_mask=made, use_cache=False)
        return self._ahead(hidden, likeliest=likeliest)

    def _packed(self, plan: Plan) -> Tensor:
        """(tokens, d) hidden states in one forward, or (choosers, d) where the last block is narrowed."""
        batch, attention = self._batch(plan.rows), PagedAttention(self.memory, plan)
        narrow: AbstractContextManager[None] = nullcontext()
        if self._last_block is not None and plan.num_tokens > len(plan.choosing):
            narrow = narrowing(self._last_block, self.encoder, attention)
        with self.encoder.sites.mixing(batch), attending(attention), narrow:
            positions = plan.positions[None] + self.encoder.first_position
            return self._model(input_ids=plan.ids[None], position_ids=positions, use_cache=False)

    def _batch(self, rows: list[tuple[int, Mix | None]]) -> MixedBatch:
        """The batch of these rows; the last step's, with all that was worked out about it, if they are the same."""
        if self._last and len(rows) == len(self._last[0]):
            known, batch = self._last
            if all(a[0] == b[0] and a[1] is b[1] for a, b in zip(rows, known, strict=True)):
                return batch
        batch = MixedBatch.of(rows, self.encoder.num_layers, self.encoder.device)
        self._last = (rows, batch)
        return batch

    def _padded(self, plan: Plan) -> Tensor:
        """The same in a forward for each longer chunk, whose pages the next may look at, then one for all singles."""
        longer = [self._padded_group([chunk]) for chunk in plan.chunks[plan.num_singles :]]
        singles = [self._padded_group(plan.chunks[: plan.num_singles])] if plan.num_singles else []
        return torch.cat([*singles, *longer])

    def _padded_group(self, chunks: list[Chunk]) -> Tensor:
        cache = PagedCache(self.memory, chunks)
        ids = [chunk.sequence.ids[chunk.past : chunk.end] for chunk in chunks]
        inputs = {"input_ids": torch.tensor(ids, device=self.encoder.device), "attention_mask": cache.attention_mask}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = cache.position_ids
        batch = self._batch([(chunk.count, chunk.sequence.mix) for chunk in chunks])
        with self.encoder.sites.mixing(batch):
            return self._model(**inputs, past_key_values=cache, use_cache=True)

    def _model(self, **inputs: Any) -> Tensor:
        """(tokens, d), rows side by side."""
        model: Any = self.encoder.model
        hidden: Tensor = model(**inputs).last_hidden_state
        return hidden.flatten(0, 1)

    def _probed_narrow(self, config: Any) -> KVMemory | None:
        """The same as `_probed`; None where it holds for the whole last block only, if at all."""
        if self._last_block is not None:
            try:
                return self._probed(config)
            except UnsupportedError:
                self._last_block = None
        return None

    def _probed(self, config: Any) -> KVMemory:
        """Memory as the probe left it, which tells the size of a page. Raises UnsupportedError."""
        family = f"{type(self.language.model).__name__} ({config.model_type})"
        num_pages = sum(pages_for(length) for length in _PROBE_LENGTHS)
        self.memory = KVMemory(num_pages, self.encoder.dtype, self.encoder.device)
        try:
            apart = max(self._probe(), default=float("inf"))
        except _FAILURES as error:
            raise UnsupportedError(f"{family} cannot generate here: {type(error).__name__}: {error}") from error
        tolerance = 5e-5 if self.encoder.dtype == torch.float32 else 0.05
        if not apart <= tolerance or not self.memory.layers:
            raise UnsupportedError(
                f"{family} cannot generate here: step by step its logits are off by {apart:.2g} of the largest "
                "(it keeps a state other than keys and values, or attends in a way of its own)"
            )
        return self.memory

    def _probe(self) -> list[float]:
        """Differences between steps and plain forwards, relative to the largest logit."""
        pool = PagePool(self.memory.num_pages)
        apart, sequences = [], []
        for n, length in enumerate(_PROBE_LENGTHS):
            sequences.append(self._probe_sequence(n, length, pool.take(pages_for(length)) or []))
        for counts in ((16, 0, 9), (3, 5, 1), (1, 0, 26), (1, 0, 1)):  # chunks, single tokens, both at once
            chunks = [Chunk(s, s.computed, n) for s, n in zip(sequences, counts, strict=True) if n]
            plan = Plan(chunks, self.encoder.device)
            logits = self.forward(plan)
            for chunk in chunks:
                chunk.sequence.computed = chunk.end
            ended = [chunk.sequence for chunk in plan.chunks if chunk.is_last]
            apart += self._differences(logits, ended)
        return apart

    def _taped(self, max_length: int) -> TapedDecode:
        return TapedDecode(self._over_buffers, self.encoder.sites, most_pages=pages_for(max_length))

    @torch.inference_mode()
    def _plays_right(self) -> bool:
        """True if decode steps from a tape give the logits of the usual way, bit for bit."""
        if not self.is_packed or not native_attention.supports(self.encoder.dtype, self.encoder.device):
            return False
        prompts = [self._probe_sequence(n, length, [2 * n, 2 * n + 1]) for n, length in enumerate((17, 28))]
        self._eager(Plan([Chunk(prompt, 0, prompt.num_prompt) for prompt in prompts], self.encoder.device))
        steps = []
        for more in (1, 2, 3):
            longer = [self._probe_sequence(n, one.num_prompt + more, one.pages) for n, one in enumerate(prompts)]
            steps.append(Plan([Chunk(one, one.num_prompt - 1, 1) for one in longer], self.encoder.device))
        try:
            return plays_right(self._taped(2 * PAGE), steps, self._eager)
        except _FAILURES:  # an operator may do without what it is told to write into, and not with it
            return False

    def _probe_sequence(self, n: int, length: int, pages: list[int]) -> TokenSequence:
        vocab = self.language.vocab_size
        ids = [(7 * i + 13 * n + 11) % (vocab - 2) + 1 for i in range(length)]
        sequence = TokenSequence(ids, None, Draw(Sampling(), ids, vocab), max_tokens=1)
        sequence.pages = pages
        return sequence

    def _differences(self, logits: Tensor, ended: Sequence[TokenSequence]) -> list[float]:
        with torch.inference_mode():
            expected = [self.language.logits(self.encoder.states([s.ids], [None])[0][-1:])[0] for s in ended]
        return [
            float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
            for found, wanted in zip(logits, expected, strict=True)
        ]
