"""How the sides of cotrain_cost.py take turns, and what they have in common."""

import time
from typing import Protocol

import torch

BATCH = 8  # texts of a task in a step
RANK, ALPHA = 8, 16


class Turns(Protocol):
    """When a side may go on, and whom it tells what it did: sides take turns step by step."""

    def wait(self) -> bool:
        """Block until it is this side's turn; False if no more is wanted."""

    def tell(self, seconds: float, examples: int) -> None:
        """Seconds that so many examples took."""


def now() -> float:
    """CPU seconds of one thread; where there are several, what counts is the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class StepTurns:
    """A progress bar to training that waits after each step for the next turn. The first step warms up, uncounted."""

    def __init__(self, turns: Turns, examples: int) -> None:
        self._turns, self._examples = turns, examples
        self._began: float | None = None

    def advance(self, count: int = 1, note: str = "") -> None:  # Bar's signature
        """A step is done."""
        if self._began is not None:
            self._turns.tell(now() - self._began, self._examples)
        self._turns.wait()
        self._began = now()

    def say(self, line: str) -> None:
        """Nothing to show."""
