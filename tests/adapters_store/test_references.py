"""Names are identifiers, never paths; a reference is written in one way and read back as itself."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import InvalidNameError
from adapters_store.references import Reference, check_alias, check_name, parse_reference

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
aliases = names.filter(lambda name: not name.isdigit() and name != "latest")
digests = st.from_regex(r"sha256:[0-9a-f]{12,64}", fullmatch=True)
references = st.one_of(
    st.builds(Reference, names),
    st.builds(Reference, names, version=st.integers(1, 99_999_999)),
    st.builds(Reference, names, alias=aliases),
    st.builds(Reference, names, digest=digests),
)


@settings(deadline=None)
@given(references)
def test_a_reference_is_read_back_as_it_was_written(reference):
    assert parse_reference(str(reference)) == reference


@settings(deadline=None)
@given(st.text(max_size=80) | st.text("ab01./\\@:-_ \n\0%", max_size=20))
def test_any_text_is_a_reference_or_refused(text):
    try:
        reference = parse_reference(text)
    except InvalidNameError:
        return
    assert check_name(reference.name) == reference.name
    assert [reference.version, reference.alias, reference.digest].count(None) >= 2


@settings(deadline=None)
@given(names)
def test_a_name_stays_in_its_folder_and_has_no_twin(name):
    assert Path("/root", name).resolve().parent == Path("/root")
    assert name == name.lower() == name.casefold()
    assert name.isascii()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "_x",
        "A",
        "a/b",
        "a\\b",
        "/a",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "\u017f",
        "\u0430",
        "a@b",
        "a:b",
        "a" * 65,
    ],
)
def test_what_is_no_name_is_refused_with_the_rule(name):
    with pytest.raises(InvalidNameError, match="use 1 to 64 of a-z, 0-9"):
        check_name(name)


@pytest.mark.parametrize(
    "text",
    [
        *("books@", "books@0", "books@01", "books@1@2", "books@../x", "@1"),
        *("books@sha256:abc", "books@sha256:" + "0" * 65, "books@SHA256:" + "0" * 12),
    ],
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(InvalidNameError):
        parse_reference(text)


@pytest.mark.parametrize("alias", ["1", "007", "latest"])
def test_an_alias_cannot_be_taken_for_a_version(alias):
    with pytest.raises(InvalidNameError, match="numbers are versions, and 'latest' is implied"):
        check_alias(alias)


def test_latest_is_the_bare_name() -> None:
    assert parse_reference("books@latest") == parse_reference("books")
