"""Views of weights, states and labels: their laws, then naive formulas written out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.adapter import Adapter
from adapters_store.kinds import kind
from adapters_store.primitives import Entry
from adapters_store.sites import Sites
from training import step
from training.backbone import LoadedBackbone
from training.export import resident
from training.relations import Matrix, arrow, cka, embedding, gradients, labels, subspace, task2vec, weights

seeds = st.integers(0, 2**32 - 1)


def lora(A: Matrix, B: Matrix, site: str = "layer", scale: float = 1.0) -> Adapter:
    return Adapter([Entry(site, "lowrank", {"A": torch.tensor(A), "B": torch.tensor(B)}, {"scale": scale})])


def adapters_of(generator: np.random.Generator, count: int = 4) -> list[Adapter]:
    """Two sites, ranks 1 to 3; the last adapter lacks the second site."""
    made = []
    for k in range(count):
        rank = int(generator.integers(1, 4))
        parts = [
            lora(generator.normal(size=(rank, 7)), generator.normal(size=(5, rank)), site) for site in ("one", "two")
        ]
        made.append(Adapter([entry for part in parts[: 1 if k == count - 1 else 2] for entry in part.entries]))
    return made


def states_of(generator: np.random.Generator, count: int = 4) -> list[Matrix]:
    return [generator.normal(size=(6, 3)) + generator.normal(size=3) for _ in range(count)]


def fishers_of(generator: np.random.Generator, count: int = 4) -> list[Matrix]:
    return [generator.normal(size=9) ** 2 for _ in range(count)]


def names_of(generator: np.random.Generator, count: int = 4) -> list[list[str]]:
    return [generator.choice(list("abcdef"), size=3, replace=False).tolist() for _ in range(count)]


def points_of(generator: np.random.Generator, count: int = 4) -> list[Matrix]:
    return [generator.normal(size=(2, 9)) for _ in range(count)]  # per task, two points


VIEWS: dict[str, tuple[Callable, Callable[[list], Matrix]]] = {
    "arrow": (adapters_of, arrow.similarity),
    "subspace": (adapters_of, subspace.similarity),
    "cka": (states_of, cka.similarity),
    "embedding": (states_of, embedding.similarity),
    "labels": (names_of, labels.similarity),
    "task2vec": (fishers_of, lambda fishers: task2vec.similarity(np.stack(fishers))),
    "gradients": (points_of, lambda tasks: gradients.similarity(list(torch.tensor(np.stack(tasks, axis=1))))),
}
SIGNED = ("embedding", "gradients")


@pytest.mark.parametrize("name", VIEWS)
@given(seeds, st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_a_view_is_symmetric_bounded_one_on_its_diagonal_and_knows_no_order(
    name: str, seed: int, order: list[int]
) -> None:
    make, view = VIEWS[name]
    given_ = make(np.random.default_rng(seed))

    found = view(given_)

    np.testing.assert_allclose(found, found.T, atol=1e-9)
    assert np.diagonal(found).tolist() == [1] * 4
    assert found.max() <= 1
    assert found.min() >= (-1 if name in SIGNED else 0)
    np.testing.assert_allclose(view([given_[k] for k in order]), found[np.ix_(order, order)], atol=1e-9)


@pytest.mark.parametrize("name", VIEWS)
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_a_task_that_is_another_one_again_is_related_to_it_most(name: str, seed: int) -> None:
    make, view = VIEWS[name]
    tasks = make(np.random.default_rng(seed))

    found = view([*tasks, tasks[0]])

    assert found[0, 4] == pytest.approx(1)


@given(seeds, st.floats(-3, 3).filter(lambda s: abs(s) > 0.01))
@settings(max_examples=30, deadline=None)
def test_arrow_is_the_top_singular_vector_of_the_dense_delta(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    A, B = generator.normal(size=(3, 7)), generator.normal(size=(5, 3))
    other = generator.normal(size=(2, 7)), generator.normal(size=(5, 2))

    v = np.linalg.svd(scale * B @ A)[2][0]
    w = np.linalg.svd(other[1] @ other[0])[2][0]

    found = arrow.similarity([lora(A, B, scale=scale), lora(*other)])
    assert found[0, 1] == pytest.approx(abs(v @ w), abs=1e-9)


def test_prototypes_are_unit_rows_by_site_and_zero_where_nothing_acts(backbone: LoadedBackbone) -> None:
    sites: Sites = backbone.encoder.sites
    method = kind("lora")
    q, v = (method.sites(sites, method.Config(target_modules=(role,))) for role in ("q", "v"))
    generator = torch.Generator().manual_seed(0)

    def trained(names: list[str]) -> Adapter:
        shapes = [(name, sites[name].place) for name in names]
        return Adapter([
            Entry(name, "lowrank", {"A": torch.randn(2, p.d_in, generator=generator),
                                    "B": torch.randn(p.d_out, 2, generator=generator)}, {"scale": 2.0})
            for name, p in shapes
        ])  # fmt: skip

    adapters = [trained(q), trained(q + v), Adapter([])]
    found = arrow.prototypes(adapters, sites)

    assert set(found) == {*q, *v}
    layers = [sites[name].place.layer for name in found]
    assert layers == sorted(layers)
    assert all(rows.shape == (3, 32) for rows in found.values())
    assert [float(row.norm()) for row in found[v[0]]] == pytest.approx([0, 1, 0])
    entry = adapters[0].entries[0]
    top = torch.linalg.svd(entry.tensors["B"].double() @ entry.tensors["A"].double())[2][0]
    assert float((found[entry.site][0] @ top).abs()) == pytest.approx(1)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_subspaces_do_not_depend_on_the_factors_that_span_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    A, C = generator.normal(size=(3, 8)), generator.normal(size=(2, 8))
    M = generator.normal(size=(3, 3)) + 3 * np.eye(3)
    B = [generator.normal(size=(5, rank)) for rank in (3, 3, 2)]

    found = subspace.similarity([lora(A, B[0]), lora(M @ A, B[1]), lora(C, B[2])])

    U, V = np.linalg.qr(A.T)[0], np.linalg.qr(C.T)[0]
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(found[1, 2])
    assert found[0, 2] == pytest.approx(np.sum((U.T @ V) ** 2) / 2)


def test_a_subspace_within_another_overlaps_wholly() -> None:
    eye = np.eye(4)

    assert subspace.overlap(subspace.basis(eye[:1]), subspace.basis(eye[:3])) == pytest.approx(1)
    assert subspace.overlap(subspace.basis(eye[:2]), subspace.basis(eye[2:])) == pytest.approx(0)
    assert subspace.basis(np.stack([eye[0], 2 * eye[0]])).shape == (4, 1)
    assert subspace.overlap(subspace.basis(np.zeros((2, 4))), subspace.basis(eye)) == 0


@given(seeds, st.floats(0.1, 10), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_cka_ignores_rotation_scale_and_shift(seed: int, scale: float, texts: int) -> None:
    generator = np.random.default_rng(seed)
    X, Y = generator.normal(size=(texts, 4)), generator.normal(size=(texts, 6))
    rotation = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    Xc, Yc = X - X.mean(axis=0), Y - Y.mean(axis=0)

    expected = np.sum((Yc.T @ Xc) ** 2) / np.linalg.norm(Xc.T @ Xc) / np.linalg.norm(Yc.T @ Yc)

    assert cka.linear(X, Y) == pytest.approx(expected)
    assert cka.linear(scale * X @ rotation + 3, Y) == pytest.approx(cka.linear(X, Y))
    assert cka.linear(X, scale * X @ rotation) == pytest.approx(1)
    assert cka.linear(np.ones((texts, 3)), Y) == 0


def test_states_under_an_adapter_are_those_that_it_serves(backbone: LoadedBackbone) -> None:
    method = kind("lora")
    config, sites = method.Config(), backbone.encoder.sites
    generator = torch.Generator().manual_seed(1)
    entries = [
        entry
        for name in method.sites(sites, config)
        for entry in method.export(
            sites[name].place,
            {k: torch.randn(t.shape, generator=generator) / 4
             for k, t in method.parameters(sites[name].place, config, generator).items()},
            config,
        )
    ]  # fmt: skip
    rows = backbone.encode(["the book was good", "a very bad film and so"], 32)

    bare = step.pool(backbone.encoder, rows, "mean", 64).numpy()
    [found] = cka.states_under(backbone, [Adapter(entries)], rows, "mean", 16)

    with resident(backbone, Adapter(entries)) as mix:
        alone = [backbone.encoder.pool([row], [mix], ["mean"])[0].detach().numpy() for row in rows]
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)
    assert np.abs(found - bare).max() > 0.01
    np.testing.assert_allclose(step.pool(backbone.encoder, rows, "mean", 64).numpy(), bare)  # nothing stays behind


def test_label_names_are_compared_as_people_read_them() -> None:
    found = labels.similarity([["Card_Lost", "top-up"], ["card lost", "Top  up "], ["card lost", "refund", "fee"], []])

    assert found[0].tolist() == [1, 1, 0.25, 0]
    assert found[3].tolist() == [0, 0, 0, 1]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_task2vec_is_its_formula_and_ignores_a_common_scale_per_parameter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(2, 9)) ** 2
    scale = generator.uniform(1e-3, 1e3, size=9)

    p, q = a / (a + b), b / (a + b)
    found = task2vec.similarity(np.stack([a, b]))

    assert found[0, 1] == pytest.approx(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
    np.testing.assert_allclose(task2vec.similarity(np.stack([a, b]) * scale), found)


def test_task2vec_of_tasks_without_a_common_parameter_is_zero() -> None:
    assert task2vec.similarity(np.array([[1.0, 0, 0], [0, 2.0, 0]]))[0, 1] == 0
    assert task2vec.similarity(np.zeros((2, 3)))[0, 1] == 0
    assert task2vec.similarity(np.full((2, 3), 1e-200))[0, 1] == pytest.approx(1)


def test_opposite_gradients_conflict() -> None:
    g = torch.tensor([1.0, 2.0, -1.0])

    found = gradients.similarity([[g, -3 * g, torch.tensor([2.0, -1.0, 0.0])]])

    assert found[0, 1] == pytest.approx(-1)
    assert found[0, 2] == pytest.approx(0)


def test_adapters_without_factors_have_no_relation_in_views_of_factors(backbone: LoadedBackbone) -> None:
    method = kind("ssf")
    sites = backbone.encoder.sites
    name = method.sites(sites, method.Config())[0]
    values = method.parameters(sites[name].place, method.Config(), torch.Generator())
    adapter = Adapter(method.export(sites[name].place, values, method.Config()))

    for view in (arrow.similarity, subspace.similarity):
        assert view([adapter, Adapter([])]).tolist() == [[1, 0], [0, 1]]
    assert weights.similarity([adapter, Adapter([])], sites).tolist() == [[1, 0], [0, 1]]
