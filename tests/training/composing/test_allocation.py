"""Weights: the server's own numbers, their limits, gates, gradients, and what adding a node changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import composition
from adapters_store.graph import Knobs
from adapters_store.prior import Prior
from tests.strategies import light
from tests.training.composing.test_prior import graph_of, relations
from training.composing.allocation import Allocation, anneal, gate
from training.composing.prior import prior

seeds = st.integers(0, 2**32 - 1)
LAYERS = 3
knobs = st.builds(
    Knobs,
    c=st.floats(0, 0.95),
    epsilon=st.sampled_from([0.0, 0.01, 0.1]),
    temperature=st.floats(0.1, 5),
    strength=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    threshold=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    path=st.sampled_from(["none", "marginals", "viterbi"]),
    path_threshold=st.sampled_from([0.0, 0.3, 0.7]),
    path_strength=st.sampled_from([0.0, 1.0, 2.0]),
    stay=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    num_paths=st.integers(1, 2),
    top_k=st.sampled_from([None, 1, 2, 3]),
)


def allocation(seed, knobs, size=5, mass=True):
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randn(size, size, LAYERS, generator=generator, dtype=torch.float64)
    log_mass = torch.randn(size, LAYERS, generator=generator, dtype=torch.float64) * mass
    return Allocation(evidence, log_mass, knobs)


@light
@given(seeds, knobs)
def test_weights_are_those_that_the_server_composes(seed, knobs):
    R, found = torch.from_numpy(relations(seed)), allocation(seed, knobs)
    tasks, graph = graph_of(R.numpy(), knobs)
    served, Pi = Prior(graph), prior(R, knobs)
    weights = found.weights(Pi, Pi)
    for t, task in enumerate(tasks):
        evidence = {module: found.evidence[t, k].tolist() for k, module in enumerate(tasks)}
        mass = found.log_mass[t].exp().tolist()
        expected = composition.from_prior(served.row(task), evidence, knobs, LAYERS, mass, served.row)
        for k, module in enumerate(tasks):
            np.testing.assert_allclose(
                weights[t, k].numpy(), expected.get(module, np.zeros(LAYERS)), atol=1e-6, rtol=1e-6
            )


@light
@given(seeds, knobs)
def test_weights_sum_to_the_mass_and_no_layer_is_empty(seed, knobs):
    R, found = torch.from_numpy(relations(seed)), allocation(seed, knobs)
    Pi = prior(R, knobs)
    weights = found.weights(Pi, Pi)
    torch.testing.assert_close(weights.sum(dim=1), found.log_mass.exp())


def test_hot_evidence_leaves_the_prior_and_no_prior_leaves_the_evidence():
    R = torch.from_numpy(relations(4, share=1.0))
    hot = Knobs(temperature=1e9, threshold=0.0, epsilon=0.0)
    Pi = prior(R, hot)
    found = allocation(4, hot, mass=False).weights(Pi)
    torch.testing.assert_close(found, Pi[:, :, None].expand_as(found), rtol=1e-6, atol=1e-9)
    half = allocation(4, hot.model_copy(update={"strength": 0.5}), mass=False).weights(Pi)  # E / tau = 0: Pi^lambda
    torch.testing.assert_close(half[:, :, 0], Pi.sqrt() / Pi.sqrt().sum(dim=1, keepdim=True), rtol=1e-6, atol=1e-9)
    free = Knobs(strength=0.0, threshold=0.0, epsilon=0.0)
    ignoring = allocation(4, free, mass=False)
    torch.testing.assert_close(ignoring.weights(prior(R, free)), torch.softmax(ignoring.evidence, dim=1))


def test_without_diffusion_every_task_is_alone():
    R, alone = torch.from_numpy(relations(5)), Knobs(c=0.0)
    found = allocation(5, alone, mass=False).weights(prior(R, alone))
    torch.testing.assert_close(found, torch.eye(5, dtype=torch.float64)[:, :, None].expand(-1, -1, LAYERS))


@light
@given(seeds, st.floats(0, 1))
def test_the_gate_never_empties_a_layer(seed, threshold):
    alpha = torch.softmax(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(seed)) * 4, dim=1)
    open_ = gate(alpha, threshold)
    assert (open_.sum(dim=1) >= 1).all()
    assert set(open_.unique().tolist()) <= {0.0, 1.0}


def test_the_gate_is_hard_forwards_and_soft_backwards():
    alpha = torch.tensor([[[0.7], [0.2], [0.1]]], requires_grad=True)
    found = gate(alpha, 0.5, tau_gate=0.5)
    assert found.flatten().tolist() == [1, 0, 0]
    found[0, 2, 0].backward()
    assert alpha.grad[0, 2, 0] > 0
    assert gate(alpha, 0.5).requires_grad is False


def test_the_gates_temperature_falls_from_one_to_a_tenth():
    falling = [anneal(step, 20) for step in range(20)]
    assert falling[0] == 1
    assert falling[-1] == pytest.approx(0.1)
    assert falling == sorted(falling, reverse=True)
    assert anneal(0, 1) == 1


def test_gradients_reach_evidence_and_relations():
    evidence = torch.zeros(4, 4, LAYERS, requires_grad=True, dtype=torch.float64)
    R = torch.from_numpy(relations(6, size=4, share=1.0)).requires_grad_()
    knobs = Knobs(threshold=0.05, epsilon=0.0)
    found = Allocation(evidence, torch.zeros(4, LAYERS, dtype=torch.float64), knobs)
    (found.weights(prior(R, knobs), tau_gate=0.5)[0, 1] ** 2).sum().backward()
    assert evidence.grad[0].abs().min() > 0
    assert evidence.grad[1:].abs().max() == 0
    assert R.grad[0, 1] != 0
    assert R.grad[2, 3] != 0


@pytest.mark.parametrize("select", [{"path": "viterbi", "stay": 1.0}, {"top_k": 1}])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_what_is_selected_away_can_come_back_in_training(select, threshold):
    evidence = torch.zeros(1, 3, LAYERS, requires_grad=True, dtype=torch.float64)
    found = Allocation(evidence, torch.zeros(1, LAYERS), Knobs(threshold=threshold, **select))
    Pi = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    for tau_gate, reached in ((None, False), (0.5, True)):
        weights = found.weights(Pi, tau_gate=tau_gate)
        assert weights[0].tolist() == [[1] * LAYERS, [0] * LAYERS, [0] * LAYERS]
        evidence.grad = None
        weights[0, 2].sum().backward()
        assert bool(evidence.grad[0, 2].abs().min() > 0) == reached
        assert torch.isfinite(evidence.grad).all()


@light
@given(seeds, knobs)
def test_training_and_serving_weigh_alike(seed, knobs):
    R, found = torch.from_numpy(relations(seed)), allocation(seed, knobs)
    Pi = prior(R, knobs)
    torch.testing.assert_close(found.weights(Pi, Pi, tau_gate=0.3), found.weights(Pi, Pi))


@light
@given(seeds)
def test_a_new_node_changes_others_only_by_renormalisation(seed):
    """A row and a column more in the prior: old weights keep their proportions."""
    knobs = Knobs(threshold=0.0, epsilon=0.0)
    before = allocation(seed, knobs, size=4, mass=False)
    Pi = prior(torch.from_numpy(relations(seed, size=4, share=1.0)), knobs)
    share = torch.rand(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.9
    wider = torch.cat([Pi * (1 - share), share], dim=1)
    evidence = torch.cat([before.evidence, torch.zeros(4, 1, LAYERS, dtype=torch.float64)], dim=1)
    after = Allocation(evidence, before.log_mass, knobs).weights(wider)[:, :4]
    torch.testing.assert_close(after / after.sum(dim=1, keepdim=True), before.weights(Pi))
