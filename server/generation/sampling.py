"""The next token of every sequence: its row of logits and its own settings in, one token out.

A row is changed by its penalties (penalties.py), divided by the temperature, cut by top_k, then top_p, then min_p, with
the meaning and in the order that transformers gives them; one uniform number then picks among what is left, by inverse
CDF in the order of the token ids (weights.py). What a row does not ask for it does not pay for.

A choice depends on its row and its draw alone, bit for bit, whatever runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from server.generation import weights
from server.generation.penalties import Penalties, penalise

GREEDY = 1e-5  # a temperature below this is 0


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers has it
    presence_penalty: float = 0.0  # over the output, as OpenAI has it
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None  # None: none wanted; n: the chosen token's and the n most likely ones'


@dataclass(frozen=True)
class Chosen:
    """A token; if asked for, its log-probability in the model's own distribution, and the likeliest tokens' own."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """One sequence's state: its penalties' counts and its own random numbers. Survives preemption."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, like: "Draw | None" = None) -> None:
        """like: a draw for the same prompt, penalties and bias that nothing was noted in; saves reading the prompt."""
        self.sampling = sampling
        self.is_greedy = sampling.temperature < GREEDY or sampling.top_k == 1
        self.top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else 0
        self.is_ranked = self.top_k > 0 or sampling.top_p < 1
        self.random = Random(sampling.seed)  # noqa: S311  # draws tokens, guards nothing
        self.penalties: Penalties | None
        if like is None:
            self.penalties = _penalties(sampling, prompt, vocab_size)
        else:
            self.penalties = like.penalties and like.penalties.copy()
        self.takes_likeliest = self.is_greedy and self.penalties is None and sampling.logprobs is None


def _penalties(sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> Penalties | None:
    repetition, presence, frequency = (
        sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
    )  # fmt: skip
    if repetition == 1 and not presence and not frequency and not sampling.logit_bias:
        return None
    bias = dict(sampling.logit_bias)
    return Penalties(prompt, bias, vocab_size, repetition=repetition, presence=presence, frequency=frequency)


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Chosen]:
    """The next token of every row; it is noted in the row's draw.

    logits: (n, vocab) float32, not modified. A row without a finite maximum gets the token that argmax gives.
    """
    tokens = _tokens(logits, draws)
    asking = []
    for row, draw in enumerate(draws):
        if draw.penalties is not None:
            draw.penalties.note(tokens[row])
        if draw.sampling.logprobs is not None:
            asking.append(row)
    chosen = [Chosen(token) for token in tokens]
    if asking:
        found = _with_logprobs(_rows(logits, asking), [tokens[row] for row in asking], [draws[row] for row in asking])
        for row, one in zip(asking, found, strict=True):
            chosen[row] = one
    return chosen


def probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What choose draws from: (n, vocab) float64, each row's sum is 1; greedy rows have one token. Notes nothing."""
    found = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    greedy, sampled = _by_manner(draws)
    if greedy:
        found[greedy, weights.likeliest(_penalised(logits, draws, greedy))] = 1
    if sampled:
        kept = _weigh(_penalised(logits, draws, sampled), [draws[row] for row in sampled]).double()
        found[sampled] = kept / kept.sum(-1, keepdim=True)
    return found


def _tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    greedy, sampled = _by_manner(draws)
    tokens = [0] * len(draws)
    if greedy:
        found = weights.likeliest(_penalised(logits, draws, greedy))
        for row, token in zip(greedy, found.tolist(), strict=True):
            tokens[row] = token
    if sampled:
        found = _drawn(_penalised(logits, draws, sampled), [draws[row] for row in sampled])
        for row, token in zip(sampled, found.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _by_manner(draws: Sequence[Draw]) -> tuple[list[int], list[int]]:
    """Rows that take the likeliest token, and rows that draw."""
    greedy = [row for row, draw in enumerate(draws) if draw.is_greedy]
    if len(greedy) == len(draws):
        return greedy, []
    return greedy, [row for row, draw in enumerate(draws) if not draw.is_greedy]


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of x (n, d), in rising order; x itself if they are all of them, else a copy."""
    return x if len(rows) == len(x) else x[rows]


def _penalised(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
    """These rows of logits (n, vocab) with their penalties."""
    x = _rows(logits, rows)
    found = {at: penalties for at, row in enumerate(rows) if (penalties := draws[row].penalties) is not None}
    if not found:
        return x
    x = x.clone() if x is logits else x
    penalise(x, found)
    return x


def _drawn(x: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token per row of x (n, vocab), each by one number of its draw: (n,)."""
    uniform = torch.tensor([draw.random.random() for draw in draws], dtype=torch.float64, device=x.device)
    tokens, has_mass = weights.inverse_cdf(_weigh(x, draws), uniform)
    return tokens if bool(has_mass.all()) else torch.where(has_mass, tokens, weights.likeliest(x))


def _weigh(x: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Weights (n, vocab) of what these rows draw from."""
    found = weights.weigh(x, [draw.sampling.temperature for draw in draws])
    cut = [row for row, draw in enumerate(draws) if draw.is_ranked or draw.sampling.min_p > 0]
    if cut:
        part = _rows(found, cut)
        weights.cut(part, _least(part, [draws[row] for row in cut]))
        if part is not found:
            found[cut] = part
    return found


def _least(found: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The lightest of the found weights (n, vocab) that each row's cuts keep: (n, 1)."""
    least = weights.least_by_share(found, [draw.sampling.min_p for draw in draws])
    ranked = [row for row, draw in enumerate(draws) if draw.is_ranked]
    if ranked:
        asked = [draws[row] for row in ranked]
        by_rank = weights.least_by_rank(
            _rows(found, ranked), [draw.top_k for draw in asked], [draw.sampling.top_p for draw in asked]
        )
        least[ranked] = least[ranked].maximum(by_rank)
    return least


def _with_logprobs(logits: Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> list[Chosen]:
    """The tokens with what their rows (n, vocab) say of them. Equals come in the order of their ids."""
    logprobs = logits.log_softmax(-1)
    of_token = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    wanted = [min(draw.sampling.logprobs or 0, logits.shape[1]) for draw in draws]
    values, ids = (found.tolist() for found in logprobs.topk(max(wanted)))
    chosen = []
    for row, (token, num_wanted) in enumerate(zip(tokens, wanted, strict=True)):
        top = sorted(zip(ids[row], values[row], strict=True), key=lambda one: (-one[1], one[0]))[:num_wanted]
        chosen.append(Chosen(token, of_token[row], tuple(top)))
    return chosen
