"""Weights per token: exact to a Mix where constant, differentiable, and the routers on top of them."""

import pytest
import torch
from torch import Tensor

from adapters_store.packing import PACKED
from training.baselines import adapterfusion, arrow, phatgoose, xlora
from training.baselines.answering import layered, under
from training.baselines.tokenwise import At, Gate, pool, pool_all, stacks
from training.suite.joint import Recipe
from training.suite.methods import Nodes, pooled_bare
from training.suite.workbench import Workbench


def constant(rows: Tensor, t: int) -> Gate:
    return lambda at: rows[t].expand(len(at.x), -1)


def test_a_constant_gate_is_a_mix(bench: Workbench, nodes: Nodes) -> None:
    rows = torch.rand(3, 3)
    expected = under(bench, nodes, layered(rows, bench.num_layers))(bench.test)
    stacked = stacks(bench, nodes.adapters)
    for t, texts in enumerate(bench.test):
        found = pool_all(bench, stacked, texts, lambda _, t=t: constant(rows, t))
        torch.testing.assert_close(found, expected[t], rtol=1e-4, atol=1e-4)


def test_every_token_knows_its_row(bench: Workbench, nodes: Nodes) -> None:
    """Rows of different weights in one forward, shuffled lengths, each get their own."""
    stacked, texts, rows = stacks(bench, nodes.adapters), bench.test[0], torch.rand(len(bench.test[0]), 3)
    found = pool_all(bench, stacked, texts, lambda chosen: lambda at: rows[chosen][at.row])
    for i in range(len(texts)):
        alone = pool(bench, stacked, texts.take([i]), constant(rows, i))
        torch.testing.assert_close(found[[i]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["arrow", "phatgoose", "adapterfusion"])
def test_no_text_sees_its_neighbours(name: str, bench: Workbench, nodes: Nodes) -> None:
    stacked, texts = stacks(bench, nodes.adapters), bench.test[0]
    vectors = {stack.site: torch.randn(stack.count, stack.A.shape[1]) for stack in stacked}
    fusion = adapterfusion.Fusion(stacked, 0)
    gates = {"arrow": arrow.gate_of(stacked), "phatgoose": phatgoose.router(vectors), "adapterfusion": fusion.gate}
    together = pool(bench, stacked, texts, gates[name])
    for i in range(len(texts)):
        alone = pool(bench, stacked, texts.take([i]), gates[name])
        torch.testing.assert_close(alone, together[[i]], rtol=1e-3, atol=1e-3)


def test_a_padded_backbone_counts_padding(bench: Workbench, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    if bench.tail.first:
        pytest.skip("a tail keeps states of unpadded rows")
    stacked, texts, rows = stacks(bench, nodes.adapters), bench.test[0], torch.rand(len(bench.test[0]), 3)
    expected = pool(bench, stacked, texts, lambda at: rows[at.row])
    encoder = bench.tail.encoder
    monkeypatch.setattr(encoder, "is_packed", False)
    encoder.model.set_attn_implementation("eager")
    try:
        found = pool(bench, stacked, texts, lambda at: rows[at.row])
    finally:
        encoder.model.set_attn_implementation(PACKED)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_nothing_stays_behind(bench: Workbench, nodes: Nodes) -> None:
    before = pooled_bare(bench, bench.test)
    with pytest.raises(RuntimeError, match="out"):
        pool(bench, stacks(bench, nodes.adapters), bench.test[0], _fails)
    for one, two in zip(before, pooled_bare(bench, bench.test), strict=True):
        assert torch.equal(one, two)


def _fails(at: At) -> Tensor:
    raise RuntimeError("out")


def test_the_gradient_of_a_gate_is_that_of_finite_differences(bench: Workbench, nodes: Nodes) -> None:
    stacked, texts = stacks(bench, nodes.adapters), bench.test[0].take([0, 1])
    weights = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)

    def value(row: Tensor) -> Tensor:
        return pool(bench, stacked, texts, lambda at: row.expand(len(at.x), -1)).square().mean()

    value(weights).backward()
    with torch.no_grad():
        for k in range(3):
            step = 1e-2 * torch.eye(3)[k]
            numeric = (value(weights + step) - value(weights - step)) / 2e-2
            torch.testing.assert_close(weights.grad[k], numeric, rtol=0.05, atol=1e-3)


def test_arrow_s_prototypes_are_singular_vectors_of_the_dense_update(bench: Workbench, nodes: Nodes) -> None:
    for stack in stacks(bench, nodes.adapters):
        found = arrow.prototypes(stack)
        for k in range(stack.count):
            mine = stack.owner == k
            expected = torch.linalg.svd(stack.B[:, mine].double() @ stack.A[mine].double()).Vh[0].float()
            torch.testing.assert_close(found[k] * torch.sign(found[k] @ expected), expected, rtol=1e-4, atol=1e-4)


def test_top_softmax_is_a_softmax_of_the_largest() -> None:
    found = arrow.top_softmax(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]]), 2)
    expected = torch.tensor([[0, 1, 0], [0.5, 0.5, 0]]) + torch.tensor([[0, -1, 1], [0, 0, 0]]) / (1 + torch.e)
    torch.testing.assert_close(found, expected)


