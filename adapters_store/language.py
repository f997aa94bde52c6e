"""A causal language model: an Encoder over its backbone, and the head that makes logits of hidden states.

Training (the loss on completions), the golden examples of generating adapters and the server's generation all read
logits here. Adapters act in the backbone; the head is the model's own and is never adapted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store import likeliest, linear_layers, memory
from adapters_store.encoder import Encoder, Rows
from adapters_store.errors import UnsupportedError
from adapters_store.likeliest import Screen
from adapters_store.mixing import Mix
from adapters_store.packing import packed
from adapters_store.places import in_eval

MAX_LOGITS = 1 << 24  # 64 MiB in float32: with a vocabulary of 128,000 the logits of 131 tokens at a time


class LanguageModel:
    """A frozen causal model, ready to run mixed batches. Not thread-safe: one batch at a time."""

    def __init__(self, model: nn.Module, *, pad_id: int = 0, keeps_reference: bool = False) -> None:
        """model: an AutoModelForCausalLM. Raises UnsupportedError, naming the family, if its logits are not ours."""
        causal: Any = in_eval(model)
        self.model = model
        self.encoder = Encoder(causal.base_model, pad_id=pad_id, keeps_reference=keeps_reference)
        self._projection: nn.Module = causal.get_output_embeddings()
        config = causal.config
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._screen: Screen | None = None
        self._check(causal)

    @property
    def vocab_size(self) -> int:
        """Logits per token; a tokenizer may know fewer tokens."""
        projection: Any = self._projection
        return int(projection.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32 of hidden states (n, hidden_size)."""
        layer = self._projection
        projected = linear_layers.forward(layer, hidden) if type(layer) is nn.Linear else layer(hidden)
        logits: Tensor = projected.float()
        logits = logits if self._factor == 1 else logits * self._factor
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def finds_likeliest(self, rows: int) -> bool:
        """True if `likeliest` serves so many rows, and is less work than their logits."""
        return self._screen is not None and self._screen.pays(rows)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """The first token of the highest logit behind hidden states (n, hidden_size): (n,) int64.

        -1 where the highest is not a finite number. For as many rows as `finds_likeliest`; raises MemoryError.
        """
        assert self._screen is not None, "our bug: not asked before"
        return self._screen.likeliest(hidden)

    @property
    def greedy_path(self) -> str:
        """How the likeliest token is found, for people."""
        if self._screen is None and likeliest.status().active:
            return "from all logits: the head is small, not laid out, or logits are more than its products"
        if self._screen is not None and self._screen.is_given_up:
            return "from all logits: 8-bit weights exclude too few of this backbone's"
        return likeliest.status().detail

    @torch.no_grad()
    def lay_out(self) -> bool:
        """Lay out the linear layers of backbone and head for the CPU's kernel; see Encoder.lay_out."""
        encoder, head = self.encoder, [self._projection] if type(self._projection) is nn.Linear else []
        layers = [*encoder.sites.linear_layers, *head]
        encoder.is_laid_out = linear_layers.lay_out(self.model, layers, lambda: self.logits(encoder.run_probe()))
        self._screen = self._screened()
        return encoder.is_laid_out

    def _screened(self) -> Screen | None:
        """What finds the likeliest token of a head that is laid out, where logits are its plain products."""
        strips = linear_layers.strips_of(self._projection)
        is_plain = getattr(self._projection, "bias", None) is None and self._factor == 1 and self._softcap is None
        if strips is None or not is_plain or not likeliest.supports(strips.words.dtype, self.encoder.device):
            return None
        with memory.side_by_side(strips.words.numel()):
            return Screen.of(strips)

    def logprobs(
        self, rows: Rows, mixes: Sequence[Mix | None], starts: Sequence[int], *, reference: bool = False,
        max_logits: int = MAX_LOGITS,
    ) -> list[Tensor]:  # fmt: skip
        """Log-probability of each row's own tokens from position starts[i] >= 1 on, in one forward.

        max_logits: numbers that exist at once. Returns (length - start,) float32 per row, natural logarithm.
        """
        states = self.encoder.states(rows, mixes, reference=reference)
        predicting = [state[start - 1 : -1] for state, start in zip(states, starts, strict=True)]
        wanted = [token for row, start in zip(rows, starts, strict=True) for token in row[start:]]
        hidden, targets = torch.cat(predicting), torch.tensor(wanted, device=self.encoder.device)
        size = max(1, max_logits // self.vocab_size)
        pieces = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        chosen = torch.cat([self._logprobs_of(states, tokens) for states, tokens in pieces])
        return list(torch.split(chosen, [len(state) for state in predicting]))

    def _logprobs_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens (n,) behind hidden states (n, hidden_size)."""
        shares = torch.log_softmax(self.logits(hidden), dim=-1)  # (n, vocab_size)
        return shares.gather(1, tokens[:, None])[:, 0]

    @torch.no_grad()
    def _check(self, causal: Any) -> None:
        """Our logits must be those of the model's own forward."""
        row = [(7 * i + 11) % (self.vocab_size - 2) + 1 for i in range(9)]
        ids = torch.tensor([row], device=self.encoder.device)
        with packed([len(row)]):
            expected = causal(input_ids=ids, use_cache=False).logits[0].float()
        found = self.logits(self.encoder.states([row], [None])[0])
        tolerance = 1e-3 if self.encoder.dtype == torch.float32 else 0.05
        if not (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0):
            raise UnsupportedError(
                f"{type(causal).__name__}: its logits are not its output embedding of the last hidden state, "
                "so this family cannot generate here"
            )
