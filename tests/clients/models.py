"""What the clients talk to: a decoder with a chat template, and a store of adapters related by a graph."""

import itertools
import json
import shutil
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.graph import RelationGraph
from adapters_store.primitives import Entry
from adapters_store.store import AdapterStore

TASKS = ("fables", "letters", "rhymes")
RANK = 4
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260k"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_chat_backbone(folder: Path) -> Path:
    """The shared stories model with a chat template; where it is absent, a random Llama of its shape."""
    if STORIES.is_dir():
        shutil.copytree(STORIES, folder, copy_function=shutil.copyfile)
    else:
        _make_random(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _make_random(folder: Path) -> None:
    """A random Llama, and a byte-level tokenizer that learned from this file."""
    torch.manual_seed(0)
    learned = ByteLevelBPETokenizer()
    learned.train(__file__, vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_task_store(root: Path, backbone: Path) -> None:
    """One adapter per task, without heads: they continue texts. The graph relates neighbours."""
    store = AdapterStore(root)
    for seed, task in enumerate(TASKS):
        facts = {"name": task, "task": task, "kind": "lora", "backbone": fingerprint(backbone, "float32")}
        store.publish(_lora(backbone, seed), alias="prod", **facts)
    edges = dict.fromkeys(itertools.pairwise(TASKS), 0.5)
    store.publish_graph(RelationGraph.of(dict.fromkeys(TASKS), edges).to_json())


def _lora(backbone: Path, seed: int) -> Adapter:
    """A random LoRA of the attention, strong enough to change texts."""
    config = json.loads((backbone / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    d_in, heads = config["hidden_size"], config["num_attention_heads"]
    widths = {"q_proj": d_in, "v_proj": d_in // heads * config["num_key_value_heads"]}
    return Adapter([
        Entry(
            f"layers.{layer}.self_attn.{module}", "lowrank",
            {"A": torch.randn(RANK, d_in, generator=generator), "B": torch.randn(d_out, RANK, generator=generator)},
            {"scale": 0.02},
        )
        for layer in range(config["num_hidden_layers"]) for module, d_out in widths.items()
    ])  # fmt: skip
