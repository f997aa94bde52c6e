"""publish: a finished run's adapters become versions in a store."""

from adapters_store.adapter import Adapter
from adapters_store.manifest import Manifest
from adapters_store.store import AdapterStore
from training import export
from training.config import PublishConfig
from training.errors import RunError
from training.progress import bar, say
from training.run import Run


def publish(config: PublishConfig) -> list[str]:
    """Publish the run's adapters; references of the new versions. Raises RunError for an unfinished run."""
    run = Run(config.run)
    trained = sorted(run.summary()["tasks"])
    unknown = sorted(set(config.tasks) - set(trained))
    if unknown:
        raise RunError(f"{config.run} has no task {unknown[0]!r}; it has: {', '.join(trained)}")
    store = AdapterStore(config.store)
    names = [name for name in trained if not config.tasks or name in config.tasks]
    with bar(len(names), "publishing") as shown:
        references = []
        for name in names:
            references.append(_publish(store, run, name, config))
            shown.advance(note=references[-1])
    say(f"published into {config.store}: {', '.join(references)}" + (f" as @{config.alias}" if config.alias else ""))
    return references


def _publish(store: AdapterStore, run: Run, name: str, config: PublishConfig) -> str:
    manifest, adapter = export.read(run.adapters / name)
    return as_version(store, manifest, adapter, config.actor, config.alias).reference


def as_version(
    store: AdapterStore, manifest: Manifest, adapter: Adapter, actor: str, alias: str | None = None
) -> Manifest:
    """Publish an adapter with what its manifest says of it; the manifest that the store gives it."""
    return store.publish(
        adapter,
        name=manifest.name,
        task=manifest.task,
        kind=manifest.kind,
        backbone=manifest.backbone,
        hyperparameters=manifest.hyperparameters,
        metrics=manifest.metrics,
        provenance=manifest.provenance,
        golden=manifest.golden,
        generation=manifest.generation,
        alias=alias,
        actor=actor,
    )
