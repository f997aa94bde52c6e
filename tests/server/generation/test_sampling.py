"""Sampling against transformers' own processors, and its law: a row's token depends on the row and its draw alone."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.generation.sampling import Chosen, Draw, Sampling, choose, probabilities
from tests.strategies import light

VOCAB_SIZES = (1, 2, 7, 127, 128, 129, 300, 1000, 1500)  # blocks of 128, a window of 256


def reference(logits: Tensor, sampling: Sampling, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Tensor:
    """The distribution (vocab,) float64 that a row (vocab,) is drawn from, by transformers' processors."""
    scores = logits.double().unsqueeze(0)
    seen = torch.tensor([[*prompt, *output]], dtype=torch.int64)
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[0, token] += bias
    if sampling.temperature == 0 or sampling.top_k == 1:
        return torch.nn.functional.one_hot(scores[0].argmax(), len(logits)).double()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(seen, scores)[0].softmax(-1)


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers as people write them: three decimals."""
    return st.integers(round(low * 1000), round(high * 1000)).map(lambda number: number / 1000)


def _samplings(vocab_size: int) -> st.SearchStrategy[Sampling]:
    tokens = st.integers(0, vocab_size - 1)
    return st.builds(
        Sampling,
        temperature=st.just(0.0) | st.just(1.0) | _floats(0.05, 5),
        top_p=st.just(1.0) | _floats(0, 1),
        top_k=st.just(0) | st.integers(1, 60) | st.integers(1, vocab_size + 5),
        min_p=st.just(0.0) | _floats(0, 1),
        repetition_penalty=st.just(1.0) | _floats(0.5, 2),
        presence_penalty=st.just(0.0) | _floats(-2, 2),
        frequency_penalty=st.just(0.0) | _floats(-2, 2),
        logit_bias=st.dictionaries(tokens, _floats(-100, 100), max_size=3).map(lambda bias: tuple(bias.items())),
        seed=st.integers(0, 2**63 - 1),
        logprobs=st.none() | st.integers(0, 20),
    )


def _draw(sampling: Sampling, vocab_size: int, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Draw:
    draw = Draw(sampling, prompt, vocab_size)
    for token in output:
        if draw.penalties is not None:
            draw.penalties.note(token)
    return draw


def _batch(data: st.DataObject) -> tuple[Tensor, list[Sampling], list[list[int]], list[list[int]]]:
    """Random logits (n, vocab), peaked or flat, with a random request for each row: samplings, prompts, outputs."""
    vocab_size = data.draw(st.sampled_from(VOCAB_SIZES))
    n = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(n, vocab_size, generator=generator) * data.draw(st.sampled_from((0.2, 1.0, 3.0, 10.0)))
    samplings = data.draw(st.lists(_samplings(vocab_size), min_size=n, max_size=n))
    texts = torch.randint(0, vocab_size, (2, n, 80), generator=generator).tolist()
    return logits, samplings, *texts


def _tokens(chosen: Sequence[Chosen]) -> list[int]:
    return [one.token for one in chosen]


@light
@given(data=st.data())
def test_a_row_is_drawn_from_what_transformers_processors_leave(data: st.DataObject) -> None:
    logits, samplings, prompts, outputs = _batch(data)
    vocab_size = logits.shape[1]
    rows = list(zip(logits, samplings, prompts, outputs, strict=True))

    found = probabilities(logits, [_draw(s, vocab_size, p, o) for _, s, p, o in rows])

    expected = torch.stack([reference(*row) for row in rows])
    kept = expected > 1e-9
    assert torch.equal(found > 1e-9, kept)
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=1e-9)


@light
@given(data=st.data())
def test_a_row_chooses_in_any_batch_what_it_chooses_alone(data: st.DataObject) -> None:
    logits, samplings, prompts, outputs = _batch(data)
    vocab_size = logits.shape[1]
    together = [_draw(s, vocab_size, p, o) for s, p, o in zip(samplings, prompts, outputs, strict=True)]
    alone = [_draw(s, vocab_size, p, o) for s, p, o in zip(samplings, prompts, outputs, strict=True)]

    for step in range(4):
        at_step = logits.roll(step, 1)
        found = choose(at_step, together)
        expected = [choose(at_step[row : row + 1], [draw])[0] for row, draw in enumerate(alone)]
        assert _tokens(found) == _tokens(expected)
        assert [[token for token, _ in one.top] for one in found] == [[t for t, _ in one.top] for one in expected]


@pytest.mark.parametrize("vocab_size", [513, 8192, 32003])
def test_weights_are_the_same_bits_in_any_batch(vocab_size: int) -> None:
    logits = 4 * torch.randn(9, vocab_size)
    samplings = [Sampling(temperature=0.3 + row / 5, top_p=(1.0, 0.95, 0.5)[row % 3]) for row in range(9)]
    draws = [Draw(sampling, (), vocab_size) for sampling in samplings]

    together = probabilities(logits, draws)

    for row, draw in enumerate(draws):
        assert torch.equal(probabilities(logits[row : row + 1].clone(), [draw])[0], together[row])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.5, top_k=12),
        Sampling(top_p=0.7),
        Sampling(temperature=2.0, top_k=60, top_p=0.8, min_p=0.1),
    ],
)
def test_frequencies_fit_the_probabilities(sampling: Sampling) -> None:
    vocab_size, steps, seeds = 200, 200, 100
    logits = 2 * torch.randn(vocab_size)
    draws = [Draw(Sampling(**{**vars(sampling), "seed": seed}), (), vocab_size) for seed in range(seeds)]
    batch = logits.expand(seeds, vocab_size)

    counts = Counter(token for _ in range(steps) for token in _tokens(choose(batch, draws)))

    expected = steps * seeds * reference(logits, sampling)
    assert all(expected[token] > 0 for token in counts)
    common = (expected >= 5).nonzero()[:, 0].tolist()
    observed = [counts[token] for token in common]
    rest = steps * seeds - sum(observed), steps * seeds - float(expected[common].sum())
    pairs = [*zip(observed, expected[common].tolist(), strict=True), *([rest] if rest[1] > 1 else [])]
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    assert stats.chi2.sf(chi_square, len(pairs) - 1) > 1e-3


def test_first_tokens_of_neighbouring_seeds_fit_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    draws = [Draw(Sampling(seed=seed), (), 5) for seed in range(20_000)]

    counts = Counter(_tokens(choose(probs.log().expand(20_000, 5), draws)))

    observed = [counts[token] for token in range(5)]
    assert stats.chisquare(observed, (20_000 * probs).tolist()).pvalue > 1e-3


def test_a_seed_gives_the_same_tokens_again_and_none_gives_others() -> None:
    logits = torch.zeros(1, 1000)

    def twenty(seed: int | None) -> list[int]:
        draw = Draw(Sampling(seed=seed), (), 1000)
        return [choose(logits, [draw])[0].token for _ in range(20)]

    assert twenty(7) == twenty(7)
    assert twenty(7) != twenty(8)
    assert twenty(None) != twenty(None)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[3.0, -1.0, 2.0, 0.5, 0.0, 1.0]])
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((3, 1.5), (2, -4.0))
    )
    draw = _draw(sampling, 6, prompt=[0, 1], output=[1, 2, 2])

    found = probabilities(logits, [draw])[0].log()

    # 0: 3/2. 1: -1*2 - 0.5 - 0.25. 2: 2/2 - 2*0.5 - 0.25 - 4. 3: 0.5 + 1.5. 4 and 5 are not concerned.
    expected = torch.tensor([1.5, -2.75, -4.25, 2.0, 0.0, 1.0], dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_chosen_tokens_count_for_the_next_step() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    draw = Draw(Sampling(temperature=0.0, presence_penalty=0.5), (), 3)

    assert [choose(logits, [draw])[0].token for _ in range(4)] == [0, 1, 2, 0]


def test_a_long_output_keeps_its_counts() -> None:
    logits = torch.randn(300)
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.02, presence_penalty=0.1)
    output = torch.randint(0, 300, (2000,)).tolist()

    found = probabilities(logits.unsqueeze(0), [_draw(sampling, 300, output[:50], output)])[0]

    torch.testing.assert_close(found, reference(logits, sampling, output[:50], output), rtol=3e-5, atol=1e-9)


def test_a_draw_like_another_goes_its_own_way() -> None:
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, logit_bias=((3, 1.0),))
    first = Draw(sampling, [1, 2], 8)
    second = Draw(sampling, [1, 2], 8, like=first)
    assert first.penalties is not None
    for token in range(40):
        first.penalties.note(token % 8)

    fresh, logits = Draw(sampling, [1, 2], 8), torch.linspace(1, 2, 8)[None]

    torch.testing.assert_close(probabilities(logits, [second]), probabilities(logits, [fresh]))
    assert second.penalties is not None
    assert len(second.penalties.table[0]) == 3


def test_logits_stay_as_they_are() -> None:
    logits = torch.randn(2, 40)
    before = logits.clone()
    sampling = Sampling(top_p=0.5, repetition_penalty=1.5, logit_bias=((1, 5.0),), logprobs=2)

    choose(logits, [Draw(sampling, [3], 40), Draw(sampling, [4], 40)])

    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_forces_and_one_of_minus_100_forbids(temperature: float) -> None:
    logits = 3 * torch.randn(1, 50)
    best = int(logits.argmax())
    forced = Draw(Sampling(temperature=temperature, logit_bias=((17, 100.0),), seed=1), (), 50)
    forbidden = Draw(Sampling(temperature=temperature, logit_bias=((best, -100.0),), seed=1), (), 50)

    assert {choose(logits, [forced])[0].token for _ in range(50)} == {17}
    assert best not in {choose(logits, [forbidden])[0].token for _ in range(50)}


def test_tokens_that_the_head_cannot_give_are_ignored() -> None:
    sampling = Sampling(temperature=0.0, repetition_penalty=1.5, logit_bias=((99, 50.0), (-1, 50.0)))
    draw = Draw(sampling, [2, 70], 5)

    assert choose(torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0]]), [draw])[0].token == 2


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.0), Sampling(top_p=1e-9), Sampling(top_k=1), Sampling(min_p=1.0)]
)
def test_the_narrowest_cuts_leave_the_likeliest_token(sampling: Sampling) -> None:
    logits = torch.randn(5, 700)

    found = choose(logits, [Draw(sampling, (), 700) for _ in range(5)])

    assert _tokens(found) == logits.argmax(-1).tolist()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [999, 500]] = 1
    logits[1, [128, 127]] = 1

    found = choose(logits, [Draw(Sampling(temperature=0.0), (), 1000), Draw(Sampling(top_k=1), (), 1000),
                            Draw(Sampling(temperature=1e-6), (), 1000)])  # fmt: skip

    assert _tokens(found) == [500, 127, 0]


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.5), Sampling(top_k=300), Sampling(min_p=0.9)])
def test_equals_share_their_fate(sampling: Sampling) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 5] = 0.05
    logits[0, 600:] = -9

    found = probabilities(logits, [Draw(sampling, (), 1000)])[0]

    assert (found > 0).nonzero()[:, 0].tolist() == list(range(600))


@pytest.mark.parametrize("top_k", [0, 200, 255, 256, 1200])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("vocab_size", [255, 256, 257, 1500])
def test_a_nucleus_may_be_larger_than_the_window(vocab_size: int, top_p: float, top_k: int) -> None:
    logits = torch.tensor([[0.2], [1.0], [4.0]]) * torch.randn(3, vocab_size)
    sampling = Sampling(top_p=top_p, top_k=top_k)

    found = probabilities(logits, [Draw(sampling, (), vocab_size) for _ in range(3)])

    expected = torch.stack([reference(row, sampling) for row in logits])
    assert torch.equal(found > 1e-9, expected > 1e-9)
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=1e-9)


def test_top_p_counts_all_equals_of_the_kth() -> None:
    """100 tokens, and 500 of half their weight: half of all is more than the 100 have; half of a window is less."""
    logits = torch.full((1, 1000), -9.0)
    logits[0, :100] = 0
    logits[0, 100:600] = math.log(0.5)

    found = probabilities(logits, [Draw(Sampling(top_k=101, top_p=0.5), (), 1000)])[0]

    assert int((found > 0).sum()) == 600


def test_top_p_takes_as_few_as_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()

    def kept(top_p: float) -> int:
        return int((probabilities(logits, [Draw(Sampling(top_p=top_p), (), 5)]) > 0).sum())

    assert [kept(top_p) for top_p in (0.1, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.99)] == [1, 1, 2, 2, 3, 3, 5, 5]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = 2 * torch.randn(3, 90)
    raw = logits.double().log_softmax(-1)
    changing = {"temperature": 0.3, "top_p": 0.9, "presence_penalty": 1.0, "logit_bias": ((4, 3.0),)}
    draws = [
        Draw(Sampling(**changing, logprobs=3), (), 90), Draw(Sampling(), (), 90),
        Draw(Sampling(temperature=0.0, logprobs=0), (), 90),
    ]  # fmt: skip

    first, second, third = choose(logits, draws)

    assert first.logprob == pytest.approx(float(raw[0, first.token]), abs=1e-5)
    assert [token for token, _ in first.top] == raw[0].topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(raw[0].topk(3).values.tolist(), abs=1e-5)
    assert second.logprob is None
    assert second.top == ()
    assert third.logprob == pytest.approx(float(raw[2].max()), abs=1e-5)
    assert third.top == ()


def test_more_logprobs_than_tokens_gives_all_tokens_in_order() -> None:
    found = choose(torch.tensor([[0.0, 2.0, 0.0]]), [Draw(Sampling(temperature=0.0, logprobs=9), (), 3)])[0]

    assert [token for token, _ in found.top] == [1, 0, 2]
    assert sum(math.exp(value) for _, value in found.top) == pytest.approx(1)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.9), Sampling(top_k=5)])
def test_a_row_without_a_finite_maximum_gets_what_argmax_gives_and_spoils_no_other(sampling: Sampling) -> None:
    logits = torch.randn(5, 300)
    logits[0, 7] = math.nan
    logits[1, 290] = math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, 131] = 1.0
    seeded = Sampling(**{**vars(sampling), "seed": 3, "logprobs": 2})

    found = choose(logits, [Draw(seeded, (), 300) for _ in range(5)])

    assert _tokens(found)[:4] == [7, 290, 0, 131]
    assert found[4] == choose(logits[4:], [Draw(seeded, (), 300)])[0]


def test_no_rows_no_tokens() -> None:
    assert choose(torch.empty(0, 10), []) == []
