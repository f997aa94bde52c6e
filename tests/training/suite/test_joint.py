"""Training together: one-hot weights are training apart, shared ones share; heads tied or apart."""

from dataclasses import replace

import pytest
import torch

from training.suite.heads import Heads, logits
from training.suite.joint import Extra, Recipe, batch_of, num_steps, schedule, train
from training.suite.modules import Modules, mixes, one_hot, uniform
from training.suite.workbench import Workbench

RECIPE = Recipe(epochs=2, batch_size=5, max_tokens=96, clip=1e9)


def trained(bench: Workbench, recipe: Recipe = RECIPE) -> tuple[Modules, Heads, list[float]]:
    modules = Modules(bench.tail, len(bench.tasks), 0, alike=True, hyperparameters={"r": 2})
    heads = Heads(bench.tasks, bench.hidden_size, 0)
    apart = mixes(one_hot(len(bench.tasks), bench.num_layers))
    return modules, heads, train(bench, modules, heads, lambda _: apart, recipe).losses


def test_one_hot_weights_train_as_alone(tiny_bench: Workbench) -> None:
    modules, heads, losses = trained(tiny_bench)
    assert losses[-1] < losses[0]
    for t in range(len(tiny_bench.tasks)):
        alone, head, _ = trained(tiny_bench.only([t]))
        for site, tensors in modules.parameters[t].items():
            torch.testing.assert_close(tensors["A"], alone.parameters[0][site]["A"], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(tensors["B"], alone.parameters[0][site]["B"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(heads.of(t), head.of(0), rtol=1e-3, atol=1e-5)


def test_small_forwards_give_the_gradient_of_a_large_one(tiny_bench: Workbench) -> None:
    few, many = trained(tiny_bench, replace(RECIPE, max_tokens=16))[2], trained(tiny_bench)[2]
    assert few == pytest.approx(many, rel=1e-4)


def test_the_backbone_and_frozen_heads_stay(tiny_bench: Workbench) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_bench.tail.encoder.model.state_dict().items()}
    modules = Modules(tiny_bench.tail, 2, 0, hyperparameters={"r": 2})
    given = Heads(tiny_bench.tasks, tiny_bench.hidden_size, 3).frozen()
    heads = Heads.given(tiny_bench.tasks, given, trained=False)
    weights = uniform(len(tiny_bench.tasks), 2, tiny_bench.num_layers)
    train(tiny_bench, modules, heads, lambda _: mixes(weights), RECIPE)
    torch.testing.assert_close(heads.frozen(), given, rtol=0, atol=0)
    after = tiny_bench.tail.encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(len(bank.slots) for site in tiny_bench.tail.encoder.sites.values() for bank in site.banks.values()) == 0


def test_gradients_reach_weights_and_penalties(tiny_bench: Workbench) -> None:
    size = len(tiny_bench.tasks)
    modules, heads = Modules(tiny_bench.tail, 2, 0), Heads(tiny_bench.tasks, tiny_bench.hidden_size, 0)
    scores = torch.zeros(size, 2, tiny_bench.num_layers, requires_grad=True)
    far = torch.ones(3, requires_grad=True)
    extra = Extra([scores, far], 0.1, lambda: far.square().sum())
    train(tiny_bench, modules, heads, lambda _: mixes(torch.softmax(scores, dim=1)), RECIPE, extra)
    assert (scores[:, :, 1] != 0).all()  # the layer that has adapters
    assert (scores[:, :, 0] == 0).all()
    assert (far < 1).all()


def test_every_text_is_seen_once_an_epoch(tiny_bench: Workbench) -> None:
    steps = [batch_of(tiny_bench, RECIPE, step) for step in range(num_steps(tiny_bench, RECIPE))]
    assert len(steps) == 6
    for epoch in (steps[:3], steps[3:]):
        seen = sorted((t, i) for rows in epoch for t, i, _ in rows)
        assert seen == [(t, i) for t in range(3) for i in range(12)]
    assert steps[:3] != steps[3:]


def test_the_rate_rises_then_falls() -> None:
    shares = [schedule(step, 20, 0.2) for step in range(20)]
    assert shares[:4] == sorted(shares[:4])
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert max(shares) == 1
    assert shares[-1] == pytest.approx(1 / 16)


def test_heads_are_tied_where_labels_have_one_name(tiny_bench: Workbench) -> None:
    ties = torch.tensor([[0.6, 0.3, 0.1], [0.0, 1.0, 0.0], [0.5, 0.2, 0.3]])
    heads = Heads(tiny_bench.tasks, tiny_bench.hidden_size, 0, ties)
    with torch.no_grad():
        for j, (weight, bias) in enumerate(heads.parts):
            weight += j
            bias += 10 * j
    books, films, intent = heads.frozen()
    torch.testing.assert_close(books[0], (2 * heads.parts[0][0] + heads.parts[1][0]) / 3)  # intent has other labels
    torch.testing.assert_close(films, heads.parts[1])
    torch.testing.assert_close(intent, heads.parts[2])
    logits(heads.of(0), torch.ones(1, tiny_bench.hidden_size)).sum().backward()
    assert heads.parts[1][0].grad.abs().sum() > 0


def test_mixes_of_learned_weights_keep_their_gradient() -> None:
    learned = torch.ones(2, 3, 4, requires_grad=True)
    assert mixes(learned)[0].weights.requires_grad
    assert mixes(learned.detach())[1].weights.shape == (3, 4)


def test_mixes_of_learned_weights_hold_what_is_within_reach() -> None:
    learned = torch.ones(2, 3, 4, requires_grad=True)

    first, second = mixes(learned, torch.tensor([[True, False, True], [False, True, False]]))

    assert (first.slots, second.slots) == ((0, 2), (1,))
    assert first.weights.shape == (2, 4)
