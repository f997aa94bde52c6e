"""Laws of every primitive: the batched form gives what the reference gives, in any mixture, shape and dtype."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from adapters_store.errors import KeysError, NotFiniteError, ShapeError, UnsupportedError
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import PRIMITIVES, Entry, cost, native, primitive
from adapters_store.primitives.lowrank import LowRankBank
from tests import strategies
from tests.strategies import ENTRIES, OneSite, light
from tests.tolerances import assert_close, assert_same_bits

FORMS = ("native", "dense", "fold")
DTYPES = [torch.float32, torch.bfloat16]
ON_LINEAR = ("lowrank", "scale_shift", "bottleneck")
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(37),
    "LayerNorm without bias": lambda: nn.LayerNorm(37, bias=False),
    "Llama": lambda: LlamaRMSNorm(37, eps=1e-5),
    "Gemma, 1 + weight": lambda: GemmaRMSNorm(37, eps=1e-6),
    "T5": lambda: T5LayerNorm(37),
    "torch": lambda: nn.RMSNorm(37),
}


def _run(one: OneSite, x: Tensor, rows: list[tuple[int, Mix | None]], reference: bool = False) -> Tensor:
    batch = MixedBatch.of(rows, one.sites.num_layers)
    with torch.no_grad(), one.sites.mixing(batch, reference=reference):
        return one.place.module(x)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        parameter.data += 0.3 * strategies.randn(generator, *parameter.shape).to(parameter.dtype)


def _assert_law(data: st.DataObject, make: Callable[[], nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Random adapters of these primitives at one site, a random batch of mixes of them: batched is the reference."""
    one = OneSite.of(make, dtype)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    _randomise(one.sites.backbone, generator)
    num_slots = data.draw(st.integers(1, 10))
    for slot in range(num_slots):
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
        entries = [data.draw(ENTRIES[name])(one.place, generator) for name in chosen]
        one.sites.check(entries)
        one.sites.put(slot, entries)
    rows = data.draw(strategies.rows(num_slots, one.sites.num_layers))
    x = strategies.randn(generator, 1, sum(length for length, _ in rows), one.place.d_in).to(dtype)

    found, expected = _run(one, x, rows), _run(one, x, rows, reference=True)

    assert_close(found, expected, dtype)


def _linear(d_in: int, d_out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(d_in, d_out)


def test_every_primitive_has_a_strategy() -> None:
    assert set(ENTRIES) == set(PRIMITIVES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PRIMITIVES if name != "norm"])
