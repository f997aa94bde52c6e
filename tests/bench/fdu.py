"""Real data, the whole way: 16 FDU-MTL tasks trained with 100 examples each, published, related, served, asked.

Trains heads alone and LoRA adapters with `python -m training`, scores them there, then asks a server on the same
store for every test text through `/v1/infer` and compares. Finished steps are kept in runs/bench-fdu, so a stopped run
goes on. Run: python -m tests.bench.fdu [--data ../shared/data/fdu_mtl] [--examples 100] [--seed 0]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from server import backbone
from server.config import Settings
from tests.bench.end_to_end import Server
from tests.bench.rounds import write

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "bench-fdu"
# How each row of the table is asked for: (store, mode)
VARIANTS = {"head only": ("head", "single"), "single": ("lora", "single"), "prior": ("lora", "prior")}
REFERENCE = {"head only": 0.684, "single": 0.758}  # measured elsewhere on this setting, one seed, 200 test texts


def training(*arguments: object) -> None:
    """One command of the training package; stops this program if it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "training", *map(str, arguments)]
    print("$ espalier-train", *arguments, file=sys.stderr)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train(kind: str, data: Path, examples: int, seed: int) -> float | None:
    """Fit, publish and, for adapters, relate one kind; seconds it took, None if it was done before."""
    store, start = WORK / f"store-{kind}", time.perf_counter()
    if (store / "done").exists():
        return None
    training("fit", "--data", data, "--kind", kind, "--examples", examples, "--max-length", 96, "--epochs", 5,
             "--seed", seed, "--runs", WORK, "--run", kind)  # fmt: skip
    training("publish", "--run", WORK / kind, "--store", store)
    if kind != "head":
        training("relate", "--run", WORK / kind, "--store", store)
    (store / "done").touch()
    return time.perf_counter() - start


def evaluated(kind: str, modes: str, data: Path) -> dict[tuple[str, str], float]:
    """(task, mode) -> accuracy, as training's own evaluation has it."""
    out = WORK / f"evaluated-{kind}.jsonl"
    if not out.exists():
        training("score", "--data", data, "--store", WORK / f"store-{kind}", "--modes", modes, "--out", out)
    return {(line["task"], line["mode"]): line["accuracy"] for line in map(json.loads, out.read_text().splitlines())}


def asked(kind: str, modes: Sequence[str], data: Path) -> dict[tuple[str, str], float]:
    """(task, mode) -> accuracy through `/v1/infer` of a server on the store."""
    served = backbone.load(None, "float32", "cpu")
    found = {}
    with Server(Settings(store=WORK / f"store-{kind}"), served) as server, httpx.Client(timeout=600) as client:
        for folder in track(sorted(data.iterdir()), f"asking {kind}", console=Console(stderr=True)):
            if not (folder / "test.jsonl").exists():
                continue
            rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().split("\n") if line]
            for mode in modes:
                found[folder.name.lower(), mode] = _accuracy(client, server.port, folder.name.lower(), mode, rows)
    return found


def _accuracy(client: httpx.Client, port: int, task: str, mode: str, rows: Sequence[dict[str, str]]) -> float:
    right = 0
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        inputs = [{"task": task, "text": row["text"]} for row in part]
        reply = client.post(f"http://127.0.0.1:{port}/v1/infer", json={"inputs": inputs, "options": {"mode": mode}})
        reply.raise_for_status()
        right += sum(out["label"] == row["label"] for out, row in zip(reply.json()["outputs"], part, strict=True))
    return right / len(rows)


def lines_of(data: Path) -> list[dict[str, Any]]:
    """One line per task and variant: accuracy in training's evaluation and through the server."""
    modes = {kind: [mode for k, mode in VARIANTS.values() if k == kind] for kind in ("head", "lora")}
    trained = {
        (kind, *key): value for kind in modes for key, value in evaluated(kind, ",".join(modes[kind]), data).items()
    }
    server = {(kind, *key): value for kind in modes for key, value in asked(kind, modes[kind], data).items()}
    return [
        {"task": task, "variant": variant, "accuracy": round(trained[kind, task, mode], 6),
         "accuracy_through_server": round(server[kind, task, mode], 6)}
        for variant, (kind, mode) in VARIANTS.items()
        for task in sorted({task for k, task, m in trained if (k, m) == (kind, mode)})
    ]  # fmt: skip


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Accuracy per task, and the mean."""
    table = Table("task", *VARIANTS, title="test accuracy (in brackets through the server, where it differs)")
    tasks = sorted({line["task"] for line in lines})
    by_key = {(line["task"], line["variant"]): line for line in lines}
    for task in tasks:
        table.add_row(task, *(_cell(by_key[task, variant]) for variant in VARIANTS))
    means = [statistics.mean(by_key[task, variant]["accuracy"] for task in tasks) for variant in VARIANTS]
    table.add_row("mean", *(f"{mean:.3f}" for mean in means), style="bold")
    Console(width=110).print(table)


def _cell(line: dict[str, Any]) -> str:
    same = line["accuracy"] == line["accuracy_through_server"]
    return f"{line['accuracy']:.3f}" + ("" if same else f" ({line['accuracy_through_server']:.3f})")


def main() -> None:
    """Train what is missing, evaluate, ask, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "fdu_mtl")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} is not there: this benchmark needs the FDU-MTL data (--data FOLDER)")
    seconds = {kind: train(kind, options.data, options.examples, options.seed) for kind in ("head", "lora")}
    lines = lines_of(options.data)
    show(lines)
    setting = {
        "examples": options.examples,
        "max_length": 96,
        "epochs": 5,
        "seed": options.seed,
        "seconds_training": seconds,
    }
    means = {v: round(statistics.mean(one["accuracy"] for one in lines if one["variant"] == v), 4) for v in VARIANTS}
    print(write("fdu", [setting | {"reference": REFERENCE, "mean": means}, *lines]))


if __name__ == "__main__":
    main()
