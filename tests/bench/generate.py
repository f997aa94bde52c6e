"""Generation: our engine with none and with 64 compositions, next to transformers' two ways and PEFT's mixed batch.

A random Llama of 8 layers, 512 or 1,024 wide; 16 or 64 requests that all come at once, prompts of 16 to 256 tokens and
16 to 128 new ones, greedy, nothing ends earlier; LoRA r=16 on all linear layers, 32 adapters. What counts is useful new
tokens per second of CPU time of one thread: tokens that `generate` makes past what a request wanted do not. Each
setting has a process of its own: what an allocator kept of other settings, and which huge pages they left, changed
seconds by up to a third. Variants take turns in it, after a short run each that is not counted; slow ones take fewer
turns (`rounds`).
Run: python -m tests.bench.generate [--rounds 3] [--only abcde] [--settings 512:float32:16,…] [--quick]
"""

import argparse
import contextlib
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from adapters_store.primitives import native
from server.generation import native_attention
from server.generation.batcher import Batcher
from tests.bench.generate_models import adapters_of, alone, compositions, llama, requests_of
from tests.bench.generate_profile import profile
from tests.bench.generate_report import NAMES, Setting, show
from tests.bench.generate_variants import Run, Variant, continuous_batching, engine, generate, ours, peft_mixed
from tests.bench.rounds import renew, write

EQUAL = (  # pairs that must give the same tokens, up to rounding
    ("a", "c"), ("a", "d"), ("be", "e"), ("b1", "e1"), ("b4", "e4"), ("c", "d"),
)  # fmt: skip


