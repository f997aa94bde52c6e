"""The mixed forward over the bare backbone's: how much composing costs, next to PEFT's mixed batch.

all-MiniLM-L6-v2, 32 rows of 32 tokens, random LoRA on all six linear layers of each block. CPU time of one thread,
all variants in turn in one process. Run: python -m tests.bench.forward [--rounds 9] [--quick]
"""

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from adapters_store import backbones
from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from adapters_store.primitives import Entry, calibration, cost, native
from adapters_store.roles import select
from server.backbone import load
from tests.bench.rounds import Timing, round_robin, write

ROWS, TOKENS = 32, 32
TARGETS = ("q", "k", "v", "o", "up", "down")
PEFT_TARGETS = ["query", "key", "value", "dense"]
POPULARITY = ("identical", "uniform", "zipf", "distinct")
ACTIVE = (1, 4, 16, 64)
GOALS = {("float32", 1): 1.25, ("float32", 4): 1.5, ("bfloat16", 1): 1.8}  # at 16 active adapters, r = 8


def choose(popularity: str, n: int, k: int, rng: random.Random) -> list[tuple[int, ...]]:
    """For each row the adapters it composes (Punica's words for how popular adapters are)."""
    k = min(k, n)
    if popularity == "identical":
        return [tuple(range(k))] * ROWS
    if popularity == "distinct":
        return [tuple((row * k + i) % n for i in range(k)) for row in range(ROWS)]
    weights = [1.0] * n if popularity == "uniform" else [1 / (i + 1) ** 1.5 for i in range(n)]
    return [_draw(weights, k, rng) for _ in range(ROWS)]


def _draw(weights: Sequence[float], k: int, rng: random.Random) -> tuple[int, ...]:
    left = dict(enumerate(weights))
    chosen = []
    for _ in range(k):
        picked = rng.choices(list(left), list(left.values()))[0]
        chosen.append(picked)
        del left[picked]
    return tuple(chosen)


def random_lora(encoder: Encoder, rank: int, generator: torch.Generator) -> list[Entry]:
    """A LoRA on all six linear layers with random factors."""
    entries = []
    for name in select(encoder.sites, TARGETS):
        place = encoder.sites[name].place
        factors = {
            "A": torch.randn(rank, place.d_in, generator=generator) / place.d_in**0.5,
            "B": torch.randn(place.d_out, rank, generator=generator) * 0.02,
        }
        entries.append(Entry(name, "lowrank", factors, {"scale": 2.0}))
    return entries


def mixes_of(chosen: Sequence[tuple[int, ...]], num_layers: int) -> list[Mix]:
    """One mix per row, weights per layer."""
    rng = np.random.default_rng(0)
    return [Mix(slots, rng.dirichlet(np.ones(len(slots)), num_layers).T.astype(np.float32)) for slots in chosen]


class Case:
    """One dtype and rank: the variants that take turns."""

    def __init__(self, dtype: str, rank: int) -> None:
        self.dtype, self.rank = dtype, rank
        self.generator = torch.Generator().manual_seed(0)
        self.served = load(None, dtype, "cpu")
        self.encoder = self.served.encoder
        calibration.calibrate_lowrank(self.encoder.dtype, self.encoder.device)  # as the server does when it starts
        self.rows = torch.randint(1000, 20000, (ROWS, TOKENS), generator=self.generator).tolist()
        self.ids = torch.tensor(self.rows)
        self.mask = torch.ones_like(self.ids)
        plain = AutoModel.from_pretrained(backbones.locate(None), dtype=getattr(torch, dtype)).eval()
        self.plain: Any = plain
        self._fill(64)

    def _fill(self, upto: int) -> None:
        for slot in range(upto):
            self.encoder.sites.put(slot, random_lora(self.encoder, self.rank, self.generator))

    def ours(self, chosen: Sequence[tuple[int, ...]]) -> Callable[[], object]:
        """Our forward with these adapters per row; mixes are made anew by each call, as a server would."""
        mixes = mixes_of(chosen, self.encoder.num_layers)
        return lambda: self.encoder.pool(self.rows, mixes, ["mean"] * ROWS)

    def bare(self) -> Callable[[], object]:
        """Our forward without adapters."""
        return lambda: self.encoder.pool(self.rows, [None] * ROWS, ["mean"] * ROWS)

    def plain_forward(self) -> Callable[[], object]:
        """The model as transformers runs it: the 1.00 of all ratios."""
        return lambda: self.plain(input_ids=self.ids, attention_mask=self.mask).last_hidden_state.float().mean(1)

    def peft_model(self, n: int) -> Any:
        """PEFT with n LoRAs on the same layers."""
        model = AutoModel.from_pretrained(backbones.locate(None), dtype=getattr(torch, self.dtype))
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=PEFT_TARGETS, init_lora_weights=False,
                            exclude_modules=["pooler.dense"])  # fmt: skip
        wrapped = get_peft_model(model, config, adapter_name="0")
        for index in range(1, n):
            wrapped.add_adapter(str(index), config)
        return wrapped.to(getattr(torch, self.dtype)).eval()

    def peft(self, model: Any, chosen: Sequence[tuple[int, ...]]) -> Callable[[], object]:
        """PEFT's mixed batch: one adapter per row is all it can."""
        names = [str(slots[0]) for slots in chosen]
        return lambda: model(input_ids=self.ids, attention_mask=self.mask, adapter_names=names)


