"""A C file is built once, kept under what decides its machine code, and a failure says why."""

import ctypes
import shutil
from pathlib import Path

import pytest

from adapters_store import compiled

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ESPALIER_NATIVE", raising=False)


def _source(folder: Path, text: str) -> Path:
    path = folder / "answer.c"
    path.write_text(text)
    return path


def test_a_source_is_built_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    source = _source(tmp_path, "int answer(void) { return 42; }")
    first = compiled.build("answer", [source])
    built_at = first.stat().st_mtime_ns

    again = compiled.build("answer", [source])
    assert (again, again.stat().st_mtime_ns) == (first, built_at)
    changed = compiled.build("answer", [_source(tmp_path, "int answer(void) { return 43; }")])

    assert [ctypes.CDLL(str(path)).answer() for path in (first, changed)] == [42, 43]
    assert sorted(first.parent.iterdir()) == sorted([first, changed])


def test_a_change_in_an_included_file_builds_anew(tmp_path: Path) -> None:
    source, part = _source(tmp_path, '#include "part.h"\nint answer(void) { return PART; }'), tmp_path / "part.h"

    answers = []
    for number in (1, 2):
        part.write_text(f"#define PART {number}")
        answers.append(ctypes.CDLL(str(compiled.build("answer", [source], included=[part]))).answer())

    assert answers == [1, 2]


def test_other_flags_make_another_library(tmp_path: Path) -> None:
    source = _source(tmp_path, "int answer(void) { return ANSWER; }")

    built = [compiled.build("answer", [source], (*compiled.FLAGS, f"-DANSWER={number}")) for number in (1, 2)]

    assert [ctypes.CDLL(str(path)).answer() for path in built] == [1, 2]


def test_what_the_compiler_says_is_told_and_nothing_half_done_stays(tmp_path: Path) -> None:
    source = _source(tmp_path, "int answer(void) { return nonsense; }")

    with pytest.raises(compiled.FAILURES) as failure:
        compiled.build("answer", [source])

    assert "nonsense" in compiled.reason(failure.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_switched_off_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_NATIVE", "0")

    with pytest.raises(OSError, match="ESPALIER_NATIVE=0"):
        compiled.build("answer", [_source(tmp_path, "int answer(void) { return 42; }")])

    assert not (tmp_path / "cache").exists()
