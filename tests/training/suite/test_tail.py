"""The tail of a backbone gives what the whole backbone gives; what cannot be cut is refused."""

from pathlib import Path

import pytest
import torch

from adapters_store.mixing import Mix
from adapters_store.primitives import Entry
from training.backbone import LoadedBackbone, load
from training.errors import ConfigError
from training.tail import Tail

ROWS = [[5, 6, 7, 8, 9], [6, 7], [9, 8, 7, 6, 5], [5]]


def entries(encoder, layer):
    torch.manual_seed(1)
    places = [site.place for site in encoder.sites.values() if site.place.layer == layer and site.place.d_in == 32]
    return [
        Entry(p.name, "lowrank", {"A": torch.randn(3, p.d_in), "B": torch.randn(p.d_out, 3) * 0.3}, {"scale": 1.0})
        for p in places
        if isinstance(p.module, torch.nn.Linear)
    ]


def test_a_tail_gives_what_the_whole_backbone_gives(backbone: LoadedBackbone) -> None:
    encoder, tail = backbone.encoder, Tail(backbone.encoder, 1)
    states = tail.read(ROWS, 8)
    assert [tuple(state.shape) for state in states] == [(len(row), 32) for row in ROWS]
    encoder.sites.put(0, entries(encoder, 1))
    mixes = [Mix.one_hot(0, 2), None, Mix((0,), torch.tensor([[0.3, 0.7]]).numpy()), None]
    try:
        with torch.no_grad():
            expected = encoder.pool(ROWS, mixes, ["mean"] * 4)
            torch.testing.assert_close(tail.pool(ROWS, states, mixes, "mean"), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(encoder.pool(ROWS, mixes, ["mean"] * 4), expected)  # nothing stays behind
    finally:
        encoder.sites.drop(0)


def test_gradients_are_those_of_the_whole_backbone(backbone: LoadedBackbone) -> None:
    encoder, tail, found = backbone.encoder, Tail(backbone.encoder, 1), []
    states = tail.read(ROWS, 8)
    for run in (lambda m: tail.pool(ROWS, states, m, "mean"), lambda m: encoder.pool(ROWS, m, ["mean"] * 4)):
        trained = entries(encoder, 1)
        for entry in trained:
            entry.tensors["A"].requires_grad_()
        encoder.sites.put(0, trained)
        run([Mix.one_hot(0, 2)] * 4).square().sum().backward()
        encoder.sites.drop(0)
        found.append([entry.tensors["A"].grad for entry in trained])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_whole_backbone_is_a_tail_that_keeps_nothing(backbone: LoadedBackbone) -> None:
    tail = Tail(backbone.encoder, 0)
    assert tail.read(ROWS, 8) == [None] * 4
    expected = backbone.encoder.pool(ROWS, [None] * 4, ["mean"] * 4)
    torch.testing.assert_close(tail.pool(ROWS, [None] * 4, [None] * 4, "mean"), expected)


def test_other_families_can_be_cut_too(gpt2_folder: Path) -> None:
    encoder = load(str(gpt2_folder)).encoder
    tail = Tail(encoder, 1)
    expected = encoder.pool(ROWS, [None] * 4, ["last"] * 4)
    found = tail.pool(ROWS, tail.read(ROWS, 8), [None] * 4, "last")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [2, 7, -1])
def test_a_layer_that_is_not_there_is_refused(backbone: LoadedBackbone, first: int) -> None:
    with pytest.raises(ConfigError, match="is not one of the backbone's layers 0 to 1"):
        Tail(backbone.encoder, first)