def run_case(
    dtype: str, rank: int, rounds: int, popularities: Sequence[str], actives: Sequence[int]
) -> list[dict[str, Any]]:
    """All settings of one dtype and rank."""
    case, rng = Case(dtype, rank), random.Random(0)
    variants = {"plain": case.plain_forward(), "bare": case.bare()}
    peft_model = case.peft_model(max(actives))
    for n, k, popularity in itertools.product(actives, (1, 4), popularities):
        chosen = choose(popularity, n, k, rng)
        variants[f"ours n={n} k={k} {popularity}"] = case.ours(chosen)
        if k == 1:
            variants[f"peft n={n} k=1 {popularity}"] = case.peft(peft_model, chosen)
    timings = round_robin(variants, rounds, f"{dtype} r={rank}")
    return [_line(dtype, rank, name, timing, timings["plain"]) for name, timing in timings.items()]


def run_resident(dtype: str, rank: int, rounds: int) -> list[dict[str, Any]]:
    """16 adapters active while 16 or 1,024 are resident: two encoders in turn."""
    few, many = Case(dtype, rank), Case(dtype, rank)
    for slot in range(16, 64):
        few.encoder.sites.drop(slot)
    for slot in range(64, 1024):
        many.encoder.sites.put(slot, random_lora(many.encoder, rank, many.generator))
    chosen = choose("distinct", 16, 1, random.Random(0))
    variants = {"plain": few.plain_forward(), "resident=16": few.ours(chosen), "resident=1024": many.ours(chosen)}
    timings = round_robin(variants, rounds, f"{dtype} r={rank} residents")
    return [_line(dtype, rank, name, timing, timings["plain"]) for name, timing in timings.items()]


def _line(dtype: str, rank: int, name: str, timing: Timing, base: Timing) -> dict[str, Any]:
    return {
        "dtype": dtype, "r": rank, "variant": name, "ms": round(1e3 * timing.median_s, 3),
        "ms_quartiles": [round(1e3 * timing.low_s, 3), round(1e3 * timing.high_s, 3)],
        "ratio": round(timing.median_s / base.median_s, 3), "rounds": timing.rounds,
    }  # fmt: skip


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A table per dtype and rank."""
    console = Console(width=140)
    for (dtype, rank), group in itertools.groupby(lines, key=lambda line: (line["dtype"], line["r"])):
        by_name = {line["variant"]: line for line in group}
        ratios = {name: line["ratio"] for name, line in by_name.items()}
        plain = by_name["plain"]["ms"]
        bare = f", ours without adapters {ratios['bare']:.2f}" if "bare" in ratios else ""
        table = Table(
            "adapters", "top-k", *POPULARITY, title=f"{dtype}, r={rank}: plain transformers 1.00 ({plain:.1f} ms){bare}"
        )
        for who, k in (("ours", 1), ("peft", 1), ("ours", 4)):
            for n in ACTIVE:
                cells = [
                    f"{ratios[name]:.2f}" if (name := f"{who} n={n} k={k} {p}") in ratios else "" for p in POPULARITY
                ]
                if any(cells):
                    table.add_row(f"{who} {n}", str(k), *cells)
        for name in ("resident=16", "resident=1024"):
            if name in ratios:
                table.add_row(name, "1", "", "", "", f"{ratios[name]:.3f}")
        console.print(table)


def main() -> None:
    """Run, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--quick", action="store_true", help="16 adapters, r=8 and popularity distinct only; writes nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lines: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for rank in (8,) if options.quick else (8, 16):
            popularities, actives = (("distinct",), (16,)) if options.quick else (POPULARITY, ACTIVE)
            lines += run_case(dtype, rank, options.rounds, popularities, actives)
        lines += (
            [line | {"r": "8, residents"} for line in run_resident(dtype, 8, options.rounds)]
            if not options.quick
            else []
        )
    show(lines)
    path_line = {
        "operator_path": native.status().detail,
        "coefficients": {str(d): cost.coefficients(d) for d in (torch.float32, torch.bfloat16)},
    }
    if not options.quick:
        print(write("forward", [path_line, *lines]))


if __name__ == "__main__":
    main()
