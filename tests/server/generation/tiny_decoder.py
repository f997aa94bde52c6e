"""A tiny random decoder as a folder, and adapters of all kinds for it: no data needed."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters_store import exchange
from adapters_store.adapter import Adapter
from adapters_store.backbones import fingerprint
from adapters_store.graph import RelationGraph
from adapters_store.primitives import Entry
from adapters_store.store import AdapterStore
from tests.server.generation.families import causal

KINDS = ("lora", "lora", "ssf", "norm", "lora", "bottleneck", "lora", "ssf")
NAMES = [f"a{i:02}" for i in range(16)]
WORDS = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, 97))]
LAYERS, HIDDEN, INNER, KV = 2, 32, 64, 16


def make_decoder(folder: Path) -> Path:
    """A Llama whose every token is a word, so that texts tell tokens apart."""
    causal("llama").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder


def adapter(kind: str, seed: int) -> list[Entry]:
    """Entries of one kind with random numbers, strong enough to change what comes next; ranks differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    rank = 1 + seed % 7

    def randn(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def lowrank(site: str, d_in: int, d_out: int) -> Entry:
        tensors = {"A": randn(rank, d_in, std=d_in**-0.5), "B": randn(d_out, rank, std=0.4)}
        return Entry(site, "lowrank", tensors, {"scale": 1.0 + seed % 3})

    def both(site: str, d_in: int, d_out: int) -> Entry:
        return Entry(site, "scale_shift", {"scale": 1 + randn(d_out, std=0.3), "shift": randn(d_out, std=0.2)})

    def bottleneck(site: str) -> Entry:
        tensors = {"down": randn(rank, HIDDEN, std=HIDDEN**-0.5), "up": randn(HIDDEN, rank, std=0.4)}
        tensors |= {"down_bias": randn(rank, std=0.1), "up_bias": randn(HIDDEN, std=0.1)}
        return Entry(site, "bottleneck", tensors, {"activation": "gelu", "input": "y" if seed % 2 else "x"})

    entries = []
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        linears = [(f"{at}.self_attn.q_proj", HIDDEN, HIDDEN), (f"{at}.self_attn.v_proj", HIDDEN, KV),
                   (f"{at}.mlp.up_proj", HIDDEN, INNER), (f"{at}.mlp.down_proj", INNER, HIDDEN)]  # fmt: skip
        if kind == "lora":
            entries += [lowrank(*site) for site in linears[: 2 + seed % 3]]
        elif kind == "ssf":
            entries += [both(*site) for site in linears[seed % 2 :]]
        elif kind == "norm":
            entries.append(Entry(f"{at}.input_layernorm", "norm", {"weight": 1 + randn(HIDDEN, std=0.5)}))
        else:
            entries.append(bottleneck(f"{at}.self_attn.o_proj" if seed % 3 == 0 else at))
    return entries


def make_store(root: Path, backbone: Path) -> Path:
    """Sixteen adapters of four kinds, each answering a task of its name with text, in a ring of relations."""
    store = AdapterStore(root)
    for i, name in enumerate(NAMES):
        publish(root, backbone, name, i + 1, alias="prod")
    edges = {(NAMES[i], NAMES[(i + 1) % 16]): 0.3 + 0.04 * i for i in range(16)}
    store.publish_graph(RelationGraph.of(dict.fromkeys(NAMES), edges).to_json())
    return root


def publish(root: Path, backbone: Path, name: str, seed: int, alias: str | None = None) -> None:
    """A version of an adapter; its kind goes by the name, its numbers by the seed."""
    kind = KINDS[NAMES.index(name) % len(KINDS)] if name in NAMES else "lora"
    AdapterStore(root).publish(
        Adapter(adapter(kind, seed)), name=name, task=name, kind=kind, backbone=fingerprint(backbone, "float32"),
        alias=alias,
    )  # fmt: skip


def upload_files(folder: Path, backbone: Path, name: str, seed: int) -> dict[str, bytes]:
    """The files of an upload in our own format."""
    publish(folder / "store", backbone, name, seed)
    store = AdapterStore(folder / "store")
    manifest = store.resolve(name)
    out = folder / f"{name}-{seed}"
    exchange.write_folder(out, manifest, store.load(manifest))
    return {file.name: file.read_bytes() for file in out.iterdir()}
