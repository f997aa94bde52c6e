"""Synthetic truth: targets that are known mixtures of known sources, on a small random backbone.

K = 8 sources in two communities: DW_k = shared part of its community + its own part, dense, at every linear layer. A
target's teacher is the backbone with sum_k alpha*_k DW_k, a mixture of 2 or 3 sources of one community; its labels are
what the teacher says of random texts. From N labelled examples per target: a short learning without a graph gives the
targets' relations to the sources, the sources' weights the relations between them, diffusion the prior, and evidence
learned under it alpha. AWP = 1 - 1/2 sum_k |alpha_k - alpha*_k|, averaged over targets, layers as one.

Run: python -m tests.bench.synthetic [--examples 200] [--seeds 0,1,2]
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, BertConfig

from adapters_store.adapter import Adapter
from adapters_store.encoder import Encoder
from adapters_store.graph import Knobs
from adapters_store.packing import PACKED, no_mask, packed_attention
from adapters_store.primitives import Entry
from tests.bench.rounds import write
from training import seeds
from training.backbone import LoadedBackbone
from training.composing.compose import Learning, learn
from training.composing.prior import diffused, rows
from training.relations import weights as weight_view
from training.suite.heads import Heads
from training.suite.joint import Recipe
from training.suite.methods import Nodes
from training.suite.modules import mixes, resident
from training.suite.workbench import Setting, Texts, Workbench
from training.tail import Tail
from training.tasks import Task

SOURCES, TARGETS, LABELS, WIDTH = 8, 4, 6, 32
COMMUNITY = np.arange(SOURCES) // 4
NEIGHBOURS = 4
KNOBS = Knobs(c=0.5, epsilon=0.0, threshold=0.0, neighbours=NEIGHBOURS)
RECIPE = Recipe(epochs=10, batch_size=20, clip=1e9)
LEARNING = Learning(lr=0.3, closeness=0.01)


@dataclass(frozen=True, eq=False)
class World:
    """A bench of targets, the sources, and the mixtures alpha* (T, K) that made the labels."""

    bench: Workbench
    sources: Nodes
    truth: torch.Tensor


def encoder() -> Encoder:
    """A random BERT of two layers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH,
        max_position_embeddings=32, initializer_range=0.15,
    )  # fmt: skip
    return Encoder(AutoModel.from_config(config))


def dense_sources(of: Encoder, seed: int, strength: float = 0.5) -> list[Adapter]:
    """Dense updates as one entry each: A the identity, B the update itself."""
    found = []
    for k in range(SOURCES):
        entries = []
        for name, site in of.sites.items():
            place = site.place
            if type(place.module).__mro__[1] is not torch.nn.Linear or name.startswith("pooler"):
                continue
            shared = torch.randn(place.d_out, place.d_in, generator=seeds.generator(seed, name, "of", COMMUNITY[k]))
            own = torch.randn(place.d_out, place.d_in, generator=seeds.generator(seed, name, "own", k))
            update = strength * (0.5 * shared + own) * 0.15 / 1.25**0.5
            entries.append(Entry(name, "lowrank", {"A": torch.eye(place.d_in), "B": update}, {"scale": 1.0}))
        found.append(Adapter(entries, None))
    return found


