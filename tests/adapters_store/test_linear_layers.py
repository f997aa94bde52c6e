"""Layers laid out for the kernel give what they gave, hold their weights once, and come back bit for bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters_store import linear_layers
from tests.adapters_store.native_linear import DTYPES, needs_kernel
from tests.tolerances import assert_same_bits


class Layered(nn.Module):
    """Two layers as a backbone has them: their forward is the one that knows strips."""

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name for it
            return linear_layers.forward(self, input)

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 300) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = self.Layer(width, width), self.Layer(width, width, bias=False)
        self.to(dtype).requires_grad_(False)
        self.x = torch.randn(5, width, dtype=dtype)

    def forward(self) -> Tensor:
        return self.second(self.first(self.x))

    def lay_out(self) -> bool:
        return linear_layers.lay_out(self, [self.first, self.second], self)


def tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype == torch.bfloat16 else 1e-4


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_laid_out_gives_the_same_and_has_no_second_copy_of_its_weights(dtype: torch.dtype) -> None:
    model = Layered(dtype)
    expected, bias = model(), model.first.bias

    assert model.lay_out()

    torch.testing.assert_close(model(), expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert all(layer.weight.is_meta and layer.weight.shape == (300, 300) for layer in (model.first, model.second))
    assert model.first.weight.dtype == dtype
    assert model.first.bias is bias


@needs_kernel
def test_weights_are_put_back_bit_for_bit() -> None:
    model = Layered()
    weight = model.first.weight.clone()
    model.lay_out()

    linear_layers.put_back(model.first)
    linear_layers.put_back(model.first)  # twice is once

    assert_same_bits(model.first.weight, weight)
    assert not model.first.weight.requires_grad


@needs_kernel
def test_a_weight_that_another_module_reads_too_stays() -> None:
    model = Layered()
    table = nn.Embedding(300, 300)
    table.weight = model.first.weight
    model.table = table
    expected = model()

    assert model.lay_out()

    assert not table.weight.is_meta
    assert model.first.weight is table.weight
    assert model.second.weight.is_meta
    torch.testing.assert_close(model(), expected)


@needs_kernel
@pytest.mark.parametrize("wrong", ["raises", "differs"])
def test_nothing_is_laid_out_where_the_model_would_not_give_the_same(wrong: str) -> None:
    model = Layered()
    expected = model()

    def run() -> Tensor:  # a model that reads a weight past its layer's forward
        if not model.first.weight.is_meta:
            return model()
        return model.x @ model.first.weight.mT + model.x.mean() if wrong == "raises" else 2 * model()

    assert not linear_layers.lay_out(model, [model.first, model.second], run)

    assert not model.first.weight.is_meta
    assert_same_bits(model(), expected)


@needs_kernel
def test_small_layers_other_dtypes_and_what_is_trained_stay_as_they_are() -> None:
    trained = Layered().requires_grad_(True)

    for model in (Layered(width=32), Layered(torch.float64), trained):
        assert not model.lay_out()
        assert not model.first.weight.is_meta


@needs_kernel
def test_gradients_to_x_and_what_the_kernel_cannot_take_are_torchs() -> None:
    model = Layered()
    before = model.first.weight.clone()
    model.lay_out()
    x = model.x.clone().requires_grad_()

    model.first(x).sum().backward()

    torch.testing.assert_close(x.grad, before.sum(0).expand(5, 300), atol=1e-4, rtol=1e-4)
    assert model.first(torch.empty(2, 0, 300)).shape == (2, 0, 300)
    model.first.bias = nn.Parameter(torch.randn(600)[::2], requires_grad=False)
    torch.testing.assert_close(model.first(model.x), F.linear(model.x, before, model.first.bias))
    with pytest.raises(RuntimeError):
        model.first(model.x.double())
    with pytest.raises(RuntimeError):
        model.first(model.x[:, :150])


def test_layers_as_loaded_keep_their_gradients() -> None:
    for part in ("x", "weight", "bias"):
        layer, x = nn.Linear(300, 300).requires_grad_(False), torch.randn(120, 300)
        wanted = x if part == "x" else getattr(layer, part)
        wanted.requires_grad_()

        linear_layers.forward(layer, x).sum().backward()

        assert wanted.grad is not None
        assert wanted.grad.abs().sum() > 0


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 512), (1, 300, 512), (2, 3, 50, 512)])
def test_layers_as_loaded_are_torchs_whichever_library_multiplies(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = torch.nn.Linear(512, 640, bias=has_bias), torch.randn(shape)

    with torch.no_grad():
        found = linear_layers.forward(layer, x)
        strided = linear_layers.forward(layer, torch.randn(300, 1024)[:, ::2])

    assert torch.allclose(found, layer(x), atol=1e-4)
    assert found.shape == (*shape[:-1], 640)
    assert strided.shape == (300, 640)
    assert linear_layers.forward(layer, x.requires_grad_()).requires_grad
