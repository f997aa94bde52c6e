"""Merged updates: TIES and DARE against brute force and PEFT, and served exactly."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.adapter import Adapter
from training import seeds
from training.baselines import dare, merging, task_arithmetic, ties
from training.baselines.answering import alike, under
from training.suite.methods import Nodes
from training.suite.modules import uniform
from training.suite.workbench import Workbench

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.utils import merge_utils


def brute_force_ties(tau: Tensor, density: float) -> Tensor:
    """Entry by entry, as the paper's text has it."""
    kept = int(density * tau[0].numel())
    trimmed = []
    for one in tau.flatten(1).tolist():
        largest = sorted(range(len(one)), key=lambda i: -abs(one[i]))[:kept]
        trimmed.append([value if i in largest else 0.0 for i, value in enumerate(one)])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).view(tau.shape[1:])


def updates(seed: int, count: int = 4, d_out: int = 6, d_in: int = 5) -> Tensor:
    return torch.randn(count, d_out, d_in, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([0.2, 0.5, 0.9]))
def test_ties_is_the_paper_s_and_peft_s(seed: int, count: int, density: float) -> None:
    tau = updates(seed, count)
    found = ties.merge(tau, "any", density)
    torch.testing.assert_close(found, brute_force_ties(tau, density))
    torch.testing.assert_close(found, merge_utils.ties(list(tau), torch.ones(count), density))


@given(st.integers(0, 1000))
def test_ties_of_equal_signs_without_trimming_is_the_mean(seed: int) -> None:
    tau = updates(seed).abs() + 0.1
    torch.testing.assert_close(ties.merge(tau, "any", 1.0), tau.mean(dim=0))


def test_dare_is_peft_s_given_the_masks() -> None:
    tau, density = updates(0), 0.5
    dropped = dare.drop(tau, density, seeds.generator(3, "dare", "any", density))
    linear, elected = (dare.merge(tau, "any", form, density, seed=3) for form in ("linear", "ties"))
    torch.testing.assert_close(linear, merge_utils.task_arithmetic(list(dropped), torch.full((4,), 0.25)))
    mask = merge_utils.calculate_majority_sign_mask(dropped)
    torch.testing.assert_close(elected, merge_utils.disjoint_merge(dropped, mask))


def test_dare_keeps_and_rescales() -> None:
    tau = updates(1)
    dropped = dare.drop(tau, 0.25, torch.Generator().manual_seed(0))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 4 * tau[kept])
    assert 0.1 < float(kept.float().mean()) < 0.4


def test_dare_s_mean_over_seeds_nears_the_mean() -> None:
    tau = updates(2)
    errors = []
    for count in (10, 1000):
        found = torch.stack([dare.merge(tau, "any", "linear", 0.5, seed) for seed in range(count)]).mean(dim=0)
        errors.append(float((found - tau.mean(dim=0)).abs().max()))
    assert errors[1] < 0.15
    assert errors[1] < errors[0] / 3


def test_updates_are_the_dense_ones_and_zero_where_an_adapter_is_not(nodes: Nodes) -> None:
    site = merging.sites_of(nodes.adapters)[0]
    without = Adapter([entry for entry in nodes.adapters[1].entries if entry.site != site])
    found = merging.updates([nodes.adapters[0], without], site)
    entry = next(entry for entry in nodes.adapters[0].entries if entry.site == site)
    torch.testing.assert_close(found[0], 1.5 * entry.tensors["B"] @ entry.tensors["A"])
    assert not found[1].any()


@pytest.mark.parametrize(("d_out", "d_in"), [(4, 7), (7, 4), (5, 5)])
def test_a_dense_update_is_served_at_the_narrower_side(d_out: int, d_in: int) -> None:
    update = torch.randn(d_out, d_in)
    entry = merging.as_entry("any", update)
    assert entry.tensors["A"].shape[0] == min(d_out, d_in)
    assert torch.equal(entry.tensors["B"] @ entry.tensors["A"], update)


def test_the_mean_merged_is_uniform_and_lambda_one_over_k(bench: Workbench, nodes: Nodes) -> None:
    size, layers = len(bench.tasks), bench.num_layers
    mean = merging.merged(nodes, lambda tau, site: tau.mean(dim=0))
    expected = under(bench, nodes, uniform(size, size, layers))(bench.test)
    served = under(bench, mean, torch.ones(size, 1, layers))(bench.test)
    arithmetic = under(bench, nodes, alike(torch.full((size,), 1 / size), size, layers))(bench.test)
    for one, two, three in zip(expected, served, arithmetic, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
        assert torch.equal(three, one)


def test_the_grid_of_lambdas_has_the_means_in_it() -> None:
    assert task_arithmetic.grid(16) == [0.05, 0.062, 0.1, 0.125, 0.188, 0.2, 0.25, 0.3, 0.5]
    assert 1 / 4 in task_arithmetic.grid(4)
