"""The objective of generating tasks: losses on completions and nothing else, rows that fit, bounded logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from tests.training.decoders import FAMILIES, pairs
from training.backbone import LoadedBackbone, load
from training.errors import ConfigError, DataError
from training.examples import Pair
from training.objectives import Asked, Completions, completions
from training.objectives.completions import _fit


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, decoders: dict[str, Path]) -> LoadedBackbone:
    return load(str(decoders[request.param]), generates=True)


@pytest.fixture(scope="module")
def llama(decoders: dict[str, Path]) -> LoadedBackbone:
    return load(str(decoders["llama"]), generates=True)


SPLIT = tuple(Pair(*pair) for style in ("plain", "turned") for pair in pairs(style)[:4])


def answers(backbone: LoadedBackbone, objective: Completions, texts: Any, mix: Mix | None = None) -> Any:
    [found] = objective.read(backbone.encoder, [Asked(objective, texts, mix)])
    return objective.answers(found, texts)


def test_the_loss_is_that_of_transformers_with_the_prompts_labels_left_out(decoder: LoadedBackbone) -> None:
    objective = Completions(decoder, 64)
    texts = objective.texts(SPLIT)
    model = AutoModelForCausalLM.from_pretrained(decoder.folder)

    found = answers(decoder, objective, texts)

    for i, (row, start) in enumerate(zip(texts.rows, texts.targets, strict=True)):
        ids = torch.tensor([row])
        labels = torch.tensor([[-100] * start + list(row[start:])])
        with torch.no_grad():
            reference = model(input_ids=ids, labels=labels)
        right = reference.logits[0, start - 1 : -1].argmax(-1) == ids[0, start:]
        count = objective.counts(texts)[i]
        assert float(found.losses[i]) == pytest.approx(float(reference.loss) * count, rel=1e-4)
        assert int(found.right[i]) == int(right.sum())
        assert row[-1] == decoder.tokenizer.eos_token_id
        assert count == len(row) - start > 1


def test_the_loss_is_minus_the_log_probabilities_that_serving_promises(decoder: LoadedBackbone) -> None:
    objective = Completions(decoder, 64)
    texts = objective.texts(SPLIT)

    found = answers(decoder, objective, texts)

    with torch.no_grad():
        logprobs = decoder.causal.logprobs(texts.rows, [None] * len(texts), texts.targets)
    torch.testing.assert_close(found.losses, -torch.stack([row.sum() for row in logprobs]), rtol=1e-5, atol=1e-5)


def test_what_the_prompt_predicts_of_itself_has_no_gradient(llama: LoadedBackbone) -> None:
    objective = Completions(llama, 64)
    texts = objective.texts(SPLIT[:1])
    states = torch.randn(len(texts.rows[0]), 32, requires_grad=True)

    class Fixed:
        def states(self, rows: object, mixes: object) -> list[torch.Tensor]:
            return [states]

    [found] = objective.read(Fixed(), [Asked(objective, texts, None)])
    objective.answers(found, texts).losses.sum().backward()

    has_gradient = (states.grad != 0).any(dim=1).tolist()
    start = texts.targets[0]
    assert has_gradient == [False] * (start - 1) + [True] * (len(texts.rows[0]) - start) + [False]


def test_few_logits_at_a_time_give_the_same_losses_and_gradients(
    llama: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Completions(llama, 64)
    texts = objective.texts(SPLIT)
    site = next(name for name in llama.encoder.sites if name.endswith("q_proj"))
    A, B = torch.randn(2, 32, requires_grad=True), torch.randn(32, 2, requires_grad=True)
    llama.encoder.sites.put(0, [Entry(site, "lowrank", {"A": A, "B": B}, {"scale": 0.5})])
    found = []
    for limit in (1 << 24, 5 * llama.causal.vocab_size):
        monkeypatch.setattr(completions, "_MAX_LOGITS", limit)
        answer = answers(llama, objective, texts, Mix.one_hot(0, llama.encoder.num_layers))
        answer.losses.sum().backward(retain_graph=True)
        found.append([answer.losses.detach(), answer.right, A.grad.clone(), B.grad.clone()])
        A.grad = B.grad = None
    llama.encoder.sites.drop(0)

    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0][2].abs().max() > 0


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 2), st.integers(4, 40))
def test_a_cut_row_keeps_its_completion_its_beginning_and_the_prompts_end(
    prompt: int, completion: int, beginning: int, limit: int
) -> None:
    start = max(1, prompt)
    ids = list(range(start + completion))

    kept, now = _fit(ids, start, beginning, limit)

    first = max(1, min(beginning, start))
    assert len(kept) <= limit
    assert kept[:first] == ids[:first]
    assert kept[first:now] == ids[start - (now - first) : start]
    if len(ids) <= limit:
        assert (kept, now) == (ids, start)
    elif first + completion <= limit:
        assert kept[now:] == ids[start:]
        assert len(kept) == limit
    else:
        assert kept == (ids[:first] + ids[start:])[:limit]


def test_cuts_are_counted(llama: LoadedBackbone) -> None:
    split = (Pair("the cat", " was big"), Pair("so " * 20, " was big"), Pair("so so", " very" * 20))

    texts = Completions(llama, 12).texts(split)

    assert (texts.cuts.prompts, texts.cuts.completions, texts.cuts.longest) == (2, 1, 24)
    assert [len(row) for row in texts.rows] == [6, 12, 12]
    assert texts.rows[1][0] == texts.rows[2][0] == llama.tokenizer.bos_token_id
    assert texts.rows[1][-1] == llama.tokenizer.eos_token_id
    assert texts.rows[2][-1] != llama.tokenizer.eos_token_id


def test_a_pair_without_a_token_to_learn_is_refused(llama: LoadedBackbone) -> None:
    class NoEnds:
        eos_token_id = None

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    from dataclasses import replace

    objective = Completions(replace(llama, tokenizer=NoEnds()), 12)

    assert objective.texts((Pair("", " one more"),)).rows == [[3, 4]]
    with pytest.raises(DataError, match="'' with completion ' one' has no token to learn"):
        objective.texts((Pair("", " one"),))


def test_golden_examples_are_short_and_what_the_language_model_says(decoder: LoadedBackbone) -> None:
    golden = Completions(decoder, 5).golden(decoder.encoder, None, (Pair("so", " very" * 60), *SPLIT))

    assert len(golden) == 3
    for example in golden:
        row, start = Completions(decoder, 64)._joined(Pair(example.text, example.completion))
        model = AutoModelForCausalLM.from_pretrained(decoder.folder)
        with torch.no_grad():
            shares = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        expected = [float(shares[at - 1, row[at]]) for at in range(start, len(row))]
        assert list(example.logprobs) == pytest.approx(expected, abs=1e-4)
        assert example.logits == ()


def test_the_encoder_of_a_language_model_is_the_one_that_classifies(decoder: LoadedBackbone) -> None:
    plain = load(str(decoder.folder)).encoder
    rows = [[3, 4, 5, 6], [7, 8]]

    with torch.no_grad():
        one, other = (e.pool(rows, [None, None], ["last", "mean"]) for e in (plain, decoder.encoder))

    torch.testing.assert_close(one, other)
    assert list(plain.sites) == list(decoder.encoder.sites)


def test_an_encoder_is_refused_by_name(bert_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(bert\) is an encoder and cannot generate; .* --backbone"):
        load(str(bert_folder), generates=True)
