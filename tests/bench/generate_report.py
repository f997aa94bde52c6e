"""What the generation benchmark compares, the goals, and its table for people."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "a": "ours, no adapter",
    "b1": "ours, a composition per request, top-1",
    "b4": "ours, a composition per request, top-4",
    "be": "ours, PEFT's work: one adapter at weight 1",
    "c": "transformers generate, left-padded",
    "d": "transformers continuous batching",
    "e": "PEFT mixed batch, one adapter at weight 1",
    "e1": "PEFT mixed batch, the compositions of b1",
    "e4": "PEFT mixed batch, the compositions of b4",
}
# (of, over) -> the ratio to reach by dtype, at 64 requests
GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("a", "c"): {"float32": 2.3, "bfloat16": 2.3},
    ("b1", "a"): {"float32": 0.7, "bfloat16": 0.55},
    ("b4", "a"): {"float32": 0.6, "bfloat16": 0.45},
    ("b1", "e"): {"float32": 5, "bfloat16": 5},
    ("b1", "e1"): {"float32": 5, "bfloat16": 5},
    ("b4", "e4"): {"float32": 5, "bfloat16": 5},
}
MOST_OUTSIDE = 0.05  # of a step, outside the model's forward, at 64 requests


@dataclass(frozen=True)
class Setting:
    """One column of the table."""

    hidden: int
    dtype: str
    requests: int

    @property
    def title(self) -> str:
        """For tables and the progress bar."""
        return f"8 x {self.hidden}, {self.dtype}, {self.requests} requests"

    def rounds(self, variant: str, most: int) -> int:
        """Turns of a variant: fewer for the slow ones, one for PEFT with many requests; fewer in the larger model."""
        of_peft = most if self.requests > 16 else 1
        fewer = {"c": 1, "d": 1, "be": most}.get(variant, of_peft if variant[0] == "e" else 0) + (self.hidden > 512)
        return max(1, most - fewer)


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A table of speeds, the goals next to what was reached, and whether tokens were equal."""
    console = Console(width=160)
    settings = list(dict.fromkeys(_setting_of(line) for line in lines))
    by = {(_setting_of(line), line["variant"]): line for line in lines if "variant" in line}
    table = Table("useful new tokens per second", *(setting.title for setting in settings))
    for name, what in NAMES.items():
        cells = [
            f"{by[s, name]['tokens_per_s']:.0f} ({by[s, name]['rounds']})" if (s, name) in by else "" for s in settings
        ]
        table.add_row(f"({name}) {what}", *cells)
    console.print(table)
    for setting in settings:
        if setting.requests == 64:
            console.print(_goals(setting, lambda name, setting=setting: by.get((setting, name))))
    for line in lines:
        if "equal" in line or "profile" in line:
            console.print(line)


def _setting_of(line: Mapping[str, Any]) -> Setting:
    return Setting(line["hidden"], line["dtype"], line["requests"])


def _goals(setting: Setting, line: Callable[[str], Any]) -> str:
    """One line: each ratio and its goal."""
    said = []
    for (of, over), least in GOALS.items():
        if (mine := line(of)) and (other := line(over)):
            ratio, goal = mine["tokens_per_s"] / other["tokens_per_s"], least[setting.dtype]
            said.append(f"({of}) {ratio:.2f} x ({over}), goal {goal} {'reached' if ratio >= goal else 'MISSED'}")
    for name in ("a", "b1", "b4"):
        if mine := line(name):
            share = mine["outside_forward"]
            said.append(f"({name}) outside {share:.1%} {'' if share <= MOST_OUTSIDE else 'OVER 5%'}")
    return f"{setting.title}: " + "; ".join(said)
