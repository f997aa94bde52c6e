"""Text while it comes against one decode at the end, for every sort of decoder; stop strings against a plain search."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from server.generation.pieces import pieces_of
from server.generation.text import TextStream, token_bytes, token_text
from tests.conftest import SHARED_DATA
from tests.strategies import light

CORPUS = [
    "Once upon a time there was a little girl named Lily. She didn't like the rain, but she loved 3 dogs!",
    "Zoë ate crème brûlée for 5 €; naïve façade. 日本語のテキスト、中文文本。 🙂🙃👩‍👩‍👧 Ελληνικά русский",
]
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def _byte_level() -> Any:
    """As GPT-2: merges that end inside characters, an added token with letters that also stand for bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("日本")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def _metaspace() -> Any:
    """As T5: a space becomes a letter, and the first one is taken away."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def _word_ends() -> Any:
    """As the first GPT: a token's space depends on the next one, so only a window can decode it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", special_tokens=["<unk>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _words() -> Any:
    """No decoder at all: tokens with spaces between them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _sentence_piece() -> Any:
    """As Llama: byte tokens, and a space that is stripped at the beginning of a text."""
    return AutoTokenizer.from_pretrained(SHARED_DATA / "stories260k")


MAKERS: dict[str, Callable[[], Any]] = {
    "byte level": _byte_level,
    "word piece": _word_piece,
    "metaspace": _metaspace,
    "word ends": _word_ends,
    "words": _words,
    "bytes, slow": ByT5Tokenizer,
    "sentence piece": _sentence_piece,
}
has_stories = pytest.mark.skipif(not (SHARED_DATA / "stories260k").exists(), reason="needs ../shared/data/stories260k")
NAMES = [
    pytest.param(name, marks=[pytest.mark.data, has_stories] if name == "sentence piece" else []) for name in MAKERS
]
made = cache(lambda name: MAKERS[name]())


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _streamed(tokenizer: Any, prompt: Sequence[int], output: Sequence[int], stop: Sequence[str] = ()) -> str:
    stream = TextStream(tokenizer, prompt, stop)
    return "".join([stream.feed(token) for token in output]) + stream.finish()


TEXTS = st.lists(
    st.sampled_from([*CORPUS[0].split(), *CORPUS[1].split(), "don't", "🙂", "日", "é", " ", "  ", "\n", "?!", "a", "€"])
).map(" ".join)


@pytest.mark.parametrize("name", NAMES)
@light
@given(text=TEXTS, part=st.floats(0, 1))
@example(text="Once upon a time", part=0.0)
@example(text="Hello world", part=0.5)
@example(text="日本語 🙂 crème", part=0.3)
def test_pieces_are_what_the_output_adds_to_the_prompt(name: str, text: str, part: float) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(text, add_special_tokens=name == "sentence piece")
    prompt, output = ids[: int(part * len(ids))], ids[int(part * len(ids)) :]
    before, whole = _decoded(tokenizer, prompt), _decoded(tokenizer, ids)
    assume(whole.startswith(before))  # a prompt that ends inside a character is a case of its own, below

    assert _streamed(tokenizer, prompt, output) == whole[len(before) :]


def test_the_space_behind_the_prompt_is_kept_and_the_one_at_the_beginning_is_not() -> None:
    tokenizer = made("metaspace")
    token = tokenizer.convert_tokens_to_ids("▁a")

    assert _streamed(tokenizer, [token], [token, token]) == " a a"
    assert _streamed(tokenizer, [], [token, token]) == "a a"
    assert _streamed(tokenizer, [tokenizer.eos_token_id], [token, token]) == "a a"


@pytest.mark.parametrize("name", ["byte level", "word piece", "metaspace", "words", "word ends"])
@light
@given(data=st.data())
def test_random_tokens_give_what_a_decode_of_all_gives(name: str, data: st.DataObject) -> None:
    tokenizer = made(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    whole = _decoded(tokenizer, ids)

    found = _streamed(tokenizer, [], ids)

    assert found == whole or (name == "byte level" and found + UNKNOWN == whole)  # the end may be unfinished


@pytest.mark.data
@has_stories
@light
@given(data=st.data())
def test_random_byte_tokens_give_the_characters_of_their_bytes(data: st.DataObject) -> None:
    """The decoder gives up a whole run of byte tokens for one wrong byte; where there is none it is the reference."""
    tokenizer = made("sentence piece")
    byte_tokens = st.sampled_from([3 + byte for byte in "aé€🙂".encode() + b"\xff\xc3"])
    whole_character = st.sampled_from(["é", "€", "🙂"]).map(lambda letter: [3 + byte for byte in letter.encode()])
    others = st.integers(259, 511)
    parts = st.lists(whole_character | st.lists(byte_tokens | others, max_size=3), max_size=12)
    ids = [token for part in data.draw(parts) for token in part]
    whole = _decoded(tokenizer, [300, *ids])
    expected = b"".join(bytes([i - 3]) if i < 259 else tokenizer.convert_ids_to_tokens(i).encode() for i in ids)

    found = _streamed(tokenizer, [300], ids)

    expected_text = expected.decode(errors="replace").replace("▁", " ")
    assert found in (expected_text, expected_text.removesuffix(UNKNOWN))
    if UNKNOWN not in whole:
        assert _decoded(tokenizer, [300]) + found == whole


@pytest.mark.parametrize("name", ["byte level", pytest.param("sentence piece", marks=[pytest.mark.data, has_stories])])
def test_characters_are_shown_when_they_are_whole(name: str) -> None:
    tokenizer = made(name)
    by_byte = {tuple(token_bytes(tokenizer, token)): token for token in reversed(range(len(tokenizer)))}
    tokens = [by_byte[(byte,)] for byte in "€🙂".encode()]

    stream = TextStream(tokenizer, tokenizer.encode("a"))

    assert [stream.feed(token) for token in tokens] == ["", "", "€", "", "", "", "🙂"]


def _tokens_of(tokenizer: Any, content: bytes) -> list[int]:
    """One token per byte."""
    by_byte = {token_bytes(tokenizer, token): token for token in reversed(range(len(tokenizer)))}
    return [by_byte[bytes([byte])] for byte in content]


@pytest.mark.parametrize("name", ["byte level", pytest.param("sentence piece", marks=[pytest.mark.data, has_stories])])
@pytest.mark.parametrize(
    ("content", "pieces", "rest"),
    [
        (b"\xc3(", ["", UNKNOWN + "("], ""),
        (b"\xff\xff\xff", [UNKNOWN, UNKNOWN, UNKNOWN], ""),  # no character begins so: nothing to wait for
        (b"\x80\x80", [UNKNOWN, UNKNOWN], ""),
        (b"\xe2\x82", ["", ""], ""),  # unfinished: left out
        (b"\xc3\xa9\xff!", ["", "é", UNKNOWN, "!"], ""),
        (UNKNOWN.encode(), ["", "", UNKNOWN], ""),  # the model's own
        (b"\xf0\x9f\xf0\x9f\x99\x82", ["", "", UNKNOWN, "", "", "🙂"], ""),
    ],
)
def test_bytes_that_are_no_character_neither_stall_nor_break_the_text(
    name: str, content: bytes, pieces: list[str], rest: str
) -> None:
    tokenizer = made(name)
    stream = TextStream(tokenizer, tokenizer.encode("a"))

    assert [stream.feed(token) for token in _tokens_of(tokenizer, content)] == pieces
    assert stream.finish() == rest


def test_a_character_that_the_prompt_begins_is_finished_by_the_output() -> None:
    tokenizer = made("byte level")
    first, second, third = _tokens_of(tokenizer, "€".encode())

    assert _streamed(tokenizer, [first, second], [third]) == "€"


@pytest.mark.parametrize("name", NAMES)
def test_special_and_unknown_tokens_are_no_text(name: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode("a a", add_special_tokens=False)
    special = tokenizer.all_special_ids
    mixed = [part for token in ids for part in (*special, token, *special)]
    if name != "bytes, slow":  # that one's decode raises for what it does not know
        mixed.append(len(tokenizer) + 1000)

    assert _streamed(tokenizer, [], mixed) == _decoded(tokenizer, ids)
    assert _streamed(tokenizer, [], special) == ""


@cache
def _spaces_joined() -> Any:
    """Byte tokens, and a decoder that looks at the whole text in the end: two spaces become one."""
    vocab = {name: i for i, name in enumerate(["a", " ", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("  ", " ")]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_a_window_shows_whole_characters_and_leaves_out_an_unfinished_one() -> None:
    tokenizer = _spaces_joined()
    stream = TextStream(tokenizer, [0])
    first, second, third = (3 + byte for byte in "€".encode())

    assert pieces_of(tokenizer) is None
    assert [stream.feed(token) for token in (0, first, second, third, 1, 1, 0)] == ["a", "", "", "€", " ", "", "a"]
    assert stream.feed(first) + stream.finish() == ""


def test_a_window_does_not_wait_for_ever() -> None:
    stream = TextStream(_spaces_joined(), [0])

    pieces = [stream.feed(3 + 0xFF) for _ in range(50)]

    assert UNKNOWN in "".join(pieces[:8])
    assert len("".join(pieces) + stream.feed(0)) == 51


def test_special_tokens_do_not_push_the_text_out_of_the_window() -> None:
    tokenizer = made("word ends")
    word = tokenizer.convert_tokens_to_ids("a</w>")

    assert _streamed(tokenizer, [word], [word, *[tokenizer.unk_token_id] * 30, word]) == " a a"


def test_a_slow_tokenizer_does_not_wait_for_ever() -> None:
    stream = TextStream(made("bytes, slow"), [])
    wrong = 0xFF + 3

    pieces = [stream.feed(token) for token in [wrong] * 50 + [ord("a") + 3] * 20]

    assert "a" in "".join(pieces)  # its decode leaves wrong bytes out
    assert len(stream._text._window) < 20


# --- stop strings


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Text letter by letter until one of the stop strings is complete; of several at once the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


LETTERS = st.sampled_from("ab é🙂")


@pytest.mark.parametrize("name", ["byte level", "bytes, slow"])
@light
@given(text=st.text(LETTERS, max_size=40), stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3))
@example(text="aabaabaaab", stops=["aabaaab"])
@example(text="ababab", stops=["abc", "bab"])
def test_a_stop_string_ends_the_text_wherever_tokens_end(name: str, text: str, stops: list[str]) -> None:
    tokenizer = made(name)
    expected, is_stopped = _cut(text, stops)
    stream = TextStream(tokenizer, tokenizer.encode("b", add_special_tokens=False), stops)
    shown = ""

    for token in tokenizer.encode(text, add_special_tokens=False):
        shown += stream.feed(token)
        assert expected.startswith(shown)
    shown += stream.finish()

    assert (shown, stream.stopped) == (expected, is_stopped)


def _feed_words(stop: Sequence[str], words: Sequence[str]) -> tuple[list[str], TextStream]:
    """Each word is one token: " word"."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["x", *words])}, unk_token="x"))
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0], stop)
    return [stream.feed(i) for i in range(1, 1 + len(words))], stream


