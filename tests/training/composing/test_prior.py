"""The differentiable prior: the store's own rows, its limits, and gradients down to R_hat."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.graph import Knobs, RelationGraph
from adapters_store.prior import Prior
from tests.strategies import light
from training.composing.prior import diffused, free, prior, relation, rows

seeds = st.integers(0, 2**32 - 1)
knobs = st.builds(
    Knobs,
    normalisation=st.sampled_from(["directed", "symmetric"]),
    diffusion=st.sampled_from(["ppr", "heat", "none"]),
    c=st.floats(0, 0.95),
    h=st.floats(0, 3),
    epsilon=st.sampled_from([0.0, 0.01, 0.1]),
    neighbours=st.sampled_from([None, 1, 3]),
)


def relations(seed, size=5, share=0.6):
    rng = np.random.default_rng(seed)
    R = rng.random((size, size)) * (rng.random((size, size)) < share)
    np.fill_diagonal(R, 1)
    return R


def graph_of(R, knobs):
    tasks = [f"t{i}" for i in range(len(R))]
    edges = {(a, b): float(R[i, j]) for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i != j and R[i, j] > 0}
    return tasks, RelationGraph.of(dict.fromkeys(tasks), edges, knobs=knobs.model_dump())


@light
@given(seeds, knobs)
def test_rows_are_those_that_the_server_computes(seed, knobs):
    R = relations(seed)
    tasks, graph = graph_of(R, knobs)
    served = Prior(graph)
    expected = np.array([[served.row(task).get(module, 0.0) for module in tasks] for task in tasks])
    np.testing.assert_allclose(prior(torch.from_numpy(R), knobs).numpy(), expected, atol=1e-6)


@light
@given(seeds, knobs)
def test_rows_are_distributions(seed, knobs):
    found = prior(torch.from_numpy(relations(seed)), knobs)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(dim=1).numpy(), 1, atol=1e-9)


@pytest.mark.parametrize("knobs", [Knobs(c=0.0), Knobs(diffusion="heat", h=0.0)])
def test_without_diffusion_each_task_has_its_own_module(knobs):
    np.testing.assert_allclose(prior(torch.from_numpy(relations(0)), knobs).numpy(), np.eye(5), atol=1e-12)


@light
@given(seeds)
def test_relation_and_free_are_inverse(seed):
    R = torch.from_numpy(relations(seed, share=1.0))
    torch.testing.assert_close(relation(free(R)), R, atol=2e-4, rtol=0)


@pytest.mark.parametrize("how", ["ppr", "heat"])
def test_gradients_reach_the_relations(how):
    R_hat = free(torch.from_numpy(relations(1, share=1.0))).requires_grad_()
    knobs = Knobs(diffusion=how, epsilon=0.0)
    assert torch.autograd.gradcheck(lambda r: rows(diffused(relation(r), knobs), knobs)[0], [R_hat])
    rows(diffused(relation(R_hat), knobs), knobs)[0, 1].backward()
    off = R_hat.grad[~torch.eye(5, dtype=torch.bool)]
    assert (off != 0).sum() >= 10  # not only the entry itself: paths through others count


def test_a_task_outside_the_graph_walks_from_those_it_is_like():
    tasks, graph = graph_of(relations(2), Knobs(epsilon=0.0))
    served = Prior(graph)
    found = served.row_of({"t0": 3.0, "t2": 1.0})
    for module in tasks:
        assert found.get(module, 0) == pytest.approx(
            0.75 * served.row("t0").get(module, 0) + 0.25 * served.row("t2").get(module, 0)
        )
    assert list(found.values()) == sorted(found.values(), reverse=True)
