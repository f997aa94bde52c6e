"""Several writers at one store, and writers that die: versions stay gapless, nothing is ever half there."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFoundError, ConflictError
from adapters_store.objects import LocalObjects
from adapters_store.store import AdapterStore
from tests.adapters_store.small import GRAPH, assert_same, publish, small_adapter

PER_WRITER = 5
WIDE = 20_000  # half a megabyte: large enough to be killed in the middle of writing it


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start in milliseconds, from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.adapters_store.small"])
    return context


class Watched(LocalObjects):
    """Calls back just before or after an object is created or deleted: other writers at the worst moment."""

    def __init__(self, root: Path, act: Callable[[str, str], None]) -> None:
        super().__init__(root)
        self.act = act

    def create(self, key: str, data: bytes) -> None:
        self.act("before create", key)
        super().create(key, data)
        self.act("after create", key)

    def delete(self, key: str) -> None:
        self.act("before delete", key)
        super().delete(key)
        self.act("after delete", key)


def at(moment: str, folder: str, act: Callable[[], object]) -> Callable[[str, str], None]:
    """Act once, at the first such moment in this folder."""
    acts = [act]

    def callback(now: str, key: str) -> None:
        if (now, key.startswith(folder)) == (moment, True) and acts:
            acts.pop()()

    return callback


def publish_some(root: Path, writer: int) -> list[int]:
    store = AdapterStore(root)
    return [publish(store, seed=PER_WRITER * writer + i, alias="prod").version for i in range(PER_WRITER)]


def publish_and_report(root: Path, writer: int, reports: Connection) -> None:
    reports.send(publish_some(root, writer))


def publish_until_killed(root: Path, reports: Connection) -> None:
    """Publish, promote, roll back, delete and collect; report each version promised and each object begun."""
    store = AdapterStore(root, objects=Watched(root, lambda now, key: reports.send((now, key))))
    while True:
        version = publish(store, seed=len(store.versions("books")), width=WIDE, alias="prod").version
        reports.send(("promised", version))
        store.publish_graph(GRAPH, alias="prod")
        if version % 3 == 0:
            store.rollback("books", "prod")
            store.delete("books", version)
            store.gc(grace_s=0)


def promised_until(receive: Connection, begun: int) -> int:
    """The last version promised by the time that so many objects were begun after the first promise."""
    version = 0
    while begun:
        moment, what = receive.recv()
        version = what if moment == "promised" else version
        begun -= moment == "before create" and version > 0
    return version


def assert_gapless_and_whole(root: Path, versions: list[int]) -> None:
    store = AdapterStore(root)
    assert sorted(versions) == list(range(1, len(versions) + 1)) == store.versions("books")
    assert store.verify() == []
    assert not list(root.rglob(".tmp-*"))
    history = store.alias_history("books", "prod")
    assert sorted(record.version for record in history) == sorted(versions)


def test_threads_publishing_one_name_get_gapless_versions(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda writer: publish_some(tmp_path, writer), range(8)))

    assert_gapless_and_whole(tmp_path, [version for some in versions for version in some])


def test_threads_may_share_one_store_object(tmp_path):
    store = AdapterStore(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda seed: publish(store, seed=seed), range(24)))

    assert sorted(manifest.version for manifest in published) == list(range(1, 25))
    for seed, manifest in enumerate(published):
        assert_same(store.load(store.resolve(manifest.reference)), small_adapter(seed))


def test_processes_publishing_one_name_get_gapless_versions(tmp_path, processes):
    ends = [processes.Pipe(duplex=False) for _ in range(4)]
    writers = [
        processes.Process(target=publish_and_report, args=(tmp_path, i, send)) for i, (_, send) in enumerate(ends)
    ]
    for writer in writers:
        writer.start()
    versions = [version for receive, _ in ends for version in receive.recv()]
    for writer in writers:
        writer.join()

    assert [writer.exitcode for writer in writers] == [0] * 4
    assert_gapless_and_whole(tmp_path, versions)


def test_a_killed_writer_leaves_the_old_state_or_the_new(tmp_path, processes):
    promised = [0]
    for begun in range(1, 9):  # so each kind of object is once the one that is being written
        receive, send = processes.Pipe(duplex=False)
        writer = processes.Process(target=publish_until_killed, args=(tmp_path, send))
        writer.start()
        send.close()
        promised.append(promised_until(receive, begun))
        writer.kill()
        writer.join()

        assert writer.exitcode == -signal.SIGKILL
        store = AdapterStore(tmp_path)
        assert store.verify() == []
        deleted = [int(key[-13:-5]) for key in store.objects.list("tombstones")]
        numbers = sorted({*store.versions("books"), *deleted})
        assert numbers == list(range(1, len(numbers) + 1))
        assert promised[-1] in numbers
        assert len(numbers) - promised[-1] <= 20

    assert promised == sorted(promised)
    assert_same(store.load(store.resolve("books@1")), small_adapter(0, WIDE))
    store.gc(grace_s=0)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert {key[-64:] for key in store.objects.list("blobs")} == {
        store.resolve(f"books@{version}").blob[7:] for version in store.versions("books")
    }


class CrashError(Exception):
    pass


@pytest.mark.parametrize("moment", ["before create", "after create"])
@pytest.mark.parametrize("folder", ["blobs", "adapters/books/versions", "adapters/books/aliases"])
def test_a_crash_at_any_step_of_publishing_is_the_old_state_or_the_new(tmp_path, moment, folder):
    publish(AdapterStore(tmp_path), alias="prod")

    def crash() -> None:
        raise CrashError

    with pytest.raises(CrashError):
        publish(AdapterStore(tmp_path, objects=Watched(tmp_path, at(moment, folder, crash))), seed=1, alias="prod")

    store = AdapterStore(tmp_path)
    assert store.verify() == []
    is_new = folder != "blobs" and (moment, folder) != ("before create", "adapters/books/versions")
    assert store.versions("books") == ([1, 2] if is_new else [1])
    assert store.aliases("books")["prod"] == (
        2 if (moment, folder) == ("after create", "adapters/books/aliases") else 1
    )
    assert publish(store, seed=1, alias="prod").version == store.versions("books")[-1]


@pytest.mark.parametrize("moment", ["before create", "after create"])
def test_gc_while_publishing_does_not_take_the_new_versions_blob(tmp_path, moment):
    act = at(moment, "adapters/books/versions", lambda: AdapterStore(tmp_path).gc(grace_s=-60))

    manifest = publish(AdapterStore(tmp_path, objects=Watched(tmp_path, act)))

    store = AdapterStore(tmp_path)
    assert store.verify() == []
    assert_same(store.load(manifest), small_adapter())


@pytest.mark.parametrize("moment", ["before delete", "after delete"])
def test_publishing_while_gc_removes_the_very_blob_keeps_it(tmp_path, moment):
    store = AdapterStore(tmp_path)
    publish(store)
    store.delete("books", 1)
    act = at(moment, "blobs", lambda: publish(AdapterStore(tmp_path)))

    removed = AdapterStore(tmp_path, objects=Watched(tmp_path, act)).gc(grace_s=-60)

    assert removed == []
    assert store.verify() == []
    assert_same(store.load(store.resolve("books@2")), small_adapter())


def test_an_alias_that_moves_to_a_version_being_deleted_wins_or_stays(tmp_path):
    store = AdapterStore(tmp_path)
    publish(store, alias="prod")
    publish(store, seed=1)

    act = at("before create", "tombstones", lambda: store.set_alias("books", "prod", 2))
    with pytest.raises(ConflictError, match="books@2 is what prod points at"):
        AdapterStore(tmp_path, objects=Watched(tmp_path, act)).delete("books", 2)
    assert (store.versions("books"), store.aliases("books")) == ([1, 2], {"prod": 2})

    store.set_alias("books", "prod", 1)
    act = at("before create", "adapters/books/aliases", lambda: store.delete("books", 2))
    with pytest.raises(ConflictError, match="books@2 was deleted while 'prod' moved to it"):
        AdapterStore(tmp_path, objects=Watched(tmp_path, act)).set_alias("books", "prod", 2)
    assert (store.versions("books"), store.aliases("books")) == ([1], {"prod": 1})
    assert store.verify() == []


def test_of_two_rollbacks_at_once_one_is_refused(tmp_path):
    store = AdapterStore(tmp_path)
    for seed in range(3):
        publish(store, seed=seed, alias="prod")

    act = at("before create", "adapters/books/aliases", lambda: store.rollback("books", "prod"))
    with pytest.raises(ConflictError, match="somebody else moved alias 'prod' just now"):
        AdapterStore(tmp_path, objects=Watched(tmp_path, act)).rollback("books", "prod")

    assert store.aliases("books") == {"prod": 2}


def test_of_many_graphs_that_replace_the_same_one_exactly_one_is_published(tmp_path):
    def replace(_: int) -> int | None:
        try:
            return AdapterStore(tmp_path).publish_graph(GRAPH, expected_version=0)
        except ConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(replace, range(16)))

    assert sorted(results, key=str) == [1, *[None] * 15]
    assert AdapterStore(tmp_path).graph_versions() == [1]


def test_an_alias_always_resolves_while_it_is_moved(tmp_path):
    store = AdapterStore(tmp_path)
    publish(store, alias="prod")
    publish(store, seed=1)

    def move(step: int) -> int:
        if step % 2:
            return store.set_alias("books", "prod", 1 + step // 2 % 2).version
        return AdapterStore(tmp_path).resolve("books@prod").version

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(move, range(120))) <= {1, 2}
    with pytest.raises(AdapterNotFoundError):
        store.resolve("books@canary")