def test_what_may_become_a_stop_string_is_held_back_and_released_as_soon_as_it_cannot() -> None:
    pieces, stream = _feed_words(["d END"], ["one", "two d", "enough", "d", "EN", "mo d"])

    assert pieces == [" one", " two ", "d enough", " ", "", "d EN mo "]
    assert stream.finish() == "d"
    assert not stream.stopped


def test_what_comes_behind_a_stop_string_is_ignored_and_not_counted() -> None:
    pieces, stream = _feed_words(["wo th", "zzz"], ["one", "two", "three", "four", "zzz"])

    assert pieces == [" one", " t", "", "", ""]
    assert stream.stopped
    assert stream.num_tokens == 3  # with the one that completed the stop string
    assert stream.finish() == ""


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert _feed_words(["abcd", "b"], ["xabcd"])[0] == [" xa"]
    assert _feed_words(["bc", "abc", "c"], ["xabcd"])[0] == [" x"]


def test_without_stop_strings_all_tokens_count() -> None:
    _, stream = _feed_words([], ["one", "two"])

    assert stream.num_tokens == 2
    assert not stream.stopped


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    tokenizer = made("byte level")

    assert _streamed(tokenizer, tokenizer.encode("stop st"), tokenizer.encode("op it"), ["stop"]) == "op it"


