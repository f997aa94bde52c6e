"""`espalier-store import`: a LoRA as PEFT saved it becomes a published version."""

from pathlib import Path
from typing import Annotated

import typer

from adapters_store import adapter as adapters
from adapters_store import backbones, peft_format, skeleton
from adapters_store.cli import DEFAULT_STORE, StorePath, actor, app
from adapters_store.store import AdapterStore


@app.command("import")
def import_peft(
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str, typer.Option(help="Name to publish it under.")],
    task: Annotated[str | None, typer.Option(help="Task it answers; its name if not given.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to point at it, for example prod.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Hub id or folder of its backbone; default all-MiniLM-L6-v2.")
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Largest rank to accept.")] = 256,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Publish a LoRA that PEFT saved, checked against its backbone; PEFT itself is not needed.

    A head.json with labels (and head.safetensors, unless PEFT saved the head with modules_to_save) makes it a
    classifier. Example: espalier-store import ./my-lora --name reviews --alias prod
    """
    place = backbones.locate(backbone)
    sites = skeleton.sites_of(place)
    found = peft_format.read_folder(folder, sites)
    adapters.check(found.adapter, sites, max_rank=max_rank)
    manifest = AdapterStore(store).publish(
        found.adapter, name=name, task=task or name, kind="lora", backbone=backbones.fingerprint(place, "float32"),
        hyperparameters=found.hyperparameters, provenance={"format": "peft", "base_model": found.base_model},
        alias=alias, actor=actor(),
    )  # fmt: skip
    typer.echo(f"published {manifest.reference} ({len(manifest.sites)} sites, {manifest.digest[:19]}…)")