def mixtures(seed: int) -> torch.Tensor:
    """alpha* (T, K): 2 or 3 sources of one community with shares of at least 0.2."""
    rng = np.random.default_rng(seed)
    truth = torch.zeros(TARGETS, SOURCES)
    for t in range(TARGETS):
        chosen = rng.choice(np.flatnonzero(t % 2 == COMMUNITY), size=2 + t // 2 % 2, replace=False)
        truth[t, chosen] = torch.from_numpy(0.2 + (1 - 0.2 * len(chosen)) * rng.dirichlet(np.ones(len(chosen)))).float()
    return truth


def world(examples: int, seed: int) -> World:
    """Sources, targets, and texts labelled by the targets' teachers."""
    of = encoder()
    adapters, truth = dense_sources(of, seed), mixtures(seed)
    rng = np.random.default_rng([seed, 1])
    head = torch.randn(LABELS, WIDTH, generator=seeds.generator(seed, "head"))
    names = tuple(f"label-{y}" for y in range(LABELS))
    tasks = [Task(f"target-{t}", names, ()) for t in range(TARGETS)]
    tail = Tail(of, 0)
    setting = Setting((), examples, seed, first_layer=0, dtype="float32")
    loaded = LoadedBackbone(of, None, None, Path(), "mean")  # type: ignore[arg-type]
    bench = Workbench(setting, loaded, tail, tasks, [], [])
    rows = [[rng.integers(5, 200, size=8).tolist() for _ in range(examples)] for _ in tasks]
    heads, train = [], []
    with resident(tail, [adapter.entries for adapter in adapters]):
        for t, mix in enumerate(mixes(truth[:, :, None].expand(-1, -1, of.num_layers))):
            blank = Texts(rows[t], torch.zeros(examples, dtype=torch.int64), [None] * examples)
            pooled = bench.pooled(blank, mix)
            bias = -(pooled @ head.mT).mean(dim=0)  # no label is rare
            scale = 4 / (pooled @ head.mT).std()
            heads.append((head * scale, bias * scale))
            train.append(Texts(rows[t], (pooled @ head.mT + bias).argmax(dim=1), blank.states))
    return World(Workbench(setting, loaded, tail, tasks, train, train), Nodes(adapters, heads), truth)


def relations(made: World) -> tuple[torch.Tensor, torch.Tensor]:
    """(R of the sources (K, K) by their weights, relations of targets to sources (T, K)), both >= 0.

    A target's relations are the weights that a short learning without any graph gives it.
    """
    sites = made.bench.tail.encoder.sites
    between = torch.from_numpy(weight_view.similarity(made.sources.adapters, sites)).clamp(min=0).float()
    flat = torch.full((TARGETS, SOURCES), 1 / SOURCES)
    return between, _learned(made, flat, replace(RECIPE, epochs=4))


def _learned(made: World, Pi: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """(T, K) weights of evidence learned under prior rows (T, K)."""
    heads = Heads.given(made.bench.tasks, made.sources.heads, trained=False)
    found = learn(made.bench, made.sources.adapters, heads, Pi, None, recipe, KNOBS, LEARNING)
    return found.weights.mean(dim=2)


def prior(between: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Pi (T, K): the targets' relations diffused over the sources' graph, the largest NEIGHBOURS of each row kept."""
    return rows(likely @ diffused(between, KNOBS), KNOBS)


def precision(made: World, Pi: torch.Tensor) -> tuple[float, float]:
    """AWP of evidence learned under a prior, and of the prior alone."""
    return awp(_learned(made, Pi, RECIPE), made.truth), awp(Pi, made.truth)


def awp(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over targets of 1 - half the L1 distance."""
    return float(1 - 0.5 * (found - truth).abs().sum(dim=1).mean())


def shuffled(between: torch.Tensor, likely: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same graph with its nodes renamed at random: degrees and weights stay, meaning goes."""
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(SOURCES))
    return between[order][:, order], likely[:, order]


def measure(examples: int, seed: int) -> dict[str, float]:
    """One world: precision with the estimated graph, without one, and with a random one; how communities separate."""
    made = world(examples, seed)
    between, likely = relations(made)
    same = torch.from_numpy(COMMUNITY[:, None] == COMMUNITY[None])
    off = ~torch.eye(SOURCES, dtype=torch.bool)
    ours, prior_alone = precision(made, prior(between, likely))
    random, random_prior = precision(made, prior(*shuffled(between, likely, seed)))
    no_graph, _ = precision(made, torch.full((TARGETS, SOURCES), 1 / SOURCES))
    return {
        "examples": examples, "seed": seed, "ours": ours, "prior_alone": prior_alone, "random_graph": random,
        "random_prior_alone": random_prior, "no_graph": no_graph,
        "inside_least": float(between[same & off].min()), "across_largest": float(between[~same].max()),
    }  # fmt: skip


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", default="50,200")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    worlds = [(int(n), int(seed)) for n in options.examples.split(",") for seed in options.seeds.split(",")]
    lines = [measure(*one) for one in track(worlds, "worlds", console=Console(stderr=True))]
    table = Table(*lines[0], title="adapter weight precision")
    for line in lines:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in line.values()))
    Console(width=130).print(table)
    print(write("synthetic", [{k: round(v, 4) for k, v in line.items()} for line in lines]))


if __name__ == "__main__":
    main()
