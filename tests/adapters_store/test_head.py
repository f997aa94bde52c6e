"""Laws of heads: tasks with any labels and forms share a batch, and heads that do not fit are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters_store.errors import KeysError, LabelsError, ShapeError
from adapters_store.manifest import HeadSpec
from adapters_store.primitives.head import Head, batched, check, reference
from tests.strategies import light, randn
from tests.tolerances import assert_close

WIDTH = 12


def _head(seed: int, num_labels: int, form: str = "linear", bias: bool = True, hidden: str | None = None) -> Head:
    generator = torch.Generator().manual_seed(seed)
    width = WIDTH if hidden is None else WIDTH + 3
    tensors = {"weight": randn(generator, num_labels, width)}
    if bias and form == "linear":
        tensors["bias"] = randn(generator, num_labels)
    if hidden is not None:
        tensors["dense_weight"] = randn(generator, width, WIDTH)
    if hidden is not None and bias:
        tensors["dense_bias"] = randn(generator, width)
    labels = tuple(f"label {i}" for i in range(num_labels))
    spec = HeadSpec(type=form, labels=labels, hidden_activation=hidden, scale=7.0, tensors={})
    return Head(spec, tensors)


heads = st.builds(
    _head,
    seed=st.integers(0, 1000),
    num_labels=st.integers(1, 9),
    form=st.sampled_from(["linear", "linear", "cosine"]),
    bias=st.booleans(),
    hidden=st.sampled_from([None, None, "tanh", "relu", "gelu"]),
)


@light
@given(some=st.lists(heads, min_size=1, max_size=6), data=st.data())
def test_batched_heads_are_the_reference_row_by_row(some: list[Head], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=20))
    pooled = randn(torch.Generator().manual_seed(0), len(chosen), WIDTH)
    for head in some:
        check(head, WIDTH)

    found = batched(chosen, pooled)

    assert [len(logits) for logits in found] == [len(head.spec.labels) for head in chosen]
    for i, (logits, head) in enumerate(zip(found, chosen, strict=True)):
        assert_close(logits, reference(head, pooled[i : i + 1])[0], factor=2)


def test_no_rows_have_no_logits() -> None:
    assert batched([], torch.zeros(0, WIDTH)) == []


def test_cosine_ignores_lengths_and_is_bounded_by_its_scale() -> None:
    head = _head(0, 4, "cosine")
    pooled = randn(torch.Generator().manual_seed(1), 3, WIDTH)

    logits = reference(head, pooled)

    assert_close(reference(head, 100 * pooled), logits)
    assert logits.abs().max() <= 7.0
    assert_close(reference(head, head.tensors["weight"]).diagonal(), torch.full((4,), 7.0))


@pytest.mark.parametrize("form", ["linear", "cosine"])
@pytest.mark.parametrize("hidden", [None, "tanh"])
def test_a_head_in_half_precision_answers_in_float32(form: str, hidden: str | None) -> None:
    head = _head(0, 3, form, hidden=hidden)
    half = Head(head.spec, {name: tensor.bfloat16() for name, tensor in head.tensors.items()})
    pooled = randn(torch.Generator().manual_seed(1), 2, WIDTH)

    found = batched([half, half], pooled)

    assert all(logits.dtype == torch.float32 for logits in found)
    assert_close(torch.stack(found), torch.stack(batched([half.to(torch.device("cpu"))] * 2, pooled)))


def test_a_linear_head_without_bias_in_half_precision_joins_the_others() -> None:
    head = _head(0, 3, bias=False)
    half = Head(head.spec, {"weight": head.tensors["weight"].bfloat16()})

    found = batched([half, _head(1, 2)], torch.ones(2, WIDTH))

    assert [logits.dtype for logits in found] == [torch.float32, torch.float32]


def _bad(labels: tuple[str, ...] = ("a", "b"), **given: object) -> Head:
    tensors: dict[str, Tensor] = {"weight": torch.ones(2, WIDTH)}
    options = {name: given.pop(name) for name in ("type", "hidden_activation") if name in given}
    tensors |= given
    return Head(HeadSpec(labels=labels, tensors={}, **options), tensors)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (Head(HeadSpec(labels=("a",), tensors={}), {}), KeysError, "weight"),
        (_bad(extra=torch.ones(1)), KeysError, "extra"),
        (_bad(labels=("a", "a")), LabelsError, "differ"),
        (_bad(labels=("a", "b", "c")), LabelsError, "3 labels"),
        (_bad(weight=torch.ones(2)), LabelsError, "weight"),
        (_bad(bias=torch.ones(3)), LabelsError, "bias"),
        (_bad(type="cosine", bias=torch.ones(2)), KeysError, "cosine"),
        (_bad(weight=torch.ones(2, WIDTH + 1)), ShapeError, "12 features"),
        (_bad(hidden_activation="tanh"), KeysError, "belong together"),
        (_bad(dense_weight=torch.ones(WIDTH, WIDTH)), KeysError, "belong together"),
        (_bad(hidden_activation="tanh", dense_weight=torch.ones(WIDTH, 5)), ShapeError, "dense_weight"),
        (_bad(hidden_activation="tanh", dense_weight=torch.ones(5, WIDTH)), ShapeError, "5 features"),
        (_bad(dense_bias=torch.ones(WIDTH)), ShapeError, "dense_bias"),
        (
            _bad(hidden_activation="tanh", dense_weight=torch.ones(WIDTH, WIDTH), dense_bias=torch.ones(1)),
            ShapeError,
            "dense_bias",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(head: Head, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(head, WIDTH)