def test_phatgoose_trains_the_gate_of_a_token_s_own_adapter(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    stacked, nothing = stacks(bench, nodes.adapters), torch.zeros(4, 1)
    vectors = {stack.site: torch.zeros(stack.count, stack.A.shape[1]) for stack in stacked}
    x = torch.randn(4, stacked[0].A.shape[1])
    at = At(stacked[0], x, nothing, nothing, torch.tensor([0, 0, 1, 1]))
    found = phatgoose.own_gate(vectors, torch.tensor([2, 0]))(at)
    assert torch.equal(found, torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0.5, 0, 0], [0.5, 0, 0]]))
    trained, losses = phatgoose.trained(bench, nodes, stacked, recipe)
    assert all(bool(vector.any(dim=1).all()) for vector in trained.values())
    assert len(losses) == 4


def test_xlora_starts_uniform_and_learns(bench: Workbench, nodes: Nodes, recipe: Recipe) -> None:
    pooled = torch.randn(2, bench.hidden_size)
    start = xlora.Scaler(bench, 3)(pooled)
    torch.testing.assert_close(start, torch.full((2, bench.num_layers, 3), 1 / 3))
    scaler, _ = xlora.trained(bench, nodes, stacks(bench, nodes.adapters), recipe)
    found = scaler(pooled)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(2, bench.num_layers))
    assert not torch.allclose(found, start, atol=1e-4)


def test_adapterfusion_s_gradient_reaches_all_its_parameters(bench: Workbench, nodes: Nodes) -> None:
    stacked = stacks(bench, nodes.adapters)
    fusion = adapterfusion.Fusion(stacked, 0)
    pool(bench, stacked, bench.train[0], fusion.gate, fusion.value).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in fusion.tensors())


def test_adapterfusion_s_scores_are_those_of_the_adapters_outputs(bench: Workbench, nodes: Nodes) -> None:
    stack = stacks(bench, nodes.adapters)[0]
    x, y = torch.randn(5, stack.A.shape[1]), torch.randn(5, stack.B.shape[0])
    hidden = x @ stack.A.mT
    fusion = adapterfusion.Fusion([stack], 0)
    part = fusion.parts[stack.site]
    outputs = torch.stack([(hidden * (stack.owner == k)) @ stack.B.mT for k in range(stack.count)], dim=1)  # (5, K, d)
    query = y / y.square().mean(dim=1, keepdim=True).sqrt() @ part.Q.mT
    scores = torch.einsum("nm,nkm->nk", query, outputs @ part.K.mT)
    size = ((hidden.square() * stack.B.square().sum(dim=0)).sum(dim=1, keepdim=True) / 3).sqrt()
    found = fusion.gate(At(stack, x, y, hidden, torch.zeros(5, dtype=torch.int64)))
    torch.testing.assert_close(found, (scores / size / adapterfusion.WIDTH**0.5).softmax(dim=1))
