"""Tasks: folders of `train.jsonl`, optional `dev.jsonl` and `test.jsonl`.

A task classifies, one {"text": …, "label": …} per line, or generates, one {"prompt": …, "completion": …} per line.
`task.toml` (optional) has `description`, `family` and, if it classifies, a table `[labels]` of label texts, whose order
is the order of the labels; if it generates, a list `stop` of texts before which an answer ends. `meta.json` (optional)
may list train rows to leave out, as `train_rows_whose_text_is_also_in_test`, counted from 0. Texts (prompts together
with their completions) that occur twice in train, or in train and in dev or test, are left out of train in any case.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store.errors import InvalidNameError
from adapters_store.manifest import canonical_json, digest_of
from adapters_store.references import check_name
from training import seeds
from training.errors import DataError
from training.examples import Example, Pair, Sort, Split, labelled, read

LEAKS = "train_rows_whose_text_is_also_in_test"


@dataclass(frozen=True)
class Sampling:
    """How splits are cut. examples: training examples to take per task, None for all."""

    seed: int = 0
    examples: int | None = None
    dev_fraction: float = 0.2
    max_dev: int = 100


class TaskFile(BaseModel):
    """What `task.toml` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    family: str = ""
    labels: dict[str, str] = {}
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), max_length=16)


@dataclass(frozen=True)
class Task:
    """One task and its three splits; dev and test may be empty. labels: none if it generates.

    stop: texts before which an answer ends, for models that learn no end of text.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    dev: Split = ()
    test: Split = ()
    description: str = ""
    family: str = ""
    label_texts: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()

    @property
    def generates(self) -> bool:
        """True if its answers are texts, False if they are labels."""
        return not self.labels

    def targets(self, split: Split) -> list[int]:
        """Index of each example's label."""
        index = {label: i for i, label in enumerate(self.labels)}
        return [index[example.label] for example in labelled(split)]

    @property
    def digest(self) -> str:
        """`sha256:…` of the examples an adapter is trained and chosen on."""
        rows = [[example.fields for example in split] for split in (self.train, self.dev)]
        return digest_of(canonical_json({"labels": self.labels, "train": rows[0], "dev": rows[1]}))