@light
@given(data=st.data())
def test_batched_is_the_reference(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    d_in, d_out = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))

    _assert_law(data, _linear(d_in, d_out), (name,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@light
@given(data=st.data())
def test_every_form_is_the_reference(form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    d_in, d_out = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 130))

    with cost.forced(form):
        _assert_law(data, _linear(d_in, d_out), ("lowrank", "bottleneck"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@light
@given(data=st.data())
def test_primitives_mix_at_one_site(dtype: torch.dtype, data: st.DataObject) -> None:
    _assert_law(data, _linear(33, 47), ON_LINEAR, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
@light
@given(data=st.data())
def test_norm_and_others_mix_at_a_norm(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    _assert_law(data, NORMS[name], tuple(PRIMITIVES), dtype)


@pytest.mark.parametrize("name", NORMS)
def test_norm_alone_is_the_module_with_the_adapters_parameters(name: str) -> None:
    one, generator = OneSite.of(NORMS[name]), torch.Generator().manual_seed(1)
    _randomise(one.sites.backbone, generator)
    entry = strategies.norm(one.place, generator)
    one.sites.put(0, [entry])
    x = 3 * strategies.randn(generator, 11, 37) + 1

    found = _run(one, x, [(11, Mix.one_hot(0, 3))])

    own = NORMS[name]()
    own.load_state_dict(dict(entry.tensors))
    assert_close(found, own(x).detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mix_may_be_wider_than_the_kernel_holds_at_once(form: str, dtype: torch.dtype) -> None:
    one, generator = OneSite.of(_linear(40, 33), dtype), torch.Generator().manual_seed(1)
    ranks = [300, 250, 200, 5, native.MAX_RANK]
    for slot, rank in enumerate(ranks):
        one.sites.put(slot, [strategies.lowrank(one.place, generator, rank)])
    rows = [(19, Mix((3, 0, 4, 1, 2), np.full((5, 3), 0.4, np.float32))), (3, Mix.one_hot(3, 3))]
    x = strategies.randn(generator, 22, 40).to(dtype)

    with cost.forced(form):
        found = _run(one, x, rows)

    assert_close(found, _run(one, x, rows, reference=True), dtype)


def test_a_rank_over_the_kernels_is_served_by_torch() -> None:
    one, generator = OneSite.of(_linear(40, 33)), torch.Generator().manual_seed(1)
    one.sites.put(0, [strategies.lowrank(one.place, generator, native.MAX_RANK + 1)])
    one.sites.put(1, [strategies.lowrank(one.place, generator, 4)])
    rows = [(5, Mix.one_hot(0, 3)), (6, Mix.one_hot(1, 3))]
    x = strategies.randn(generator, 11, 40)

    with cost.forced("native"):
        found = _run(one, x, rows)

    assert_close(found, _run(one, x, rows, reference=True))


def test_one_adapter_may_have_biases_and_the_next_none() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    one.sites.put(0, [strategies.bottleneck(one.place, generator, biases=())])
    one.sites.put(1, [strategies.bottleneck(one.place, generator, biases=("down_bias", "up_bias"))])
    rows = [(3, Mix.one_hot(0, 3)), (4, Mix.one_hot(1, 3))]
    x = strategies.randn(generator, 7, 6)

    with cost.forced("fold"):
        found = _run(one, x, rows)

    assert_close(found, _run(one, x, rows, reference=True))


def test_bottlenecks_in_series_do_not_read_each_others_sum() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    for slot, activation in enumerate(("tanh", "gelu", "identity")):
        one.sites.put(slot, [strategies.bottleneck(one.place, generator, activation=activation, source="y", scale=3.0)])
    rows = [(7, Mix((0, 1, 2), np.ones((3, 3), np.float32)))]
    x = strategies.randn(generator, 7, 6)

    assert_close(_run(one, x, rows), _run(one, x, rows, reference=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_its_neighbours_in_the_kernel(dtype: torch.dtype) -> None:
    one, generator = OneSite.of(_linear(83, 101), dtype), torch.Generator().manual_seed(1)
    bank = LowRankBank(one.place, dtype, torch.device("cpu"))
    for slot, rank in enumerate((3, 8, 16, 40)):
        bank.put(slot, strategies.lowrank(one.place, generator, rank))
    mix = Mix((3, 0, 2), strategies.randn(generator, 3, 3).numpy())
    row, y = strategies.randn(generator, 23, 83).to(dtype), strategies.randn(generator, 23, 101).to(dtype)

    def among(before: int, after: int) -> Tensor:
        x = torch.cat([row.new_ones(before, 83), row, row.new_ones(after, 83)])
        out = torch.cat([y.new_ones(before, 101), y, y.new_ones(after, 101)])
        rows = [(before, Mix.one_hot(1, 3)), (23, mix), (after, None)]
        batch = MixedBatch.of([(length, mix) for length, mix in rows if length], 3)
        with cost.forced("native"), torch.no_grad():
            return bank.add(out.clone(), x, out, batch)[before : before + 23]

    alone = among(0, 0)

    assert_same_bits(among(5, 0), alone)
    assert_same_bits(among(17, 9), alone)


def _with_first_layer(entry: Entry, value: float) -> Entry:
    """The entry with all of A, or of down, at this value."""
    first = "A" if entry.primitive == "lowrank" else "down"
    filled = torch.full_like(entry.tensors[first], value)
    return Entry(entry.site, entry.primitive, {**entry.tensors, first: filled}, entry.options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maker", [strategies.lowrank, strategies.bottleneck])
def test_a_row_ignores_neighbours_adapters_that_overflow_on_it(
    maker: Callable[..., Entry], form: str, dtype: torch.dtype
) -> None:
    one, generator = OneSite.of(_linear(6, 5), dtype), torch.Generator().manual_seed(1)
    one.sites.put(0, [maker(one.place, generator)])
    bad = maker(one.place, generator)
    idle = Mix((0,), np.array([[1, 0, 1]], np.float32))  # does nothing at this site's layer
    rows = [(3, Mix.one_hot(0, 3)), (4, Mix.one_hot(1, 3)), (2, idle)]
    x = (8 + strategies.randn(generator, 9, 6)).to(dtype)
    found = {}

    with cost.forced(form):
        for value in (0.01, torch.finfo(dtype).max / 2):
            one.sites.put(1, [_with_first_layer(bad, value)])
            found[value] = _run(one, x, rows)

    calm, overflowing = found.values()
    assert not overflowing[3:7].isfinite().all()
    assert_same_bits(overflowing[:3], calm[:3])
    assert torch.equal(overflowing[7:], _run(one, x[7:], [(2, None)]))


def test_a_mix_without_weight_at_a_layer_does_not_run_the_first_adapter_instead() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    one.sites.put(0, [_with_first_layer(strategies.lowrank(one.place, generator), 3e38)])
    one.sites.put(1, [strategies.lowrank(one.place, generator)])
    rows = [(4, Mix.one_hot(0, 3)), (2, Mix((1,), np.array([[1, 0, 1]], np.float32)))]
    x = 8 + strategies.randn(generator, 6, 6)

    with cost.forced("fold"):
        found = _run(one, x, rows)

    assert torch.equal(found[4:], _run(one, x[4:], [(2, None)]))


def test_a_slot_without_an_adapter_here_adds_nothing() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    one.sites.put(0, [strategies.lowrank(one.place, generator)])
    x = strategies.randn(generator, 7, 6)

    found = _run(one, x, [(7, Mix((0, 900), np.ones((2, 3), np.float32)))])

    assert_same_bits(found, _run(one, x, [(7, Mix.one_hot(0, 3))]))


def test_module_that_hands_on_its_input_keeps_it() -> None:
    class Hands(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    one = OneSite.of(lambda: Hands(5, 5))
    one.sites.put(0, [strategies.scale_shift(one.place, torch.Generator().manual_seed(1))])
    x = torch.ones(7, 5)

    _run(one, x, [(7, Mix.one_hot(0, 3))])

    assert torch.equal(x, torch.ones(7, 5))


@pytest.mark.parametrize("form", FORMS)
def test_learned_weights_get_gradients_in_every_form_also_where_they_are_zero(form: str) -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    for slot in range(3):
        one.sites.put(slot, [strategies.lowrank(one.place, generator)])
    weights = torch.tensor([[0.5], [0.0], [0.0]]).repeat(1, 3).requires_grad_()
    batch = MixedBatch.of([(4, Mix((0, 1), weights[:2])), (3, Mix((2,), weights[2:]))], 3)

    with cost.forced(form), one.sites.mixing(batch):
        one.place.module(strategies.randn(generator, 7, 6)).square().sum().backward()

    assert weights.grad is not None
    assert (weights.grad[:, 1] != 0).all()


def test_mixes_that_share_a_weight_tensor_but_not_slots_stay_apart() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)
    for slot in range(2):
        one.sites.put(slot, [strategies.lowrank(one.place, generator)])
    weights = torch.ones(1, 3)
    rows = [(4, Mix((0,), weights)), (3, Mix((1,), weights))]
    x = strategies.randn(generator, 7, 6)

    assert_close(_run(one, x, rows), _run(one, x, [(4, Mix.one_hot(0, 3)), (3, Mix.one_hot(1, 3))]))


@pytest.mark.parametrize("name", ["scale_shift", "norm"])
def test_trained_parameters_are_read_anew_after_a_look_without_gradients(name: str) -> None:
    one, generator = OneSite.of(lambda: nn.LayerNorm(5)), torch.Generator().manual_seed(1)
    maker = {"scale_shift": strategies.scale_shift, "norm": strategies.norm}[name]
    tensors = {key: tensor.requires_grad_() for key, tensor in maker(one.place, generator).tensors.items()}
    one.sites.put(0, [Entry(one.place.name, name, tensors)])
    rows, x = [(7, Mix.one_hot(0, 3))], strategies.randn(generator, 7, 5)
    _run(one, x, rows)

    with one.sites.mixing(MixedBatch.of(rows, 3)):
        one.place.module(x).square().sum().backward()

    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors.values())


def _bad(name: str, tensors: dict[str, Tensor], **options: object) -> Entry:
    return Entry("layers.1.site", name, tensors, options)


_A, _B, _v = torch.ones(2, 6), torch.ones(5, 2), torch.ones(5)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (_bad("lowrank", {"A": _A}), KeysError),
        (_bad("lowrank", {"A": _A, "B": _B, "C": _B}), KeysError),
        (_bad("lowrank", {"A": _A, "B": _B}, alpha=1.0), KeysError),
        (_bad("lowrank", {"A": _A, "B": _B}, scale="2"), KeysError),
        (_bad("lowrank", {"A": _A, "B": _B.mT}), ShapeError),
        (_bad("lowrank", {"A": torch.tensor(1.0), "B": _B}), ShapeError),
        (_bad("lowrank", {"A": torch.ones(2), "B": _B}), ShapeError),
        (_bad("scale_shift", {}), KeysError),
        (_bad("scale_shift", {"scale": torch.ones(6)}), ShapeError),
        (_bad("norm", {"weight": _v}), ShapeError),
        (_bad("bottleneck", {"down": _A, "up": _B}, activation="exec"), ShapeError),
        (_bad("bottleneck", {"down": _A, "up": _B}, input="z"), ShapeError),
        (_bad("bottleneck", {"down": _A, "up": _B}, input="y"), ShapeError),
        (_bad("bottleneck", {"down": _A, "up": _B, "up_bias": torch.ones(2)}), ShapeError),
        (_bad("magic", {}), UnsupportedError),
    ],
)
def test_entries_that_do_not_fit_are_refused(entry: Entry, error: type[Exception]) -> None:
    one = OneSite.of(_linear(6, 5))

    with pytest.raises(error):
        one.sites.check([entry])


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("lowrank", {"A": _A, "B": 600 * _B}),
        ("bottleneck", {"down": _A, "up": 600 * _B}),
        ("bottleneck", {"down": _A, "up": _B, "up_bias": 600 * _v}),
    ],
)
def test_a_second_layer_that_the_dtype_cannot_hold_is_refused(name: str, tensors: dict[str, Tensor]) -> None:
    entry = _bad(name, tensors, scale=128.0)  # 76800; float16 ends at 65504

    OneSite.of(_linear(6, 5), torch.bfloat16).sites.check([entry])
    with pytest.raises(NotFiniteError, match=r"torch\.float16"):
        OneSite.of(_linear(6, 5), torch.float16).sites.check([entry])


def test_two_entries_of_one_primitive_at_one_site_are_refused() -> None:
    one, generator = OneSite.of(_linear(6, 5)), torch.Generator().manual_seed(1)

    with pytest.raises(KeysError, match="two lowrank"):
        one.sites.check([strategies.lowrank(one.place, generator), strategies.lowrank(one.place, generator)])


def test_unknown_primitives_are_named_with_what_there_is() -> None:
    with pytest.raises(UnsupportedError, match="lowrank"):
        primitive("magic")
