"""Pages: nothing is handed out twice, nothing is lost, and a key finds what was named by it and nothing else."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.generation.pages import PAGE, PagePool, page_keys, pages_for

SALT = b"s" * 32


@given(tokens=st.integers(0, 1000))
def test_pages_hold_their_tokens_and_one_less_would_not(tokens: int) -> None:
    assert (pages_for(tokens) - 1) * PAGE < tokens <= pages_for(tokens) * PAGE or tokens == pages_for(tokens) == 0


@given(ids=st.lists(st.integers(0, 2**31), max_size=80), at=st.integers(0, 79), other=st.integers(0, 2**31))
def test_a_key_tells_all_tokens_up_to_its_page(ids: list[int], at: int, other: int) -> None:
    keys = list(page_keys(SALT, ids))
    changed = [other if i == at else token for i, token in enumerate(ids)]

    assert len(keys) == len(ids) // PAGE
    again = list(page_keys(SALT, changed))
    if changed == ids:
        assert again == keys
    else:
        assert again[: at // PAGE] == keys[: at // PAGE]
        assert not set(again[at // PAGE :]) & set(keys[at // PAGE :])
    assert not set(page_keys(b"t" * 32, ids)) & set(keys)


@given(ids=st.lists(st.integers(0, 99), min_size=PAGE, max_size=80))
def test_keys_go_on_from_any_page(ids: list[int]) -> None:
    keys = list(page_keys(SALT, ids))

    assert [*keys[:1], *page_keys(keys[0], ids[PAGE:])] == keys


@given(st.data())
def test_whatever_is_done_pages_are_held_once_or_shared_and_none_is_lost(data: st.DataObject) -> None:
    pool = PagePool(8)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    names = [bytes([i]) * 32 for i in range(6)]
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "release", "name", "share", "forget"]))
        if action == "take":
            count = data.draw(st.integers(0, 4))
            available = pool.num_available
            behind = data.draw(st.none() | st.integers(0, 7))
            taken = pool.take(count, behind)
            assert (taken is None) == (count > available)
            if taken:
                assert not set(taken) & {page for pages in held for page in pages}
                for page in taken:
                    content.pop(page, None)
                held.append(taken)
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "name" and held:
            page, key = (
                data.draw(st.sampled_from([p for pages in held for p in pages])),
                data.draw(st.sampled_from(names)),
            )
            if key not in content.values() and page not in content:
                content[page] = key
            pool.name(page, key)
        elif action == "share":
            key = data.draw(st.sampled_from(names))
            shared = pool.share([key])
            assert all(content[page] == key for page in shared)
            held += [shared] if shared else []
        elif action == "forget" and held:
            pages = data.draw(st.sampled_from(held))
            pool.forget(pages)
            content = {page: key for page, key in content.items() if page not in pages}
        used = Counter(page for pages in held for page in pages)
        assert pool.num_held == len(used)
        assert pool.num_known == len(content)
    for pages in held:
        pool.release(pages)
    assert pool.num_held == 0


@given(prompts=st.lists(st.integers(1, 8), min_size=1, max_size=8), grown=st.integers(0, 6))
def test_sequences_that_grow_side_by_side_keep_their_pages_together(prompts: list[int], grown: int) -> None:
    pool = PagePool(256)  # room for twice as much
    held = [pool.take(count) or [] for count in prompts]
    for _ in range(grown):
        for pages in held:
            pages += pool.take(1, pages[-1]) or []

    for pages, count in zip(held, prompts, strict=True):
        assert pages == list(range(pages[0], pages[0] + count + grown))


def test_pages_come_one_by_one_where_no_two_are_together() -> None:
    pool = PagePool(8)
    pages = pool.take(8) or []
    pool.release([page for page in pages if page % 2])

    assert sorted(pool.take(4, 0) or []) == [1, 3, 5, 7]


def test_the_least_recently_used_content_is_forgotten_first() -> None:
    pool = PagePool(3)
    first, second = pool.take(1), pool.take(1)
    assert first is not None
    assert second is not None
    pool.name(first[0], b"first")
    pool.name(second[0], b"second")
    pool.release(first)
    pool.release(second)
    pool.release(pool.share([b"first"]))

    pool.take(2)

    assert pool.share([b"second"]) == []
    assert pool.share([b"first"]) == first


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    assert pages
    pool.name(pages[0], b"a")
    pool.name(pages[1], b"b")
    pool.release(pages)

    pool.take(1)

    assert pool.share([b"a", b"b"]) == pages[:1]
