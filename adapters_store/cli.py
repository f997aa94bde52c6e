"""The store on the command line: `espalier-store ls`, `show`, `publish`, `alias`, `rollback`, `rm` and so on.

What goes wrong is said in one line on stderr, with exit status 1.
"""

import getpass
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from adapters_store.errors import EspalierError, InvalidNameError
from adapters_store.exchange import read_folder, write_folder
from adapters_store.manifest import Manifest
from adapters_store.references import parse_reference
from adapters_store.store import AdapterStore


class _OneLineErrors(TyperGroup):
    """Says what the three packages raise on purpose, and what the disk refuses, in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EspalierError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Look at, publish, promote and check adapters in a store.\n\n"
    "A store is a folder (--store, or the environment variable ESPALIER_STORE). Published versions never change; "
    "aliases such as 'prod' point at one of them and can be moved and rolled back. "
    "A REF is books (the latest version), books@3, books@prod or books@sha256:<12 or more digits>.",
    epilog="Begin with: espalier-store ls",
)

StorePath = Annotated[Path, typer.Option("--store", envvar="ESPALIER_STORE", help="Folder of the store.")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="books, books@3, books@prod or books@sha256:…")]
DEFAULT_STORE = Path("adapters_store/data")


@app.command()
def ls(store: StorePath = DEFAULT_STORE) -> None:
    """List adapters with their versions and aliases; task, kind and size are those of the latest version."""
    opened = AdapterStore(store)
    table = Table("name", "versions", "aliases", "task", "kind")
    table.add_column("size", justify="right")
    names = opened.names()
    for name in names:
        latest = opened.resolve(name)
        aliases = ", ".join(f"{alias}={version}" for alias, version in opened.aliases(name).items())
        versions = _ranges(opened.versions(name))
        table.add_row(name, versions, aliases, latest.task, escape(latest.kind), _size(latest.size_bytes))
    if names:
        _console().print(table)
    else:
        typer.echo(f"{store} has no adapters; `publish`, `import` and training put some there")


@app.command()
def show(
    reference: Ref,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is stored.")] = False,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Show what a version says about itself."""
    manifest = AdapterStore(store).resolve(reference)
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
        return
    table = Table(show_header=False, box=None)
    for fact, value in _facts(manifest).items():
        table.add_row(fact, escape(value))
    _console().print(table)


@app.command()
def publish(
    folder: Annotated[
        Path, typer.Argument(help="Folder of manifest.json and tensors.safetensors, as `export` writes it.")
    ],
    name: Annotated[str, typer.Option(help="Name to publish under.")],
    task: Annotated[str, typer.Option(help="Task that the adapter answers.")],
    alias: Annotated[str | None, typer.Option(help="Alias to point at the new version.")] = None,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Publish a folder as the next version of a name.

    Whether it fits a backbone is checked by the server that loads it.
    """
    given, adapter = read_folder(folder)
    published = AdapterStore(store).publish(
        adapter, name=name, task=task, kind=given.kind, backbone=given.backbone, hyperparameters=given.hyperparameters,
        metrics=given.metrics, provenance=given.provenance, golden=given.golden,
        generation=given.generation, alias=alias, actor=actor(),
    )  # fmt: skip
    typer.echo(f"published {published.reference} {published.digest}" + (f", {alias} points at it" if alias else ""))


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Adapter.")],
    alias: Annotated[str, typer.Argument(help="Alias, such as prod.")],
    version: Annotated[int, typer.Argument(help="Version to point at.")],
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Point an alias at a version."""
    AdapterStore(store).set_alias(name, alias, version, actor())
    typer.echo(f"{name}@{alias} is now {name}@{version}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Adapter.")],
    alias: Annotated[str, typer.Argument(help="Alias, such as prod.")],
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Point an alias back at the version it pointed at before; again to go further back."""
    record = AdapterStore(store).rollback(name, alias, actor())
    typer.echo(f"{name}@{alias} is now {name}@{record.version}")


@app.command()
def rm(reference: Ref, store: StorePath = DEFAULT_STORE) -> None:
    """Delete one version, given as books@3 or by digest. Its number stays taken; `gc` frees the disk."""
    asked = parse_reference(reference)
    if asked.version is None and asked.digest is None:
        raise InvalidNameError(
            f"{reference!r} may mean another version tomorrow; say which to delete, as {asked.name}@3"
        )
    opened = AdapterStore(store)
    manifest = opened.resolve(asked)
    opened.delete(manifest.name, manifest.version, actor())
    typer.echo(f"deleted {manifest.reference}")


@app.command()
def verify(store: StorePath = DEFAULT_STORE) -> None:
    """Check every manifest, blob, alias and graph; exit status 1 if something is wrong."""
    problems = AdapterStore(store).verify()
    for problem in problems:
        typer.echo(f"{problem.key}: {problem.message}")
    typer.echo(f"{len(problems)} problems" if problems else "everything is as it was published")
    if problems:
        raise typer.Exit(1)


@app.command()
def export(
    reference: Ref,
    folder: Annotated[Path, typer.Argument(help="Folder to write manifest.json and tensors.safetensors into.")],
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Write a version as a folder that `publish` and the server's upload take."""
    opened = AdapterStore(store)
    manifest = opened.resolve(reference)
    write_folder(folder, manifest, opened.load(manifest))
    typer.echo(f"wrote {manifest.reference} to {folder}")


@app.command()
def gc(
    grace_s: Annotated[float, typer.Option(min=0, help="Leave alone what is younger than this, in seconds.")] = 3600,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Remove tensors that no version refers to, and what interrupted writers left behind."""
    removed = AdapterStore(store).gc(grace_s)
    for key in removed:
        typer.echo(f"removed {key}")
    typer.echo(f"{len(removed)} removed")


def _console() -> Console:
    """As wide as the terminal; wide where there is none, so that nothing is cut off in a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def actor() -> str:
    """Who runs the command, for the history of aliases."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return ""


def _facts(manifest: Manifest) -> dict[str, str]:
    primitives = Counter(entry.primitive for entry in manifest.sites)
    head, backbone = manifest.head, manifest.backbone
    return {
        "reference": manifest.reference,
        "digest": manifest.digest,
        "task": manifest.task,
        "kind": manifest.kind,
        "created at": manifest.created_at.isoformat(timespec="seconds"),
        "sites": ", ".join(f"{count} {primitive}" for primitive, count in primitives.items()) or "none",
        "head": f"{head.type}, labels {', '.join(head.labels)}" if head else "none",
        "backbone": f"{backbone.architecture}, {backbone.dtype}, {backbone.weights_digest}",
        "tensors": f"{len(manifest.tensors)}, {_size(manifest.size_bytes)}, {manifest.blob}",
        "golden examples": str(len(manifest.golden)),
        "hyper-parameters": _pairs(manifest.hyperparameters),
        "metrics": _pairs(manifest.metrics),
        "provenance": _pairs(manifest.provenance),
    }


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "none"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as `1-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
