"""Round-robin timing: variants take turns in one process, so that drift of the machine hits them all alike."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one thread per call."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int


def round_robin(variants: Mapping[str, Callable[[], object]], rounds: int, label: str) -> dict[str, Timing]:
    """CPU time of the calling thread for each variant; quartiles over rounds, two warm-up rounds not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in track(range(rounds + 2), description=label, console=Console(stderr=True)):
        for name, call in variants.items():
            start = time.thread_time()
            call()
            if index >= 2:
                times[name].append(time.thread_time() - start)
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: list[float]) -> Timing:
    low, _, high = statistics.quantiles(values, n=4)
    return Timing(statistics.median(values), low, high, len(values))


def machine() -> dict[str, Any]:
    """What a reader must know of where and with what this ran."""
    import peft
    import transformers

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), processor
        )
    return {
        "cpu": processor, "cores": os.cpu_count(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__, "python": platform.python_version(), "commit": _commit(), "gpu": "not run on a GPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS, check=False)
    return found.stdout.strip() or "unknown"


def write(name: str, lines: list[dict[str, Any]]) -> Path:
    """One JSON line per setting, the machine first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"machine": machine()}, *lines]))
    return path


def renew(name: str, lines: list[dict[str, Any]]) -> Path:
    """Put lines in the place of those of the same setting and variant; each says on what it ran. Other lines stay."""
    path = RESULTS / f"{name}.jsonl"
    lines = [json.loads(json.dumps(line)) for line in lines]  # as the file has them
    fresh = {_subject(line) for line in lines}
    kept = [line for line in map(json.loads, path.read_text().splitlines()) if _subject(line) not in fresh]
    here = {"commit": _commit(), "processor": _processor()}
    heads = [line for line in kept if "hidden" not in line]
    settings = [line for line in kept if "hidden" in line] + [line | here for line in lines]
    settings.sort(key=lambda line: (line["hidden"], line["dtype"] != "float32", line["requests"]))  # stable
    path.write_text("".join(json.dumps(line) + "\n" for line in heads + settings))
    return path


def _subject(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a line is about: its hidden, dtype and requests, and which of the kinds of lines it is."""
    kinds = (str(line.get(kind)) for kind in ("variant", "equal", "profile"))
    return line.get("hidden"), line.get("dtype"), line.get("requests"), *kinds


def _processor() -> str:
    """Name, family and model: a name alone may stand for several generations."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine())
    return f"{name}, family {found['cpu family']}, model {found['model']}" if "cpu family" in found else name
