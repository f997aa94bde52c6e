"""Reading task folders: splits, leaks, sampling, and errors that name file and line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from training.errors import DataError
from training.examples import Example, Pair
from training.tasks import Sampling, read_task, read_tasks, sample


def rows(count: int, labels: tuple[str, ...] = ("no", "yes")) -> list[tuple[str, str]]:
    return [(f"text {i}", labels[i % len(labels)]) for i in range(count)]


def write(file: Path, some: list[tuple[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in some))


def test_a_folder_of_tasks_is_read_in_order_with_lower_case_names(tmp_path: Path) -> None:
    write(tmp_path / "MR" / "train.jsonl", rows(10))
    write(tmp_path / "books" / "train.jsonl", rows(10))
    (tmp_path / "notes").mkdir()

    assert [task.name for task in read_tasks(tmp_path)] == ["books", "mr"]
    assert [task.name for task in read_tasks(tmp_path, names=["mr"])] == ["mr"]


def test_dev_is_cut_from_train_stratified_and_the_same_every_time(tmp_path: Path) -> None:
    write(
        tmp_path / "t" / "train.jsonl", [(f"a {i}", "no") for i in range(60)] + [(f"b {i}", "yes") for i in range(40)]
    )

    task, again = read_task(tmp_path / "t"), read_task(tmp_path / "t")
    other = read_task(tmp_path / "t", Sampling(seed=1))

    assert task == again
    assert task.dev != other.dev
    assert Counter(example.label for example in task.dev) == {"no": 12, "yes": 8}
    assert not set(task.dev) & set(task.train)
    assert len(task.train) == 80


def test_dev_is_at_most_so_many_and_an_own_dev_split_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(100))
    assert len(read_task(tmp_path / "t", Sampling(max_dev=7)).dev) == 7

    write(tmp_path / "t" / "dev.jsonl", [("own", "yes")])
    task = read_task(tmp_path / "t", Sampling(max_dev=7))
    assert task.dev == (Example("own", "yes"),)
    assert len(task.train) == 100


def test_leaks_and_repeated_texts_are_left_out_of_train(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", [*rows(6), ("text 0", "no"), ("held out", "yes")])
    write(tmp_path / "t" / "dev.jsonl", [("other", "yes")])
    write(tmp_path / "t" / "test.jsonl", [("held out", "yes")])
    (tmp_path / "t" / "meta.json").write_text(json.dumps({"train_rows_whose_text_is_also_in_test": [0, 3]}))

    # row 0 is left out by its number, so its copy in row 6 is the first occurrence
    assert sorted(example.text for example in read_task(tmp_path / "t").train) == [
        "text 0",
        "text 1",
        "text 2",
        "text 4",
        "text 5",
    ]


def test_examples_are_stratified_seeded_and_do_not_change_dev(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(100, ("a", "b", "c", "d")))

    few, all_of_them = read_task(tmp_path / "t", Sampling(examples=20)), read_task(tmp_path / "t")

    assert Counter(example.label for example in few.train) == {"a": 5, "b": 5, "c": 5, "d": 5}
    assert few.dev == all_of_them.dev
    assert set(few.train) <= set(all_of_them.train)


def test_a_sample_gives_rare_labels_their_share() -> None:
    split = tuple(Example(str(i), "rare" if i < 10 else "usual") for i in range(100))

    assert Counter(example.label for example in sample(split, 30, "seed")) == {"rare": 3, "usual": 27}
    assert len(sample(split, 1000, "seed")) == 100


@pytest.mark.parametrize("count", [2, 3, 10])
def test_few_examples_of_a_skewed_task_have_as_many_labels_as_they_can(tmp_path: Path, count: int) -> None:
    lines = [{"text": f"text {i}", "label": "toxic" if i < 50 else "odd" if i < 60 else "ok"} for i in range(1000)]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    task = read_task(tmp_path / "t", Sampling(examples=count, dev_fraction=0.0))

    assert len(set(task.train)) == count
    assert len({example.label for example in task.train}) == min(count, 3)


def test_task_toml_gives_texts_and_order_of_labels(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(10))
    (tmp_path / "t" / "task.toml").write_text(
        'description = "d"\nfamily = "f"\n[labels]\nyes = "it is"\nno = "it is not"\n'
    )

    task = read_task(tmp_path / "t")

    assert task.labels == ("yes", "no")
    assert dict(task.label_texts) == {"yes": "it is", "no": "it is not"}
    assert task.targets((Example("", "no"), Example("", "yes"))) == [1, 0]


def test_the_digest_follows_the_examples(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(10))
    before = read_task(tmp_path / "t").digest
    write(tmp_path / "t" / "train.jsonl", rows(11))

    assert read_task(tmp_path / "t").digest != before


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "not JSON"),
        ("[1]", "a list"),
        ('{"text": "x"}', "keys ['text']"),
        ('{"text": 3, "label": "a"}', "keys"),
        ('{"text": "x", "label": null}', "keys"),
        ('{"prompt": "x", "completion": "y"}', "keys ['completion', 'prompt']"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_what_was_expected(tmp_path: Path, line: str, found: str) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(4))
    with (tmp_path / "t" / "train.jsonl").open("a") as file:
        file.write(line + "\n")

    with pytest.raises(DataError) as caught:
        read_task(tmp_path / "t")

    assert "train.jsonl:5: expected" in str(caught.value)
    assert found in str(caught.value)


def write_pairs(file: Path, some: list[tuple[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in some))


def test_prompts_with_completions_are_a_task_without_labels(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t" / "train.jsonl", [("one", f" {i}") for i in range(20)] + [("one", " 3"), ("", " 4")])
    write_pairs(tmp_path / "t" / "test.jsonl", [("one", " 5")])

    task = read_task(tmp_path / "t")

    assert task.generates
    assert task.labels == ()
    assert len(task.train) + len(task.dev) == 20  # without the repeated one and the one in test
    assert Pair("one", " 5") not in task.train + task.dev
    assert Pair("", " 4") in task.train + task.dev
    assert read_task(tmp_path / "t", Sampling(dev_fraction=0)).digest != task.digest


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "not JSON"),
        ('{"prompt": "x"}', "found keys ['prompt']"),
        ('{"prompt": "x", "completion": ""}', "not empty as completion, found keys ['completion', 'prompt']"),
        ('{"prompt": null, "completion": "y"}', "found keys"),
        ('{"text": "x", "label": "y"}', "all lines of a task are of one sort, found keys ['label', 'text']"),
        ('{"text": "x", "label": "y", "prompt": "x", "completion": "y"}', "of one sort"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_line_among_pairs_is_named(tmp_path: Path, line: str, found: str, split: str) -> None:
    for name in ("train", "test"):
        write_pairs(tmp_path / "t" / f"{name}.jsonl", [(f"{name} {i}", " y") for i in range(4)])
    with (tmp_path / "t" / f"{split}.jsonl").open("a") as file:
        file.write(line + "\n")

    with pytest.raises(DataError) as caught:
        read_task(tmp_path / "t")

    assert f'{split}.jsonl:5: expected {{"prompt": "…", "completion": "…"}}' in str(caught.value)
    assert found in str(caught.value)


def test_a_first_line_may_be_of_either_sort_and_the_error_says_so(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t" / "train.jsonl", [("a", "")])

    with pytest.raises(DataError, match=r'"label": "…"} or {"prompt": "…", "completion": "…"} with a string as text'):
        read_task(tmp_path / "t")


def test_a_task_with_completions_has_no_labels_and_is_not_empty(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t" / "train.jsonl", [("a", "b")])
    (tmp_path / "t" / "task.toml").write_text("[labels]\nyes = 'y'")
    with pytest.raises(DataError, match=r"leave \[labels\] out"):
        read_task(tmp_path / "t")
    (tmp_path / "t" / "task.toml").unlink()
    write_pairs(tmp_path / "t" / "dev.jsonl", [("a", "b")])
    with pytest.raises(DataError, match="none is left"):
        read_task(tmp_path / "t")


def test_other_mistakes_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder with one folder per task"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no task here"):
        read_tasks(tmp_path)
    write(tmp_path / "one" / "train.jsonl", [("a", "x"), ("b", "x")])
    with pytest.raises(DataError, match="at least 2 labels"):
        read_tasks(tmp_path)
    with pytest.raises(DataError, match="no task 'two'; it has: one"):
        read_tasks(tmp_path, names=["two"])


def test_a_bad_task_toml_is_named(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.jsonl", rows(4))
    for text, expected in (
        ("oops", "expected TOML"),
        ("colour = 1", "colour"),
        ("[labels]\nyes = 'y'", "label 'no' is not among"),
    ):
        (tmp_path / "t" / "task.toml").write_text(text)
        with pytest.raises(DataError, match=expected):
            read_task(tmp_path / "t")


def test_a_folder_name_that_is_no_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "two words" / "train.jsonl", rows(4))

    with pytest.raises(DataError, match="two words"):
        read_tasks(tmp_path)
