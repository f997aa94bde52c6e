"""`espalier-store import`, and the skeleton of a backbone it checks against."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)  # fmt: skip
from typer.testing import CliRunner

from adapters_store import import_cli, skeleton
from adapters_store.sites import Sites
from adapters_store.store import AdapterStore

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
SMALL: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 64}
WIDE: dict[str, Any] = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONFIGS = {
    "bert": BertConfig(**WIDE),
    "roberta": RobertaConfig(**WIDE),
    "distilbert": DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "gpt2": GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "llama": LlamaConfig(**WIDE, num_key_value_heads=2),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("wrapper", [AutoModel, AutoModelForSequenceClassification])
def test_the_skeleton_has_the_sites_of_the_model_itself(family: str, wrapper: Any, tmp_path: Path) -> None:
    config = CONFIGS[family]
    config.pad_token_id = 0
    wrapper.from_config(config).save_pretrained(tmp_path)
    model: nn.Module = AutoModel.from_config(config)

    found = skeleton.sites_of(tmp_path)
    expected = Sites(model, 32)

    shape = {name: (site.place.d_in, site.place.d_out, site.place.layer) for name, site in expected.items()}
    mine = {name: (site.place.d_in, site.place.d_out, site.place.layer) for name, site in found.items()}
    assert {name: mine.get(name) for name in shape if not name.startswith("pooler")} == {
        name: where for name, where in shape.items() if not name.startswith("pooler")
    }


def test_import_publishes_what_peft_saved(tmp_path: Path) -> None:
    AutoModel.from_config(CONFIGS["bert"]).save_pretrained(tmp_path / "backbone")
    model = AutoModel.from_pretrained(tmp_path / "backbone")
    config = LoraConfig(r=3, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")

    options = ["--backbone", str(tmp_path / "backbone"), "--store", str(tmp_path / "store"), "--alias", "prod"]
    result = CliRunner().invoke(import_cli.app, ["import", str(tmp_path / "lora"), "--name", "reviews", *options])

    assert result.exit_code == 0, result.output
    manifest = AdapterStore(tmp_path / "store").resolve("reviews@prod")
    assert len(manifest.sites) == 4
    assert {spec.shape for spec in manifest.tensors.values()} == {(3, 32), (32, 3)}


def test_import_refuses_an_adapter_of_another_width_in_one_line(tmp_path: Path) -> None:
    AutoModel.from_config(CONFIGS["bert"]).save_pretrained(tmp_path / "backbone")
    other = AutoModel.from_config(BertConfig(**WIDE | {"hidden_size": 64}))
    get_peft_model(other, LoraConfig(target_modules=["query"], init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )

    options = ["--backbone", str(tmp_path / "backbone"), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(import_cli.app, ["import", str(tmp_path / "lora"), "--name", "wide", *options])

    assert result.exit_code == 1
    assert "must have shape" in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "store").exists()
