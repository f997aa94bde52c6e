"""Laws of every kind: identity at the start, honest counts, gradients everywhere, a faithful way to the server."""

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig

from adapters_store.adapter import Adapter, check, pack, unpack
from adapters_store.encoder import Encoder
from adapters_store.errors import AllZeroError, NoSiteError, NotFiniteError, RankError, UnsupportedError
from adapters_store.kinds import KINDS, Kind, KindConfig, Parameters, kind
from adapters_store.manifest import HeadSpec
from adapters_store.mixing import Mix, MixedBatch
from adapters_store.primitives import Entry, Place, primitive
from adapters_store.primitives.head import Head
from tests.tolerances import assert_close, assert_same_bits

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "llama": LlamaConfig(**SMALL | IDS, num_key_value_heads=2),
    "gpt2": GPT2Config(**IDS, vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
}
# Kinds that bring no parameters of their own, by design.
WITHOUT_PARAMETERS = {"head"}
# What to vary besides the defaults, by kind.
VARIANTS: dict[str, list[dict]] = {
    "lora": [
        {"r": 3, "lora_alpha": 5.0, "target_modules": ("all-linear",)},
        {"use_rslora": True, "target_modules": ("q", "o"), "rank_pattern": {"o_proj": 2, "c_proj": 2, "dense": 2}},
    ],
    "bottleneck": [
        {"mode": "parallel", "r": 5, "activation": "gelu", "scale": 4.0},
        {"r": 4, "bias": False, "activation": "tanh"},
    ],
}
CASES = [(name, changes) for name in KINDS for changes in [{}, *VARIANTS.get(name, [])]]
TRAINED = [case for case in CASES if case[0] not in WITHOUT_PARAMETERS]
ROWS = [[(7 * i + 3 * n) % 90 + 4 for i in range(length)] for n, length in enumerate((5, 12, 12, 3))]


