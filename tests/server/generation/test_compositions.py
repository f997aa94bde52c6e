"""Texts under 64 compositions of 16 adapters of four kinds: each as alone, as the slow reference, as a dense merge."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from tests.server.generation.decoding import decoder_of, finish, output, sequence
from tests.server.generation.families import causal, greedy
from tests.server.generation.tiny_decoder import KINDS, LAYERS, adapter

COUNT = 24
ADAPTERS = {slot: adapter(KINDS[slot % len(KINDS)], slot + 1) for slot in range(16)}


def composition(index: int) -> Mix:
    """One to four adapters with weights that differ by layer; all 64 are different."""
    rng = np.random.default_rng(index)
    slots = tuple(rng.choice(16, size=1 + index % 4, replace=False).tolist())
    return Mix(slots, rng.uniform(-0.4, 1.0, (len(slots), LAYERS)).astype(np.float32))


MIXES = [composition(index) for index in range(64)]
PROMPTS = [[(5 * i + 7 * n) % 90 + 3 for i in range(1 + n * 3 % 40)] for n in range(64)]


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    model = LanguageModel(causal("llama"), keeps_reference=True)
    for slot, entries in ADAPTERS.items():
        model.encoder.sites.check(entries)
        model.encoder.sites.put(slot, entries)
    return model


@cache
def decoder(language: LanguageModel) -> Decoder:
    return decoder_of(language, 2048)


def texts(language: LanguageModel, chosen: range | list[int], **changes: Any) -> list[list[int]]:
    """Those of these requests, all at once."""
    batcher = Batcher(decoder(language), **changes)
    sequences = [sequence(PROMPTS[i], COUNT, MIXES[i]) for i in chosen]
    for one in sequences:
        batcher.add(one)
    finish(batcher)
    return [output(one) for one in sequences]


@pytest.fixture(scope="module")
def together(language: LanguageModel) -> list[list[int]]:
    return texts(language, range(64), max_sequences=64)


def test_compositions_differ_and_so_do_their_texts(together: list[list[int]], language: LanguageModel) -> None:
    assert len({mix.key for mix in MIXES}) == 64
    batcher = Batcher(decoder(language))
    bare = [sequence(prompt, COUNT) for prompt in PROMPTS]
    for one in bare:
        batcher.add(one)
    finish(batcher)

    assert sum(output(one) != text for one, text in zip(bare, together, strict=True)) > 55


def test_each_is_what_it_is_alone(together: list[list[int]], language: LanguageModel) -> None:
    assert [texts(language, [i])[0] for i in range(64)] == together


@pytest.mark.parametrize("step_tokens", [7, 64])
def test_chunks_and_company_change_nothing(
    together: list[list[int]], language: LanguageModel, step_tokens: int
) -> None:
    assert texts(language, range(64), step_tokens=step_tokens, max_sequences=20) == together


def test_each_is_what_the_slow_reference_gives(together: list[list[int]], language: LanguageModel) -> None:
    """Row by row, adapter by adapter, without cache: every token must be its likeliest."""
    for i in range(0, 64, 3):
        ids = PROMPTS[i] + together[i]
        with torch.no_grad():
            states = language.encoder.states([ids], [MIXES[i]], reference=True)[0]
            likeliest = language.logits(states).argmax(dim=-1).tolist()
        assert likeliest[len(PROMPTS[i]) - 1 : -1] == together[i]


def merged(model: nn.Module, mix: Mix) -> nn.Module:
    """The model with the mix worked into its weights; all kinds but bottleneck allow it."""
    model = copy.deepcopy(model)
    for slot, weights in zip(mix.slots, np.asarray(mix.weights), strict=True):
        for entry in ADAPTERS[slot]:
            _merge(model, entry, float(weights[int(entry.site.split(".")[1])]))
    for name, (weight, bias) in _changes(model).items():
        module = model.get_submodule(name)
        module.weight.data += weight
        if bias is not None:
            module.bias = nn.Parameter(bias)
    return model


def _changes(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = model.__dict__.pop("changes", {})
    return found


def _merge(model: Any, entry: Entry, weight: float) -> None:
    """Note what an entry changes; changes are of the original weights, so that they add up."""
    name, tensors = f"model.{entry.site}", entry.tensors
    own = model.get_submodule(name).weight.data
    known, bias = model.__dict__.setdefault("changes", {}).get(name, (torch.zeros_like(own), None))
    if entry.primitive == "lowrank":
        known = known + weight * float(entry.options["scale"]) * tensors["B"] @ tensors["A"]
    elif entry.primitive == "norm":
        known = known + weight * (tensors["weight"] - own)
    else:
        known = known + weight * (tensors["scale"] - 1)[:, None] * own
        bias = (0 if bias is None else bias) + weight * tensors["shift"]
    model.__dict__["changes"][name] = (known, bias)


def test_each_is_what_a_dense_merge_gives(together: list[list[int]]) -> None:
    model = causal("llama")
    mergeable = [
        i for i, mix in enumerate(MIXES) if all(KINDS[slot % len(KINDS)] != "bottleneck" for slot in mix.slots)
    ]

    assert len(mergeable) > 40
    for i in mergeable:
        assert greedy(merged(model, MIXES[i]), PROMPTS[i], COUNT) == together[i], f"composition {i}"


def test_adapters_put_and_dropped_between_steps_touch_nobody(
    together: list[list[int]], language: LanguageModel
) -> None:
    """T1, T4: slots that nobody uses are filled, emptied and filled with a smaller adapter after every step."""
    sites = language.encoder.sites
    others: Mapping[int, list[Entry]] = {
        20: adapter("lora", 50),
        21: adapter("norm", 51),
        22: adapter("bottleneck", 52),
    }
    batcher = Batcher(decoder(language), max_sequences=64)
    sequences = [sequence(PROMPTS[i], COUNT, MIXES[i]) for i in range(64)]
    for one in sequences:
        batcher.add(one)

    def churn(step: int) -> None:
        slot = 20 + step % 3
        sites.put(slot, others[20 + (step // 3) % 3])
        sites.drop(20 + (step + 1) % 3)

    finish(batcher, churn)
    for slot in others:
        sites.drop(slot)

    assert [output(one) for one in sequences] == together


def test_a_small_adapter_in_a_large_ones_slot_is_as_on_a_fresh_server(language: LanguageModel) -> None:
    """T4: nothing of the large one stays at the sites that the small one does not touch."""
    fresh = LanguageModel(causal("llama"))
    small = [entry for entry in adapter("lora", 61) if "layers.1" in entry.site][:1]
    large = adapter("bottleneck", 63) + adapter("lora", 62) + adapter("norm", 64)
    for model, order in ((fresh, [small]), (language, [large, small])):
        for entries in order:
            model.encoder.sites.put(30, entries)
    found = []
    for model in (fresh, language):
        batcher = Batcher(decoder(model))
        one = sequence(PROMPTS[9], COUNT, Mix.one_hot(30, LAYERS))
        batcher.add(one)
        finish(batcher)
        found.append(output(one))
    language.encoder.sites.drop(30)

    assert found[0] == found[1]