# --- one token by itself


@pytest.mark.parametrize("name", ["byte level", pytest.param("sentence piece", marks=[pytest.mark.data, has_stories])])
@light
@given(text=TEXTS)
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(name: str, text: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(text, add_special_tokens=False)

    found = b"".join(token_bytes(tokenizer, token) for token in ids)

    assert found.decode().removeprefix(" " if name == "sentence piece" else "") == text


def test_a_token_by_itself() -> None:
    tokenizer = made("byte level")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    byte = tokenizer.convert_tokens_to_ids("Ã")

    assert token_text(tokenizer, end) == "<|end|>"
    assert token_bytes(tokenizer, byte) == b"\xc3"
    assert token_text(tokenizer, byte) == UNKNOWN
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("日本")) == "日本"
    assert token_text(tokenizer, 10_000) == ""
    assert token_text(made("metaspace"), made("metaspace").convert_tokens_to_ids("▁a")) == " a"


def test_a_token_named_like_a_byte_is_one_only_where_the_decoder_says_so() -> None:
    named = made("byte level").__class__(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<0xF0>": 1, UNKNOWN: 2}, "a"))
    )

    assert [token_text(named, token) for token in (1, 2)] == [" <0xF0>", " " + UNKNOWN]


def test_decoders_for_which_neighbours_matter_are_seen() -> None:
    by_window = {name for name in MAKERS if name != "sentence piece" and pieces_of(made(name)) is None}

    assert by_window == {"word ends", "bytes, slow"}
