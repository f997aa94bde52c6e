"""The methods of a suite by name, in the order in which they run, and how relations are measured.

What the report is about comes first and what takes longest last, so that a suite that is stopped has the most to tell.
"""

from collections.abc import Callable
from typing import Any

from training.baselines import BASELINES
from training.composing.ours import OURS
from training.composing.sweeps import SWEEPS
from training.suite.measured import relations
from training.suite.methods import Method, Nodes
from training.suite.workbench import Workbench

Relate = Callable[[Workbench, Nodes], dict[str, Any]]

RELATE: Relate | None = relations  # what the job `relations` of each cell runs; its answer becomes the cell's JSON
_FIRST = ("single", "shared", "ours", "ours-joint", "ours-random", "ours-joint-random", "task_arithmetic", "uniform")
_LAST = ("uniform_joint", "poly", "lorahub", "phatgoose", "xlora", "adapterfusion")
_every = OURS | BASELINES
_middle = [name for name in _every if name not in (*_FIRST, *_LAST)]
METHODS: dict[str, Method] = {name: _every[name] for name in (*_FIRST, *_middle, *_LAST)} | SWEEPS