def _named(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


class Trainee:
    """A kind's fresh adapter on a tiny backbone, in slot 0."""

    def __init__(self, name: str, changes: dict, family: str = "bert") -> None:
        torch.manual_seed(0)
        self.encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS[family])), keeps_reference=True)
        self.kind: Kind = kind(name)
        self.config: KindConfig = self.kind.Config(**changes)
        self.places = [self.encoder.sites[site].place for site in self.kind.sites(self.encoder.sites, self.config)]
        generator = torch.Generator().manual_seed(1)
        self.parameters: list[Parameters] = [
            {name: tensor.requires_grad_() for name, tensor in fresh.items()}
            for fresh in (self.kind.parameters(place, self.config, generator) for place in self.places)
        ]

    def tensors(self) -> list[Tensor]:
        return [tensor for parameters in self.parameters for tensor in parameters.values()]

    def entries(self) -> list[Entry]:
        pairs = zip(self.places, self.parameters, strict=True)
        return [entry for place, own in pairs for entry in self.kind.export(place, own, self.config)]

    def shake(self) -> None:
        """Away from the start, where some gradients are zero by design."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for tensor in self.tensors():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)

    def pooled(self, entries: list[Entry] | None = None) -> Tensor:
        """Mean hidden states of ROWS under the adapter alone."""
        entries = self.entries() if entries is None else entries
        if entries:
            self.encoder.sites.put(0, entries)
        mix = Mix.one_hot(0, self.encoder.num_layers)
        return self.encoder.pool(ROWS, [mix] * len(ROWS), ["mean"] * len(ROWS))

    def bare(self) -> Tensor:
        with torch.no_grad():
            return self.encoder.pool(ROWS, [None] * len(ROWS), ["mean"] * len(ROWS))


def _checksum(model: nn.Module) -> str:
    tensors = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)).hexdigest()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=_named)
def test_a_fresh_adapter_changes_nothing(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)

    with torch.no_grad():
        fresh = trainee.pooled()

    assert (fresh - trainee.bare()).abs().max() <= 1e-6


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=_named)
def test_the_formula_counts_what_is_trained(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)

    for place, parameters in zip(trainee.places, trainee.parameters, strict=True):
        trained = sum(tensor.numel() for tensor in parameters.values())
        assert trainee.kind.num_parameters(place, trainee.config) == trained


@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_a_kind_with_parameters_acts_somewhere(case: tuple[str, dict]) -> None:
    trainee = Trainee(*case)
    trainee.shake()

    with torch.no_grad():
        shaken = trainee.pooled()

    assert (shaken - trainee.bare()).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_gradients_reach_every_parameter(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)
    trainee.shake()

    loss = (trainee.pooled() * torch.linspace(-1, 1, 32)).square().sum()
    loss.backward()

    for tensor in trainee.tensors():
        assert tensor.grad is not None
        assert tensor.grad.any()


@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_gradients_are_those_of_the_reference(case: tuple[str, dict]) -> None:
    trainee = Trainee(*case)
    trainee.shake()
    place, own = trainee.places[0], trainee.parameters[0]
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(9, place.d_in, generator=generator), torch.randn(9, place.d_out, generator=generator)
    entries = trainee.kind.export(place, own, trainee.config)

    slow = sum(primitive(entry.primitive).delta(place, entry, x, y) for entry in entries)
    expected = torch.autograd.grad(slow.square().sum(), list(own.values()))

    site = trainee.encoder.sites[place.name]
    trainee.encoder.sites.put(0, trainee.kind.export(place, own, trainee.config))
    batch = MixedBatch.of([(9, Mix.one_hot(0, trainee.encoder.num_layers))], trainee.encoder.num_layers)
    fast = sum(bank.add(torch.zeros_like(y), x, y, batch) for bank in site.banks.values())
    found = torch.autograd.grad(fast.square().sum(), list(own.values()))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_gradients_are_finite_differences_in_float64(case: tuple[str, dict]) -> None:
    name, changes = case
    module = nn.LayerNorm(6) if name == "norm" else nn.Linear(6, 5)
    place = Place("toy", module.double(), 6, 6 if name == "norm" else 5, 0)
    config = kind(name).Config(**changes)
    generator = torch.Generator().manual_seed(1)
    fresh = kind(name).parameters(place, config, generator)
    names = list(fresh)
    x, y = torch.randn(3, 6).double(), torch.randn(3, place.d_out).double()

    def out(*tensors: Tensor) -> Tensor:
        entries = kind(name).export(place, dict(zip(names, tensors, strict=True)), config)
        return sum(primitive(entry.primitive).delta(place, entry, x, y) for entry in entries)

    shaken = [tensor.double() + 0.3 * torch.randn(tensor.shape).double() for tensor in fresh.values()]
    assert torch.autograd.gradcheck(out, [tensor.requires_grad_() for tensor in shaken], fast_mode=True)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_training_lowers_a_loss_and_leaves_the_backbone(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)
    before, target = _checksum(trainee.encoder.model), trainee.bare().roll(1, dims=0)
    optimiser, losses = torch.optim.AdamW(trainee.tensors(), lr=1e-3, weight_decay=0), []

    for _ in range(6):
        loss = (trainee.pooled() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert _checksum(trainee.encoder.model) == before
    assert all(parameter.grad is None for parameter in trainee.encoder.model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_what_is_exported_fits_its_sites(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)
    trainee.shake()

    entries = trainee.entries()

    assert {entry.site for entry in entries} == {place.name for place in trainee.places}
    check(Adapter(entries), trainee.encoder.sites, max_rank=64)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_what_is_trained_is_what_is_served(case: tuple[str, dict], family: str) -> None:
    trainee = Trainee(*case, family=family)
    trainee.shake()
    trained = trainee.pooled().detach()

    kept = pack(Adapter(trainee.entries(), _head()))
    loaded = unpack(kept.sites, kept.head, kept.tensors)
    with torch.no_grad():
        served = trainee.pooled(list(loaded.entries))

    assert_close(served, trained, factor=3)
    assert not any(tensor.requires_grad for entry in loaded.entries for tensor in entry.tensors.values())
    assert loaded.head is not None
    assert_same_bits(loaded.head.tensors["weight"], _head().tensors["weight"])


def _head() -> Head:
    return Head(HeadSpec(labels=("a", "b"), tensors={}), {"weight": torch.arange(64.0).reshape(2, 32)})


@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_kinds_share_a_batch(case: tuple[str, dict]) -> None:
    trainee = Trainee(*case)
    trainee.shake()
    encoder = trainee.encoder
    encoder.sites.put(0, trainee.entries())
    other = Trainee("lora", {"r": 2})
    other.shake()
    encoder.sites.put(1, other.entries())
    one, two = (Mix.one_hot(slot, encoder.num_layers) for slot in range(2))

    with torch.no_grad():
        mixed = encoder.pool(ROWS, [one, two, None, one], ["mean"] * 4)
        alone = [encoder.pool([row], [mix], ["mean"]) for row, mix in zip(ROWS, (one, two, None, one), strict=True)]

    assert_close(mixed, torch.cat(alone), factor=3)
    assert_same_bits(mixed[2], trainee.bare()[2])


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_has_one_name(name: str) -> None:
    assert kind(name).name == name
    assert kind(name).Config.model_config["extra"] == "forbid"


def test_an_unknown_kind_is_refused_with_what_there_is() -> None:
    with pytest.raises(UnsupportedError, match="lora"):
        kind("magic")


def test_lora_scales_as_its_paper_says() -> None:
    trainee = Trainee("lora", {"r": 4, "lora_alpha": 6.0, "target_modules": ("q",)})
    stable = Trainee("lora", {"r": 4, "lora_alpha": 6.0, "use_rslora": True, "target_modules": ("q",)})

    assert trainee.entries()[0].options["scale"] == 1.5
    assert stable.entries()[0].options["scale"] == 3.0


def test_gpt2_fuses_attention_into_one_site_per_layer() -> None:
    trainee = Trainee("lora", {"target_modules": ("q", "k", "v")}, family="gpt2")

    assert [(place.name, place.d_in, place.d_out) for place in trainee.places] == [
        ("h.0.attn.c_attn", 32, 96),
        ("h.1.attn.c_attn", 32, 96),
    ]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scale": float("nan")}, NotFiniteError),
        ({"scale": 1e9}, NotFiniteError),
        ({"scale": 0.0}, AllZeroError),
        ({"B": torch.full((32, 8), float("nan"))}, NotFiniteError),
        ({"B": torch.zeros(32, 8)}, AllZeroError),
        ({"A": torch.ones(65, 32), "B": torch.ones(32, 65)}, RankError),
    ],
)
def test_adapters_that_cannot_be_served_as_promised_are_refused(changes: dict, error: type[Exception]) -> None:
    trainee = Trainee("lora", {})
    trainee.shake()
    entry = trainee.entries()[0]
    tensors = {name: changes.get(name, tensor) for name, tensor in entry.tensors.items()}
    options = {name: changes.get(name, value) for name, value in entry.options.items()}

    with pytest.raises(error):
        check(Adapter([Entry(entry.site, "lowrank", tensors, options)]), trainee.encoder.sites, max_rank=64)


def test_an_adapter_without_entries_and_head_is_refused() -> None:
    trainee = Trainee("head", {})

    with pytest.raises(NoSiteError):
        check(Adapter([]), trainee.encoder.sites, max_rank=64)
    check(Adapter([], _head()), trainee.encoder.sites, max_rank=64)


@pytest.mark.parametrize("case", TRAINED, ids=_named)
def test_a_fresh_adapter_is_refused_as_zero_unless_allowed(case: tuple[str, dict]) -> None:
    trainee = Trainee(*case)

    with pytest.raises(AllZeroError):
        check(Adapter(trainee.entries()), trainee.encoder.sites, max_rank=64)
    check(Adapter(trainee.entries()), trainee.encoder.sites, max_rank=64, allow_zero=True)
