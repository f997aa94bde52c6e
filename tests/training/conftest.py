"""Tiny backbones with tokenizers, tiny tasks: everything from configs and words made here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertTokenizerFast, GPT2Config

from tests.training.decoders import FAMILIES, save_decoder, write_tasks
from training.backbone import LoadedBackbone, load
from training.composing.settings import CotrainConfig
from training.config import FitConfig
from training.suite.workbench import Setting, Workbench, prepare

GOOD, BAD = ["good", "fine", "lovely"], ["bad", "poor", "awful"]
NOUNS = {"books": ["book", "plot", "author"], "films": ["film", "scene", "actor"], "intent": ["alarm", "lamp", "song"]}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "was", "is", "very", "really", "and", "so"]
VOCABULARY += GOOD + BAD + [noun for nouns in NOUNS.values() for noun in nouns]


def _save(folder: Path, config: object) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("bert"), config)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("gpt2"), config)


@pytest.fixture(scope="session")
def backbone(bert_folder: Path) -> LoadedBackbone:
    return load(str(bert_folder))


@pytest.fixture
def tiny_bench(data_folder: Path, backbone: LoadedBackbone) -> Workbench:
    """Three tasks with a dozen examples each on the tiny BERT, whose second layer alone has adapters."""
    return prepare(Setting((data_folder,), 12, test_examples=10, first_layer=1, token_budget=64), backbone)


def write_rows(file: Path, rows: list[tuple[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


def _sentiment(nouns: list[str]) -> list[tuple[str, str]]:
    fillers = ["the {} was {}", "a very {1} {0}", "the {} is so {}", "{1} and {1} {0}"]
    return [
        (filler.format(noun, word), label)
        for filler in fillers
        for noun in nouns
        for good, bad in zip(GOOD, BAD, strict=True)
        for word, label in ((good, "positive"), (bad, "negative"))
    ]


def _intent(nouns: list[str]) -> list[tuple[str, str]]:
    return [(f"{a} {noun} {b}", noun) for noun in nouns for a in VOCABULARY[5:13] for b in VOCABULARY[5:8]]


def _interleaved(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Every seventh and so on, so that splits hold all labels."""
    return [rows[i] for start in range(7) for i in range(start, len(rows), 7)]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task, nouns in NOUNS.items():
        rows = _interleaved(_intent(nouns) if task == "intent" else _sentiment(nouns))
        for split, part in (("train", rows[:40]), ("dev", rows[40:52]), ("test", rows[52:])):
            write_rows(folder / task / f"{split}.jsonl", part)
    (folder / "intent" / "task.toml").write_text(
        'family = "intent"\n[labels]\nsong = "music"\nlamp = "light"\nalarm = "time"\n'
    )
    return folder


@pytest.fixture
def fit_config(bert_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., FitConfig]:
    """Makes settings of a short run on the tiny backbone; keywords change them."""

    def make(**changes: object) -> FitConfig:
        usual: dict[str, object] = {
            "data": data_folder, "backbone": str(bert_folder), "runs": tmp_path / "runs", "run": "one", "epochs": 2,
            "batch_size": 16, "lr": 1e-2, "head_lr": 1e-2, "token_budget": 128, "threads": 1,
        }  # fmt: skip
        return FitConfig.model_validate(usual | changes)

    return make


@pytest.fixture
def cotrain_config(bert_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., CotrainConfig]:
    """Makes settings of a short co-training on the tiny backbone; keywords change them."""

    def make(**changes: object) -> CotrainConfig:
        usual: dict[str, object] = {
            "data": data_folder, "backbone": str(bert_folder), "runs": tmp_path / "runs", "run": "together",
            "store": tmp_path / "store", "epochs": 2, "batch_size": 16, "lr": 1e-2, "threads": 1, "token_budget": 256,
        }  # fmt: skip
        return CotrainConfig.model_validate(usual | changes)

    return make


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny causal language models, by family."""
    return {family: save_decoder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def generate_config(
    fit_config: Callable[..., FitConfig], decoders: dict[str, Path], pairs_folder: Path
) -> Callable[..., FitConfig]:
    """Makes settings of a short run of generating tasks on the tiny Llama, or on another `family`."""

    def make(family: str = "llama", **changes: object) -> FitConfig:
        usual: dict[str, object] = {"data": pairs_folder, "backbone": str(decoders[family])}
        return fit_config(**(usual | changes))

    return make
