"""README's tables, made from the committed results. Run: python -m tests.bench.tables (writes README.md in place).

Tables stand between `<!-- name -->` and `<!-- /name -->`; a test holds that README has what this makes.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import method_tables
from tests.bench.cotrain_cost import over_peft
from tests.bench.rounds import RESULTS

README = Path(__file__).parents[2] / "README.md"


def lines(name: str) -> list[dict[str, Any]]:
    """All lines of a results file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def machine() -> str:
    """Where and with what the forward was measured."""
    facts = lines("forward")[0]["machine"]
    return (
        f"{facts['cpu']} ({facts['cpu_capability']}), {facts['cores']} shared cores; torch {facts['torch']}, "
        f"transformers {facts['transformers']}, PEFT {facts['peft']}; commit {facts['commit']}; {facts['gpu']}."
    )


def forward() -> str:
    """Cost of composing: by adapters in the batch, at the popularity that is hardest for a loop over adapters."""
    ratios = {(one["dtype"], one["r"], one["variant"]): one["ratio"] for one in lines("forward") if "variant" in one}
    rows = [
        "| adapters in the batch | | ours, top-1 | ours, top-4 | PEFT mixed batch, top-1 |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for rank in (8, 16):
            for n in (1, 16, 64):
                names = (f"ours n={n} k=1 distinct", f"ours n={n} k=4 distinct", f"peft n={n} k=1 distinct")
                cells = [f"{ratios[dtype, rank, name]:.2f}" for name in names]
                rows.append(f"| {n} | {dtype}, r={rank} | {' | '.join(cells)} |")
    few, many = (ratios["float32", "8, residents", f"resident={n}"] for n in (16, 1024))
    low, high = (ratios["bfloat16", "8, residents", f"resident={n}"] for n in (16, 1024))
    bare = [f"{ratios[dtype, rank, 'bare']:.2f}" for dtype in ("float32", "bfloat16") for rank in (8, 16)]
    rows.append(
        f"\nOur forward without any adapter took {bare[0]} and {bare[1]} (float32), {bare[2]} and {bare[3]} (bfloat16, "
        "where packed attention has a faster form) in the same two runs."
    )
    rows.append(
        f"\nWith 1,024 adapters resident instead of 16, and the same 16 active, the forward takes {many / few:.2f} "
        f"(float32) and {high / low:.2f} (bfloat16) of the time."
    )
    return "\n".join(rows)


def end_to_end() -> str:
    """Texts per second over HTTP and of the engine alone."""
    found = [one for one in lines("end_to_end") if "variant" in one]
    rows = [
        "| inputs per call | calls in flight | texts/s | of the engine alone | p50 | p99 |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {one['inputs_per_call']} | {one['in_flight']} | {one['texts_per_s']:.0f} | {one['ratio']:.2f} "
        f"| {one['p50_ms']:.0f} ms | {one['p99_ms']:.0f} ms |"
        for one in found[1:]
    ]
    return "\n".join([*rows, f"\nThe engine alone: {found[0]['texts_per_s']:.0f} texts/s."])


def fdu() -> str:
    """Accuracy per variant, its reference, and whether the server said the same."""
    setting, found = lines("fdu")[1], [one for one in lines("fdu") if "variant" in one]
    rows = ["| | mean accuracy | tasks better than single | reference |", "|---|---|---|---|"]
    single = {one["task"]: one["accuracy"] for one in found if one["variant"] == "single"}
    for variant, mean in setting["mean"].items():
        mine = {one["task"]: one["accuracy"] for one in found if one["variant"] == variant}
        better = sum(mine[task] > single[task] for task in single)
        rows.append(f"| {variant} | {mean:.3f} | {better} of {len(single)} | {setting['reference'].get(variant, '')} |")
    differ = [one for one in found if one["accuracy"] != one["accuracy_through_server"]]
    largest = max((abs(one["accuracy"] - one["accuracy_through_server"]) for one in differ), default=0)
    same = (
        "every one of them equal" if not differ else f"{len(differ)} of {len(found)} differ, by {largest:.4f} at most"
    )
    return "\n".join([*rows, f"\nAsked again through `/v1/infer`, the {len(found)} accuracies are the same: {same}."])


def cotrain_cost() -> str:
    """Examples per second of co-training, over PEFT and Trainer in the same run, and peaks of memory."""
    found = lines("cotrain_cost")[1:]
    rows = [
        "| adapters on | dtype | threads | | examples/s | over PEFT | peak memory | rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {one['sites']}, blocks {one['first_layer']} to 5 | {one['dtype']} | {one['threads']} | {one['side']} "
        f"| {one['examples_per_s']:.1f} "
        f"| {over_peft(found, one):.2f} | {one['peak_mb']} MB | {one['rounds']} |"
        for one in found
    ]
    return "\n".join(rows)


def generate() -> str:
    """Useful new tokens per second: transformers' two ways, PEFT, and ours with and without compositions."""
    settings, by = _generated("generate")
    rows = [
        "| model, requests | `generate` | its batching | PEFT | PEFT top-1 | top-4 | ours, bare | top-1 | top-4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        cells = [f"{by[*setting, name]['tokens_per_s']:.0f}" for name in ("c", "d", "e", "e1", "e4", "a", "b1", "b4")]
        rows.append(f"| {_of_setting(setting)} | {' | '.join(cells)} |")
    outside = max(one["outside_forward"] for one in by.values() if one["requests"] == 64 and "outside_forward" in one)
    return "\n".join([
        *rows, f"\nAt 64 requests at most {outside:.1%} of a step is spent outside the model's forward. "
        + _equalities(lines("generate")), "\nThe file also has commits, rounds, and where the time of a step goes.",
    ])  # fmt: skip


def generate_ratios(name: str) -> str:
    """The same as ratios of speeds: over `generate`, of ours without adapters, and over PEFT."""
    settings, by = _generated(name)
    ratios = (("a", "c"), ("b1", "a"), ("b4", "a"), ("b1", "e"), ("b4", "e"), ("b1", "e1"), ("b4", "e4"))
    heads = ("bare over `generate`", "top-1 of bare", "top-4", "top-1 over PEFT", "top-4", "over PEFT top-1", "top-4")
    rows = [f"| model, requests | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|"]
    for setting in settings:
        cells = [f"{by[*setting, one][f'over_{other}']:.2f}" for one, other in ratios]
        rows.append(f"| {_of_setting(setting)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _generated(name: str) -> tuple[list[tuple[Any, ...]], dict[tuple[Any, ...], dict[str, Any]]]:
    """Settings of a file in order, and its lines by setting and variant."""
    found = [one for one in lines(name) if "hidden" in one]
    settings = list(dict.fromkeys((one["hidden"], one["dtype"], one["requests"]) for one in found))
    return settings, {(one["hidden"], one["dtype"], one["requests"], one["variant"]): one for one in found
                      if "variant" in one}  # fmt: skip


def _of_setting(setting: tuple[Any, ...]) -> str:
    return f"8 x {setting[0]} {setting[1]}, {setting[2]}"


def _equalities(found: Sequence[dict[str, Any]]) -> str:
    """What share of requests got the very tokens that transformers and PEFT give."""
    shares: dict[str, list[float]] = {}
    for one in found:
        if "equal" in one and one["equal"] in (["a", "c"], ["be", "e"], ["b1", "e1"], ["b4", "e4"]):
            shares.setdefault(one["dtype"], []).append(one["equal_requests"])
    exact = min(shares["float32"])
    rounded = shares["bfloat16"]
    return (
        f"In float32 {'all' if exact == 1 else f'at least {exact:.1%} of'} requests gave token for token what "
        "`generate` (no adapter) and PEFT (one adapter at weight 1, and both compositions) give; in bfloat16, where "
        f"products round differently, {min(rounded):.0%} to {max(rounded):.0%}."
    )


TABLES = {
    "machine": machine, "forward": forward, "end_to_end": end_to_end, "fdu": fdu, "generate": generate,
    "generate_ratios": functools.partial(generate_ratios, "generate"),
    "generate_zen4": functools.partial(generate_ratios, "generate_zen4"), "cotrain_cost": cotrain_cost,
    "method": method_tables.method, "synthetic": method_tables.synthetic,
}  # fmt: skip


def with_tables(text: str) -> str:
    """README with every table that it has a place for made anew."""
    for name, make in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        head, _, rest = text.partition(f"<!-- {name} -->")
        _, _, tail = rest.partition(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{make()}\n<!-- /{name} -->{tail}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