def read_tasks(folder: Path, sampling: Sampling = Sampling(), names: Sequence[str] = ()) -> list[Task]:
    """The tasks of a folder of task folders, by name; `names` chooses some. Raises DataError.

    A folder whose name begins with an underscore or a dot is no task: out-of-scope texts, caches.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with one folder per task, each with a train.jsonl")
    found = [path for path in sorted(folder.iterdir()) if path.name[0] not in "_." and (path / "train.jsonl").is_file()]
    folders = {_name(path): path for path in found}
    if not folders:
        raise DataError(f"{folder}: no task here; expected folders that hold a train.jsonl")
    missing = sorted(set(names) - set(folders))
    if missing:
        raise DataError(f"{folder} has no task {missing[0]!r}; it has: {', '.join(folders)}")
    return [read_task(path, sampling) for name, path in sorted(folders.items()) if not names or name in names]


def read_task(folder: Path, sampling: Sampling = Sampling()) -> Task:
    """The task of one folder. Raises DataError."""
    name, about = _name(folder), _task_file(folder / "task.toml")
    everything = read(folder / "train.jsonl")
    sort = type(everything[0]) if everything else None
    dev, test = read(folder / "dev.jsonl", sort), read(folder / "test.jsonl", sort)
    train = _clean(everything, _leaks(folder / "meta.json"), dev + test)
    labels = () if sort is Pair else _labels(folder, about, labelled(train + dev + test))
    if not dev:
        train, dev = _cut_dev(train, name, sampling)
    if sampling.examples is not None:
        train = _with_rare_labels(sample(train, sampling.examples, sampling.seed, name, "train"), train)
    _check(folder, about, train, sort)
    texts = tuple(about.labels.items())
    return Task(name, labels, train, dev, test, about.description, about.family, texts, about.stop)


def _check(folder: Path, about: TaskFile, train: Split, sort: Sort | None) -> None:
    """Refuse a task that cannot be trained. Raises DataError."""
    if sort is Pair and about.labels:
        raise DataError(f"{folder / 'task.toml'}: a task with completions has no labels; leave [labels] out")
    if sort is Pair and not train:
        raise DataError(f"{folder / 'train.jsonl'}: every example is also in dev.jsonl or test.jsonl, none is left")
    if sort is not Pair and len({example.label for example in labelled(train)}) < 2:
        raise DataError(
            f"{folder / 'train.jsonl'}: expected examples of at least 2 labels, found {len(train)} examples of fewer"
        )


def _name(folder: Path) -> str:
    try:
        return check_name(folder.resolve().name.lower(), "task")
    except InvalidNameError as error:
        raise DataError(f"{folder}: {error}") from error


def _task_file(file: Path) -> TaskFile:
    try:
        return TaskFile.model_validate(tomllib.loads(file.read_text())) if file.is_file() else TaskFile()
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{file}: expected TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(TaskFile.model_fields)
        raise DataError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; known are {known}") from error


def _leaks(file: Path) -> frozenset[int]:
    try:
        rows = json.loads(file.read_text()).get(LEAKS, []) if file.is_file() else []
        return frozenset(int(row) for row in rows)
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{file}: expected a JSON object whose {LEAKS!r} is a list of row numbers: {error}") from error


def _clean(train: Split, leaks: frozenset[int], held_out: Split) -> Split:
    """Without the rows that the source names as leaks, texts of other splits, and second occurrences of a text."""
    seen = {example.key for example in held_out}
    kept = []
    for row, example in enumerate(train):
        if row not in leaks and example.key not in seen:
            seen.add(example.key)
            kept.append(example)
    return tuple(kept)


def _labels(folder: Path, about: TaskFile, examples: Sequence[Example]) -> tuple[str, ...]:
    found = {example.label for example in examples}
    unknown = sorted(found - set(about.labels))
    if about.labels and unknown:
        raise DataError(
            f"{folder}: label {unknown[0]!r} is not among the [labels] of task.toml: {', '.join(about.labels)}"
        )
    return tuple(about.labels) or tuple(sorted(found))


def _cut_dev(train: Split, name: str, sampling: Sampling) -> tuple[Split, Split]:
    count = min(sampling.max_dev, round(sampling.dev_fraction * len(train)))
    dev = sample(train, count, sampling.seed, name, "dev")
    chosen = set(dev)
    return tuple(example for example in train if example not in chosen), dev


def sample(split: Split, count: int, *seed: object) -> Split:
    """`count` examples (all, if there are fewer), each label in its share of the split; seeded, in random order."""
    if count >= len(split):
        return tuple(split[i] for i in seeds.permutation(len(split), *seed))
    by_label: dict[str, list[Example | Pair]] = {}
    for i in seeds.permutation(len(split), *seed):
        by_label.setdefault(split[i].stratum, []).append(split[i])
    # the example at place p of its label's n stands at (p + 1/2) / n: the first `count` of them have the labels' shares
    spread = [((p + 0.5) / len(rows), label, row) for label, rows in by_label.items() for p, row in enumerate(rows)]
    chosen = [row for _, _, row in sorted(spread, key=lambda item: item[:2])[:count]]
    return tuple(chosen[i] for i in seeds.permutation(count, *seed, "order"))


def _with_rare_labels(chosen: Split, split: Split) -> Split:
    """The chosen examples, where one of a label that none of them has takes the place of one of the commonest."""
    found, counts = list(chosen), Counter(example.stratum for example in chosen)
    for example in split:
        commonest, count = counts.most_common(1)[0]
        if example.stratum not in counts and count > 1:
            place = max(i for i, other in enumerate(found) if other.stratum == commonest)
            found[place] = example
            counts.update({commonest: -1, example.stratum: 1})
    return tuple(found)


def first(task: Task, examples: int | None) -> Task:
    """The task with at most so many test examples, the first ones."""
    return replace(task, test=task.test[:examples])
