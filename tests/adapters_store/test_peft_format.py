"""What the reader of PEFT folders takes, what it refuses and by which name, and that it refuses at once."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_store import errors
from adapters_store.adapter import Adapter
from adapters_store.encoder import Encoder
from adapters_store.manifest import HeadSpec
from adapters_store.peft_config import _REASONS, HARMLESS, PeftConfig
from adapters_store.peft_format import Imported, read_folder, read_head, read_parts, with_head, write_folder
from adapters_store.primitives import Entry
from adapters_store.primitives.head import Head
from adapters_store.sites import Sites
from tests.adapters_store.peft_cases import FAMILIES, Saved, lora, save
from tests.conftest import tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Parts = tuple[dict[str, Any], dict[str, Tensor]]
BASE = "base_model.model."
QUERY = BASE + "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    return save("bert", tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="module")
def sites(saved: Saved) -> Sites:
    return saved.encoder().sites


@pytest.fixture
def parts(saved: Saved) -> Parts:
    config = json.loads((saved.folder / "adapter_config.json").read_text())
    return config, load_file(saved.folder / "adapter_model.safetensors")


def _read(parts: Parts, sites: Sites) -> Imported:
    return read_parts(json.dumps(parts[0]).encode(), parts[1], sites)


def _refused(parts: Parts, sites: Sites, error: type[Exception], *words: str) -> None:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        _read(parts, sites)
    assert type(caught.value) is error
    assert time.monotonic() - started < 2
    for word in words:
        assert word in str(caught.value)


def test_a_saved_folder_is_read(saved: Saved, sites: Sites) -> None:
    found = read_folder(saved.folder, sites)

    assert len(found.adapter.entries) == 6
    assert {entry.options["scale"] for entry in found.adapter.entries} == {3.0}
    assert found.hyperparameters["r"] == 4
    assert found.hyperparameters["target_modules"] == ["output.dense", "query"]
    assert found.base_model is None
    assert found.adapter.head is not None
    assert found.adapter.head.spec.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_rank_stabilised_scale_is_by_the_root_of_the_rank(parts: Parts, sites: Sites) -> None:
    parts[0].update(use_rslora=True, alpha_pattern={"query": 5})

    scales = {entry.site.rsplit(".", 1)[-1]: entry.options["scale"] for entry in _read(parts, sites).adapter.entries}

    assert scales == {"query": 5 / math.sqrt(4), "dense": 12 / math.sqrt(4)}


def test_an_adapter_name_within_the_keys_is_read(parts: Parts, sites: Sites) -> None:
    config, tensors = parts
    named = {key.replace(".weight", ".default.weight") if "lora_" in key else key: t for key, t in tensors.items()}

    assert len(_read((config, named), sites).adapter.entries) == 6


def test_an_adapter_of_the_bare_backbone_is_read(parts: Parts, sites: Sites) -> None:
    config, tensors = parts
    config["modules_to_save"] = None
    bare = {key.replace("bert.", ""): tensor for key, tensor in tensors.items() if "lora_" in key}

    assert _read((config, bare), sites).adapter.head is None


def test_all_linear_lets_the_keys_decide(parts: Parts, sites: Sites) -> None:
    parts[0]["target_modules"] = "all-linear"

    assert len(_read(parts, sites).adapter.entries) == 6


@pytest.mark.parametrize("field", sorted(HARMLESS))
def test_harmless_fields_may_say_anything(field: str, parts: Parts, sites: Sites) -> None:
    parts[0][field] = {"any": ["thing", 1]}

    assert len(_read(parts, sites).adapter.entries) == 6


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_initialisations_that_leave_the_backbone_alone_are_read(init: object, parts: Parts, sites: Sites) -> None:
    parts[0]["init_lora_weights"] = init

    assert len(_read(parts, sites).adapter.entries) == 6


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something"])
def test_initialisations_that_change_the_backbone_are_refused(init: str, parts: Parts, sites: Sites) -> None:
    parts[0]["init_lora_weights"] = init

    _refused(parts, sites, errors.UnsupportedError, "init_lora_weights", init)


REFUSED: dict[str, object] = {
    "use_dora": True, "lora_bias": True, "layers_to_transform": 0, "layers_pattern": "layers",
    "layer_replication": [[0, 2]], "trainable_token_indices": [5], "megatron_config": {"a": 1},
    "alora_invocation_tokens": [1], "use_qalora": True, "monteclora_config": {"a": 1}, "velora_config": {"a": 1},
    "target_parameters": ["experts.down_proj"], "use_bdlora": {"a": 1}, "arrow_config": {"a": 1},
    "kasa_config": {"a": 1}, "ensure_weight_tying": True, "invented_next_year": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_change_the_mathematics_are_refused_by_name(field: str, parts: Parts, sites: Sites) -> None:
    parts[0][field] = REFUSED[field]

    _refused(parts, sites, errors.UnsupportedError, field)


def test_every_field_of_pefts_config_is_known() -> None:
    names = {field.name for field in fields(LoraConfig)}

    assert names <= set(PeftConfig.model_fields) | HARMLESS | set(_REASONS)
    assert set(REFUSED) - {"invented_next_year"} == set(_REASONS)


@pytest.mark.parametrize("neutral", [None, False, [], {}, ""])
def test_unknown_fields_may_be_neutral(neutral: object, parts: Parts, sites: Sites) -> None:
    parts[0]["invented_next_year"] = neutral

    assert len(_read(parts, sites).adapter.entries) == 6


CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bias": ({"bias": "lora_only"}, errors.UnsupportedError, "bias"),
    "peft type": ({"peft_type": "IA3"}, errors.UnsupportedError, "IA3"),
    "regex target": ({"target_modules": r".*\.query"}, errors.UnsupportedError, "target_modules"),
    "hostile target": ({"target_modules": "(a+)+$" * 50}, errors.UnsupportedError, "target_modules"),
    "no target": ({"target_modules": None}, errors.UnsupportedError, "target_modules"),
    "regex exclusion": ({"exclude_modules": "(a|a)*b"}, errors.UnsupportedError, "exclude_modules"),
    "hostile rank pattern": ({"rank_pattern": {"(.*a)*x": 4}}, errors.UnsupportedError, "(.*a)*x"),
    "hostile alpha pattern": ({"alpha_pattern": {"(a+)+$": 4}}, errors.UnsupportedError, "(a+)+$"),
    "wild dot": ({"alpha_pattern": {"self.quer.": 4}}, errors.UnsupportedError, "also matches"),
    "hostile module to save": ({"modules_to_save": ["(a+)+$"]}, errors.UnsupportedError, "(a+)+$"),
    "huge rank": ({"r": 10_000_000}, errors.ShapeError, "10000000"),
    "other rank": ({"r": 5}, errors.ShapeError, "rank 5"),
    "other rank by pattern": ({"rank_pattern": {"query": 3}}, errors.ShapeError, "rank 3"),
    "rank 0": ({"r": 0}, errors.FormatError, "r:"),
    "rank as text": ({"r": "4"}, errors.FormatError, "r:"),
    "rank as flag": ({"r": True}, errors.FormatError, "r:"),
    "targets of numbers": ({"target_modules": [1]}, errors.FormatError, "target_modules"),
    "huge alpha": ({"lora_alpha": 1e30}, errors.NotFiniteError, "lora_alpha"),
    "huge alpha by pattern": ({"alpha_pattern": {"query": -1e7}}, errors.NotFiniteError, "lora_alpha"),
    "idle target": ({"target_modules": ["query", "output.dense", "nowhere"]}, errors.KeysError, "nowhere"),
    "target without keys": ({"target_modules": ["query", "output.dense", "key"]}, errors.KeysError, "self.key"),
    "keys without target": ({"target_modules": ["query"]}, errors.KeysError, "output.dense"),
    "excluded": (
        {"exclude_modules": ["layer.0.attention.self.query"]},
        errors.KeysError,
        "layer.0.attention.self.query",
    ),
    "many targets": ({"target_modules": ["query"] * 5000}, errors.TooLargeError, "target_modules"),
    "many patterns": ({"rank_pattern": {f"a{i}": 1 for i in range(5000)}}, errors.TooLargeError, "rank_pattern"),
    "head not listed": ({"modules_to_save": None}, errors.KeysError, "classifier"),
    "head of tokens": ({"task_type": "TOKEN_CLS"}, errors.UnsupportedError, "TOKEN_CLS"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs_are_refused_at_once(case: str, parts: Parts, sites: Sites) -> None:
    changes, error, word = CONFIGS[case]
    parts[0].update(changes)

    _refused(parts, sites, error, word)


def test_limits_cost_no_time(parts: Parts, sites: Sites) -> None:
    patterns = {f"encoder.layer.{i}.attention.self.value": 4 for i in range(2048)}
    parts[0].update(rank_pattern=patterns, alpha_pattern=patterns, exclude_modules=[f"x{i}" for i in range(2048)])
    started = time.monotonic()

    _read(parts, sites)

    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[]", b"{", b"\xff\xfe", b'{"r": NaN}', b'{"peft_type": "LORA", "r": 4, "r": 5}', b"[" * 100_000),
        *(b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", b'{"peft_type": "LORA", "revision": "\\ud800"}'),
    ],
)
def test_broken_json_is_refused(text: bytes, sites: Sites) -> None:
    with pytest.raises(errors.FormatError):
        read_parts(text, {}, sites)


def test_a_large_config_is_refused(sites: Sites) -> None:
    with pytest.raises(errors.TooLargeError):
        read_parts(b"{" + b" " * (1 << 20) + b"}", {}, sites)


def _only(word: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if word in key}


def _without(word: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if word not in key}


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def _plus(key: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {key: torch.ones(shape)}


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], type[Exception], str]] = {
    "renamed": (_renamed("query", "frobnicate"), errors.UnknownSiteError, "frobnicate"),
    "all renamed": (_renamed("encoder", "decoder"), errors.NoSiteError, "decoder"),
    "no LoRA": (_only("classifier"), errors.NoSiteError, "lora_A"),
    "nothing": (_only("nothing"), errors.NoSiteError, "lora_A"),
    "other prefix": (_renamed("bert.encoder.layer.0", "tower.encoder.layer.0"), errors.UnknownSiteError, "agree"),
    "no prefix": (_renamed(BASE, ""), errors.KeysError, BASE),
    "half": (_without("layer.1"), errors.KeysError, "encoder.layer.1"),
    "no A": (_without("layer.1.attention.self.query.lora_A"), errors.KeysError, "query.lora_A"),
    "no B": (_without("lora_B"), errors.KeysError, "lora_B"),
    "two adapters": (_plus(QUERY + ".lora_A.other.weight", 4, 32), errors.KeysError, "other"),
    "embedding": (_plus(BASE + "bert.embeddings.words.lora_embedding_A", 4, 99), errors.UnsupportedError, "embed"),
    "magnitude": (_plus(QUERY + ".lora_magnitude_vector", 32), errors.UnsupportedError, "magnitude"),
    "bias": (_plus(QUERY + ".lora_B.bias", 32), errors.UnsupportedError, "bias"),
    "a whole layer": (_plus(BASE + "bert.embeddings.words.weight", 99, 32), errors.KeysError, "embeddings.words"),
    "a norm": (_plus(BASE + "bert.embeddings.LayerNorm.lora_A.weight", 4, 32), errors.KeysError, "LayerNorm"),
    "other key": (_plus("something", 3), errors.KeysError, "something"),
    "long key": (_plus(BASE + "a." * 9999 + "lora_A.weight", 3), errors.UnsupportedError, "a.a"),
    "half a head": (_without("classifier.bias"), errors.KeysError, "classifier.bias"),
    "no head": (_without("classifier"), errors.KeysError, "modules_to_save"),
    "more of a head": (_plus(BASE + "classifier.norm.weight", 32), errors.UnsupportedError, "classifier.norm.weight"),
    "wide A": (lambda tensors: tensors | {QUERY + ".lora_A.weight": torch.ones(4, 33)}, errors.ShapeError, "33"),
    "short B": (lambda tensors: tensors | {QUERY + ".lora_B.weight": torch.ones(31, 4)}, errors.ShapeError, "31"),
    "rank of B": (lambda tensors: tensors | {QUERY + ".lora_B.weight": torch.ones(32, 5)}, errors.ShapeError, "5"),
    "flat A": (lambda tensors: tensors | {QUERY + ".lora_A.weight": torch.ones(4)}, errors.ShapeError, "lora_A"),
    "empty": (lambda tensors: tensors | {QUERY + ".lora_A.weight": torch.ones(0, 32)}, errors.ShapeError, "lora_A"),
    "whole numbers": (
        lambda tensors: tensors | {QUERY + ".lora_A.weight": torch.ones(4, 32, dtype=torch.int8)},
        errors.ShapeError, "int8",
    ),
    "wide head": (lambda tensors: tensors | {BASE + "classifier.weight": torch.ones(3, 31)}, errors.ShapeError, "31"),
    "labels": (lambda tensors: tensors | {BASE + "classifier.bias": torch.ones(2)}, errors.LabelsError, "bias"),
    "flat head": (lambda tensors: tensors | {BASE + "classifier.weight": torch.ones(3)}, errors.ShapeError, "class"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_bad_tensors_are_refused(case: str, parts: Parts, sites: Sites) -> None:
    change, error, word = CHANGES[case]

    _refused((parts[0], change(parts[1])), sites, error, word)


def test_distilberts_forgotten_layer_is_named(tmp_path: Path) -> None:
    saved = save(
        "distilbert", tmp_path, lora("distilbert", modules_to_save=None)
    )  # PEFT then saves the classifier only

    with pytest.raises(errors.KeysError, match="pre_classifier"):
        read_folder(tmp_path, saved.encoder().sites)


def test_lora_within_a_head_is_refused(parts: Parts, sites: Sites) -> None:
    key = BASE + "pre_classifier.lora_{}.weight"
    config, tensors = parts
    tensors |= {key.format("A"): torch.ones(4, 32), key.format("B"): torch.ones(32, 4)}

    _refused((config, tensors), sites, errors.UnknownSiteError, "pre_classifier")


def test_a_head_of_an_unknown_family_is_refused(parts: Parts) -> None:
    backbone = tiny_bert()
    backbone.config.model_type = "mystery"

    _refused(parts, Encoder(backbone).sites, errors.UnsupportedError, "mystery", "head.json")


def test_a_bert_head_needs_the_pooler(saved: Saved, parts: Parts) -> None:
    backbone = copy.deepcopy(saved.backbone)
    backbone.pooler = None

    _refused(parts, Encoder(backbone).sites, errors.UnsupportedError, "pooler")


def test_ambiguous_prefixes_are_refused(parts: Parts) -> None:
    class Nest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
            self.b = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})})

    config = {"peft_type": "LORA", "r": 1, "target_modules": ["a"]}
    key = BASE + "x.b.a.a.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(1, 4), key.format("B"): torch.ones(4, 1)}

    _refused((config, tensors), Sites(Nest(), 4), errors.UnknownSiteError, "agree")


def test_pickle_is_refused_by_name(saved: Saved, sites: Sites, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((saved.folder / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")

    with pytest.raises(errors.FormatError, match=r"adapter_model\.bin is a pickle"):
        read_folder(tmp_path, sites)


def test_a_missing_config_is_refused(saved: Saved, sites: Sites, tmp_path: Path) -> None:
    tensors = (saved.folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)

    with pytest.raises(errors.FormatError, match=r"adapter_config\.json"):
        read_folder(tmp_path, sites)


# heads of our own


def _tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.ones(2, 8),
        "bias": torch.zeros(2),
        "dense_weight": torch.ones(8, 32),
        "dense_bias": torch.ones(8),
    }


HEAD = {"labels": ["no", "yes"], "pooling": "cls", "hidden_activation": "relu", "label_texts": {"yes": "it is"}}


def test_a_head_of_our_own_is_read() -> None:
    head = read_head(json.dumps(HEAD).encode(), _tensors())

    assert head.spec.labels == ("no", "yes")
    assert (head.spec.pooling, head.spec.hidden_activation) == ("cls", "relu")
    assert set(head.tensors) == set(head.spec.tensors) == set(_tensors())


HEADS: dict[str, tuple[dict[str, Any], dict[str, Tensor], type[Exception]]] = {
    "tensors": ({"tensors": {}}, {}, errors.FormatError),
    "unknown field": ({"threshold": 1}, {}, errors.FormatError),
    "unknown type": ({"type": "mlp"}, {}, errors.FormatError),
    "no labels": ({"labels": []}, {}, errors.FormatError),
    "one label too many": ({"labels": ["a", "b", "c"]}, {}, errors.LabelsError),
    "one label twice": ({"labels": ["a", "a"]}, {}, errors.LabelsError),
    "no activation": ({"hidden_activation": None}, {}, errors.KeysError),
    "unknown tensor": ({}, {"gate": torch.ones(2)}, errors.KeysError),
    "flat weight": ({}, {"weight": torch.ones(2)}, errors.ShapeError),
    "other width": ({}, {"weight": torch.ones(2, 9)}, errors.ShapeError),
    "other bias": ({}, {"bias": torch.ones(3)}, errors.LabelsError),
}


@pytest.mark.parametrize("case", HEADS)
def test_bad_heads_are_refused(case: str) -> None:
    fields, tensors, error = HEADS[case]

    with pytest.raises(error):
        read_head(json.dumps(HEAD | fields).encode(), _tensors() | tensors)


def test_a_head_without_weight_is_refused() -> None:
    with pytest.raises(errors.KeysError):
        read_head(b'{"labels": ["a"]}', {})


def test_labels_may_be_named_beside_a_saved_head(saved: Saved, sites: Sites, tmp_path: Path) -> None:
    for file in saved.folder.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "head.json").write_text(json.dumps({"labels": ["low", "mid", "high"]}))

    head = read_folder(tmp_path, sites).adapter.head

    assert head is not None
    assert head.spec.labels == ("low", "mid", "high")
    assert head.spec.pooling == "pooler"


@pytest.mark.parametrize(
    ("text", "tensors", "error"),
    [
        ({"labels": ["a", "b"]}, None, errors.LabelsError),
        ({"labels": ["a", "b", "b"]}, None, errors.LabelsError),
        ({"labels": ["a", "b", "c"], "pooling": "cls"}, None, errors.KeysError),
        ({"labels": ["a", "b", "c"]}, {"weight": torch.ones(3, 32)}, errors.KeysError),
        (None, {"weight": torch.ones(3, 32)}, errors.KeysError),
    ],
)
def test_a_saved_head_and_another_do_not_mix(
    text: dict[str, Any] | None, tensors: dict[str, Tensor] | None, error: type[Exception], saved: Saved, sites: Sites
) -> None:
    adapter = read_folder(saved.folder, sites).adapter

    with pytest.raises(error):
        with_head(adapter, None if text is None else json.dumps(text).encode(), tensors)


# export


def _lowrank(site: str, rank: int, scale: float) -> Entry:
    return Entry(site, "lowrank", {"A": torch.randn(rank, 32), "B": torch.randn(32, rank)}, {"scale": scale})


def test_an_export_comes_back_as_it_was(sites: Sites, tmp_path: Path) -> None:
    name = "encoder.layer.{}.attention.self.{}"
    entries = [_lowrank(name.format(0, "query"), 3, 0.5), _lowrank(name.format(1, "query"), 3, 0.5)]
    entries += [_lowrank(name.format(0, "value"), 5, 0.5), _lowrank(name.format(1, "value"), 3, -2.0)]
    spec = HeadSpec(labels=("a", "b"), pooling="mean", tensors={"weight": "weight"})
    adapter = Adapter(entries, Head(spec, {"weight": torch.randn(2, 32)}))

    write_folder(tmp_path, adapter, prefix="bert", base_model="tiny")

    back = read_folder(tmp_path, sites).adapter
    found = {entry.site: entry for entry in back.entries}
    assert back.head is not None
    assert back.head.spec == spec
    assert set(found) == {entry.site for entry in entries}
    for entry in entries:
        assert found[entry.site].options["scale"] == pytest.approx(entry.options["scale"], rel=1e-12)
        assert torch.equal(found[entry.site].tensors["A"], entry.tensors["A"])
        assert torch.equal(found[entry.site].tensors["B"], entry.tensors["B"])


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [Entry("encoder.layer.0.output.dense", "scale_shift", {"scale": torch.ones(32)})],
        [_lowrank("encoder.layer.0.attention.self.query", 2, 1.0)] * 2,
    ],
)
def test_what_peft_cannot_hold_is_not_exported(entries: list[Entry], tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedError):
        write_folder(tmp_path / "out", Adapter(entries))
    assert not (tmp_path / "out").exists()


def test_half_precision_is_kept(parts: Parts, sites: Sites, tmp_path: Path) -> None:
    save_file(
        {key: tensor.to(torch.bfloat16) for key, tensor in parts[1].items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(parts[0]))

    entries = read_folder(tmp_path, sites).adapter.entries

    assert {entry.tensors["A"].dtype for entry in entries} == {torch.bfloat16}


def test_the_families_have_their_models_names() -> None:
    assert {family: config.model_type for family, config in FAMILIES.items()} == {family: family for family in FAMILIES}
