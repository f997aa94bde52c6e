"""What PEFT saved answers here as it answers in PEFT: hidden states, logits, mixtures."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel

from adapters_store import adapter as adapters
from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from adapters_store.peft_format import Imported, read_folder, write_folder
from adapters_store.peft_heads import LAYOUTS
from adapters_store.primitives import cost
from adapters_store.primitives import head as head_primitive
from tests.adapters_store.peft_cases import (
    DOWN,
    FAMILIES,
    HEAD,
    QUERY,
    ROWS,
    Saved,
    hidden_of,
    load,
    logits_of,
    lora,
    randomise,
    save,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models: on a shared machine torch's threads wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FORMS = ["native", "dense", "fold"]
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "rank_pattern": {
        "rank_pattern": {"layer.1.attention.self.query": 2, r"^bert\.encoder\.layer\.0\.output\.dense": 7}
    },
    "alpha_pattern": {"alpha_pattern": {"query": 3, "layer.1.output.dense": 31}},
    "mixed": {"use_rslora": True, "rank_pattern": {"query": 6}, "alpha_pattern": {"0.output.dense": 40}},
    "all-linear": {"target_modules": "all-linear"},
    "full paths": {
        "target_modules": ["bert.encoder.layer.1.attention.self.value", "encoder.layer.0.intermediate.dense"]
    },
    "excluded": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "layer.0.output.dense"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _put(encoder: Encoder, folder: Path, slot: int = 0) -> Imported:
    imported = read_folder(folder, encoder.sites)
    adapters.check(imported.adapter, encoder.sites, max_rank=64)
    encoder.sites.put(slot, imported.adapter.entries)
    return imported


def _logits(encoder: Encoder, imported: Imported, *, reference: bool = False) -> Tensor:
    """(rows, labels) of the adapter alone, through pooled states and its own head."""
    head = imported.adapter.head
    assert head is not None
    mix = Mix.one_hot(0, encoder.num_layers)
    with torch.no_grad():
        poolings = [head.spec.pooling] * len(ROWS)
        pooled = encoder.pool(ROWS, [mix] * len(ROWS), poolings, reference=reference)
        return torch.stack(head_primitive.batched([head] * len(ROWS), pooled))


def _hidden(encoder: Encoder, mix: Mix, pooling: str, *, reference: bool = False) -> Tensor:
    with torch.no_grad():
        return encoder.pool(ROWS, [mix] * len(ROWS), [pooling] * len(ROWS), reference=reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_peft_in_every_family(family: str, tmp_path: Path) -> None:
    saved = save(family, tmp_path)
    encoder = saved.encoder(keeps_reference=True)

    imported = _put(encoder, tmp_path)

    expected = logits_of(saved.peft, ROWS)
    with saved.peft.disable_adapter():
        assert (logits_of(saved.peft, ROWS) - expected).abs().max() > 0.01  # or the comparison would prove nothing
    _close(_logits(encoder, imported, reference=True), expected)
    for form in FORMS:
        with cost.forced(form):
            _close(_logits(encoder, imported), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_peft_in_every_family(family: str, tmp_path: Path) -> None:
    backbone = save(family, tmp_path / "unused").backbone
    targets = [QUERY.get(family, "query"), DOWN.get(family, "output.dense")]
    peft = get_peft_model(
        copy.deepcopy(backbone), LoraConfig(r=3, target_modules=targets, fan_in_fan_out=family == "gpt2")
    )
    randomise(peft)
    peft.eval().save_pretrained(tmp_path)
    encoder = Saved(peft, tmp_path, backbone, family).encoder()

    assert _put(encoder, tmp_path).adapter.head is None

    for pooling in ("mean", "cls", "last"):
        _close(_hidden(encoder, Mix.one_hot(0, encoder.num_layers), pooling), hidden_of(peft, ROWS, pooling))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_peft_in_every_variant(variant: str, tmp_path: Path) -> None:
    saved = save("bert", tmp_path, lora("bert", **VARIANTS[variant]))
    encoder = saved.encoder()

    imported = _put(encoder, tmp_path)

    _close(_logits(encoder, imported), logits_of(saved.peft, ROWS))


@pytest.mark.parametrize("family", ["roberta", "electra", "gpt2", "llama"])
def test_all_linear_is_the_backbone_without_the_head(family: str, tmp_path: Path) -> None:
    saved = save(family, tmp_path, lora(family, target_modules="all-linear"))
    encoder = saved.encoder()

    imported = _put(encoder, tmp_path)

    _close(_logits(encoder, imported), logits_of(saved.peft, ROWS))


def _deltas(peft: nn.Module) -> dict[str, Tensor]:
    """PEFT's own delta of each weight, by the module's name in the backbone."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in peft.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_mixture_is_the_weighted_sum_of_dense_deltas(family: str, tmp_path: Path) -> None:
    backbone = save(family, tmp_path / "unused").backbone
    flip = {"fan_in_fan_out": family == "gpt2"}
    query, down = QUERY.get(family, "query"), DOWN.get(family, "output.dense")
    configs = [
        LoraConfig(r=3, lora_alpha=7, target_modules=[query, down], **flip),
        LoraConfig(r=8, lora_alpha=2, use_rslora=True, target_modules=[down], **flip),
    ]
    weights, encoder, dense = (
        (0.7, -0.4),
        Saved(None, tmp_path, backbone, family).encoder(keeps_reference=True),
        copy.deepcopy(backbone),
    )
    for slot, config in enumerate(configs):
        peft = get_peft_model(copy.deepcopy(backbone), config)
        randomise(peft)
        peft.save_pretrained(tmp_path / str(slot))
        _put(encoder, tmp_path / str(slot), slot)
        for name, delta in _deltas(peft).items():
            dense.get_submodule(name).weight.data += weights[slot] * delta
    mix = Mix((0, 1), torch.tensor(weights)[:, None].repeat(1, encoder.num_layers).numpy())

    expected = hidden_of(dense.eval(), ROWS, "mean")

    _close(_hidden(encoder, mix, "mean", reference=True), expected)
    for form in FORMS:
        with cost.forced(form):
            _close(_hidden(encoder, mix, "mean"), expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_an_export_answers_in_peft_as_before(family: str, tmp_path: Path) -> None:
    query = QUERY.get(family, "query")
    config = lora(family, use_rslora=True, rank_pattern={query: 6}, alpha_pattern={query: 2})
    saved = save(family, tmp_path / "in", config)
    imported = read_folder(tmp_path / "in", saved.encoder().sites)
    classifier = saved.peft.get_base_model()
    prefix = classifier.base_model_prefix

    write_folder(tmp_path / "out", imported.adapter, prefix=prefix, model_type=family, base_model="tiny")

    again = load(_bare(saved), tmp_path / "out")
    torch.testing.assert_close(logits_of(again, ROWS), logits_of(saved.peft, ROWS), rtol=1e-6, atol=1e-6)
    back = read_folder(tmp_path / "out", saved.encoder().sites)
    assert back.base_model == "tiny"
    assert back.adapter.head is not None
    assert imported.adapter.head is not None
    assert back.adapter.head.spec == imported.adapter.head.spec
    assert [entry.site for entry in back.adapter.entries] == [entry.site for entry in imported.adapter.entries]


def _bare(saved: Saved) -> nn.Module:
    """The classifier around the bare backbone, with some other head."""
    classifier = type(saved.peft.get_base_model())(FAMILIES[saved.family])
    setattr(classifier, classifier.base_model_prefix, copy.deepcopy(saved.backbone))
    return classifier


def test_a_pooler_that_the_classifier_leaves_out_is_not_missed(tmp_path: Path) -> None:
    saved = save("roberta", tmp_path, lora("roberta", target_modules=["dense"]))
    backbone = AutoModel.from_config(FAMILIES["roberta"])
    missing = backbone.load_state_dict(saved.backbone.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"pooler"}
    encoder = Saved(saved.peft, tmp_path, backbone, "roberta").encoder()

    imported = _put(encoder, tmp_path)

    _close(_logits(encoder, imported), logits_of(saved.peft, ROWS))


def test_an_export_for_the_bare_backbone_loads(tmp_path: Path) -> None:
    saved = save("bert", tmp_path / "in")
    imported = read_folder(tmp_path / "in", saved.encoder().sites)

    write_folder(tmp_path / "out", imported.adapter)

    peft = load(saved.backbone, tmp_path / "out")
    _close(hidden_of(peft, ROWS, "mean"), hidden_of(saved.peft.get_base_model().bert, ROWS, "mean"))


def test_heads_are_saved_for_every_family_that_is_known() -> None:
    assert set(LAYOUTS) == set(FAMILIES)
    assert set(HEAD) <= set(LAYOUTS)