@dataclass
class Measured:
    """What the turns of one variant gave."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    step_s: float = 0.0  # by the batcher's own count, as the next
    forward_s: float = 0.0


class Case:
    """One setting, its models and its variants."""

    def __init__(self, setting: Setting, model: Any, only: str) -> None:
        self.setting = setting
        self.requests = requests_of(setting.requests)
        self.useful = sum(request.new_tokens for request in self.requests)
        self.measured: dict[str, Measured] = {}
        self.batcher: Batcher | None = None
        self._open = contextlib.ExitStack()
        self.variants = {name: make for name, make in self._variants(model, only).items() if name[0] in only}

    def _variants(self, model: Any, only: str) -> dict[str, Variant]:
        count, adapters = self.setting.requests, adapters_of(model)
        one, four = compositions(count, 1), compositions(count, 4)
        made: dict[str, Variant] = {}
        if {"a", "b"} & set(only):
            self.batcher = engine(model, adapters, count)
            made |= {"a": ours(self.batcher, lambda _: None), "b1": ours(self.batcher, one.__getitem__),
                     "b4": ours(self.batcher, four.__getitem__), "be": ours(self.batcher, alone)}  # fmt: skip
        made["c"] = generate(model)
        if "e" in only:
            asked = {"e": [alone(index) for index in range(count)], "e1": one, "e4": four}
            made |= {name: peft_mixed(model, adapters, mixes) for name, mixes in asked.items()}
        if "d" in only:  # last, because a thread of it runs from here on
            made["d"] = self._open.enter_context(continuous_batching(model, self.requests))
        return made

    def run(self, most_rounds: int, progress: Progress) -> None:
        """All turns of all variants."""
        turns = {name: self.setting.rounds(name, most_rounds) for name in self.variants}
        task = progress.add_task(self.setting.title, total=sum(turns.values()))
        warm_up = requests_of(4, longest_prompt=32, most_new=20)
        for index in range(most_rounds):
            for name, variant in self.variants.items():
                if index >= turns[name]:
                    continue
                if index == 0:
                    variant(warm_up)
                self._turn(name, variant)
                progress.advance(task)
        progress.remove_task(task)

    def _turn(self, name: str, variant: Variant) -> None:
        found = self.measured.setdefault(name, Measured())
        counters = self.batcher.counters if self.batcher else None
        step_s, forward_s = (counters.step_s, counters.forward_s) if counters else (0.0, 0.0)
        run: Run = variant(self.requests)
        if counters:
            found.step_s += counters.step_s - step_s
            found.forward_s += counters.forward_s - forward_s
        found.seconds.append(run.seconds)
        found.tokens = run.tokens
        if [len(tokens) for tokens in run.tokens] != [request.new_tokens for request in self.requests]:
            raise RuntimeError(f"{NAMES[name]} did not give the tokens that were asked for")

    def close(self) -> None:
        """Stop what runs on threads of its own."""
        self._open.close()

    def lines(self) -> list[dict[str, Any]]:
        """One line per variant, then one per pair that must be equal, then the profiles."""
        return [*map(self._line, self.measured), *self._equalities(), *self._profiles()]

    def speed(self, name: str) -> float:
        """Useful new tokens per second of CPU time: the median over turns."""
        return self.useful / statistics.median(self.measured[name].seconds)

    def _line(self, name: str) -> dict[str, Any]:
        found = self.measured[name]
        line: dict[str, Any] = {
            **vars(self.setting), "variant": name, "what": NAMES[name], "tokens_per_s": round(self.speed(name), 1),
            "cpu_s": [round(seconds, 2) for seconds in found.seconds], "rounds": len(found.seconds),
            "useful_tokens": self.useful,
        }  # fmt: skip
        for other in ("a", "c", "e", f"e{name[1:]}"):
            if other in self.measured:
                line[f"over_{other}"] = round(self.speed(name) / self.speed(other), 3)
        if found.step_s:
            line["outside_forward"] = round(1 - found.forward_s / found.step_s, 4)
        return line

    def _equalities(self) -> list[dict[str, Any]]:
        pairs = [pair for pair in EQUAL if set(pair) <= set(self.measured)]
        return [{**vars(self.setting), "equal": pair, **self._equality(*pair)} for pair in pairs]

    def _equality(self, mine: str, theirs: str) -> dict[str, float]:
        """Shares of requests that are the same to the last token, and of tokens before the first that differs."""
        both = list(zip(self.measured[mine].tokens, self.measured[theirs].tokens, strict=True))
        same = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*rows, strict=True)))
                for rows in both]  # fmt: skip
        whole = sum(one == other for one, other in both)
        return {"equal_requests": round(whole / len(both), 4), "equal_tokens": round(sum(same) / self.useful, 4)}

    def _profiles(self) -> list[dict[str, Any]]:
        if self.batcher is None or self.setting.requests < 64 or self.setting.hidden > 512:
            return []
        backbone = self.batcher.decoder.encoder.model
        names = [name for name in ("a", "b1", "b4") if name in self.measured]
        shares = {name: profile(self.variants[name], backbone, self.requests) for name in names}
        return [{**vars(self.setting), "profile": name, **found} for name, found in shares.items()]


def settings_of(named: str, *, quick: bool) -> list[Setting]:
    """All eight, those named as hidden:dtype:requests, or the smallest at 64 requests in float32."""
    if quick:
        return [Setting(512, "float32", 64)]
    if named:
        parts = [one.split(":") for one in named.split(",")]
        return [Setting(int(hidden), dtype, int(requests)) for hidden, dtype, requests in parts]
    return [Setting(*one) for one in itertools.product((512, 1024), ("float32", "bfloat16"), (16, 64))]


def measured(setting: Setting, only: str, rounds: int) -> list[dict[str, Any]]:
    """The lines of one setting. It wants a process of its own, or what others left of memory is measured too."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    case = Case(setting, llama(setting.hidden, setting.dtype), only)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            case.run(rounds, progress)
        return case.lines()
    finally:
        case.close()


def main() -> None:
    """Run, show, write after each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of the fastest variants")
    parser.add_argument(
        "--only", default="abcde", help="letters of the variants to run; some alone are written only with --settings"
    )
    parser.add_argument(
        "--settings",
        default="",
        help="hidden:dtype:requests, … to run, their lines in place of the file's",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one model, float32, 64 requests, one turn; writes nothing"
    )
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    writes = bool(options.settings) or (not options.quick and options.only == "abcde")
    paths = {"operators": native.status().detail, "attention": native_attention.status().detail}
    lines: list[dict[str, Any]] = []
    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with fresh:
        for setting in settings_of(options.settings, quick=options.quick):
            lines += fresh.submit(measured, setting, options.only, rounds).result()
            if writes:
                path = renew("generate", lines) if options.settings else write("generate", [paths, *lines])
    show(lines)
    if writes:
        print(path)


if __name__ == "__main__":
    main()
