"""completions: a task that generates. The model itself gives each token of the completion a probability.

loss = -sum over t in completion of log p(x_t | x_1 … x_t-1);  a target per token of the completion and the end of text

The prompt's tokens are read and never targets. A row longer than max_length loses the beginning of its prompt (the
tokenizer's own first tokens stay), so that completions are trained on whole; a completion too long even for that is cut
at its end and then teaches no end of text. Both are counted. Nothing is trained beside the adapter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapters_store.completions import joined_ids, prompt_ids
from adapters_store.encoder import Encoder
from adapters_store.language import LanguageModel
from adapters_store.manifest import GenerationSpec, GoldenExample
from adapters_store.mixing import Mix
from training.backbone import LoadedBackbone
from training.errors import DataError
from training.examples import Pair, Split, paired
from training.objectives.base import Answers, Asked, Cuts, Objective, Score, Texts

NUM_GOLDEN = 3
_MAX_LOGITS = 1 << 24  # 64 MiB in float32: with a vocabulary of 128,000 the logits of 131 tokens at a time


class Completions(Objective):
    """See the module."""

    accuracy_name = "token_accuracy"
    headline = "loss"

    def __init__(self, backbone: LoadedBackbone, max_length: int) -> None:
        super().__init__(min(max_length, backbone.encoder.max_length), "mean")
        self._tokenizer, self._language = backbone.tokenizer, backbone.causal

    def texts(self, split: Split) -> Texts:
        """Prompts with their completions and the end of text. Raises DataError for a pair without a target."""
        beginning = len(prompt_ids(self._tokenizer, ""))
        joined = [self._joined(pair) for pair in paired(split)]
        fitted = [_fit(ids, start, beginning, self.max_length) for ids, start in joined]
        cuts = Cuts(
            prompts=sum(now < start for (_, now), (_, start) in zip(fitted, joined, strict=True)),
            completions=sum(
                len(kept) - now < len(ids) - start for (kept, now), (ids, start) in zip(fitted, joined, strict=True)
            ),
            longest=max((len(ids) for ids, _ in joined), default=0),
        )
        return Texts([ids for ids, _ in fitted], [start for _, start in fitted], cuts=cuts)

    def _joined(self, pair: Pair) -> tuple[list[int], int]:
        ids, start = joined_ids(self._tokenizer, pair.prompt, pair.completion)
        if len(ids) <= start:
            raise DataError(f"prompt {pair.prompt!r} with completion {pair.completion!r} has no token to learn")
        return ids, start

    def counts(self, texts: Texts) -> list[int]:
        """Tokens of the completion, end of text included."""
        return [len(row) - start for row, start in zip(texts.rows, texts.targets, strict=True)]

    @staticmethod
    def read(encoder: Encoder, asked: Sequence[Asked]) -> list[Tensor]:
        """(targets, hidden_size) per task: of each target the state before it, which predicts it; rows side by side."""
        rows = [row for part in asked for row in part.texts.rows]
        states = iter(encoder.states(rows, [part.mix for part in asked for _ in part.texts.rows]))
        return [torch.cat([next(states)[start - 1 : -1] for start in part.texts.targets]) for part in asked]

    def answers(self, found: Tensor, texts: Texts) -> Answers:
        """From the hidden states (targets, hidden_size) that predict the completions' tokens."""
        wanted = [token for row, start in zip(texts.rows, texts.targets, strict=True) for token in row[start:]]
        losses, right = self._of_tokens(found, torch.tensor(wanted, device=found.device))
        row_of = torch.repeat_interleave(torch.tensor(self.counts(texts), device=found.device))
        empty = losses.new_zeros(len(texts))
        return Answers(empty.index_add(0, row_of, losses), empty.index_add(0, row_of, right.to(losses.dtype)))

    def _of_tokens(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(targets,) losses and whether the most likely token is right.

        The logits of a few tokens exist at a time; the backward pass computes them again instead of keeping them.
        """
        size = max(1, _MAX_LOGITS // self._language.vocab_size)
        pieces = list(zip(torch.split(hidden, size), torch.split(wanted, size), strict=True))
        if len(pieces) == 1:
            return _of_few(self._language, hidden, wanted)
        found = [checkpoint(_of_few, self._language, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat([losses for losses, _ in found]), torch.cat([right for _, right in found])

    def beats(self, score: Score, best: Score) -> bool:
        """A lower loss."""
        return score.loss < best.loss

    @torch.no_grad()
    def golden(self, encoder: Encoder, mix: Mix | None, split: Split) -> list[GoldenExample]:
        """The shortest pairs that fit the model, each token of the completion with its log-probability."""
        ordered = sorted(paired(split), key=lambda pair: (len(pair.prompt) + len(pair.completion), pair.fields))
        examples = []
        for pair in ordered[:NUM_GOLDEN]:
            ids, start = joined_ids(self._tokenizer, pair.prompt, pair.completion)
            if len(ids) <= encoder.max_length:
                [logprobs] = self._language.logprobs([ids], [mix], [start])
                found = tuple(logprobs.tolist())
                examples.append(GoldenExample(text=pair.prompt, completion=pair.completion, logprobs=found))
        return examples

    def generation(self, texts: Sequence[Texts]) -> GenerationSpec:
        """As many tokens as the longest completion has."""
        return GenerationSpec(max_tokens=max(count for part in texts for count in self.counts(part)))

    def describe(self, texts: Texts) -> str:
        """How long completions are."""
        return f"completions of up to {max(self.counts(texts))} tokens"


def _of_few(language: LanguageModel, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    logits = language.logits(hidden)  # (targets, vocab_size)
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=-1) == wanted


def _fit(ids: list[int], start: int, beginning: int, limit: int) -> tuple[list[int], int]:
    """A row and where its completion starts, in at most `limit` tokens: the beginning, then the end of the prompt."""
    if len(ids) <= limit:
        return ids, start
    first = ids[: max(1, min(beginning, start))]
    room = max(0, limit - len(first) - (len(ids) - start))
    kept = first + ids[max(len(first), start - room) : start]
    return (kept + ids[start:])[:limit], len(kept)
