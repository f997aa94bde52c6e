"""demo: the tasks of demo_data, trained, published and related into a store, unless they are there already."""

import shutil
from pathlib import Path

from training.config import DemoConfig, FitConfig, PublishConfig, RelateConfig
from training.errors import RunError
from training.progress import say

DATA = Path(__file__).parent / "demo_data"
RUN = "demo"


def demo(config: DemoConfig) -> bool:
    """Fill the store with the demo's adapters and graph; False if there was nothing to do."""
    tasks = sorted(path.parent.name for path in DATA.glob("*/train.jsonl"))
    _check_backbone(config, tasks)
    missing = _missing(config.store, tasks)
    if not missing:
        say(f"{config.store} holds the demo's {len(tasks)} adapters and their relation graph already: nothing to do")
        return False
    say(f"{config.store} lacks {', '.join(missing)}: training the demo's {len(tasks)} tasks, a few minutes")
    _train(config, tasks)
    return True


def _missing(store: Path, tasks: list[str]) -> list[str]:
    """What the store does not have yet. Looks at the store only; the model libraries stay unloaded."""
    from adapters_store.store import AdapterStore

    opened = AdapterStore(store)
    known = set(opened.names())
    return [task for task in tasks if task not in known] + ([] if opened.graph_versions() else ["the relation graph"])


def _check_backbone(config: DemoConfig, tasks: list[str]) -> None:
    """Refuse a store whose demo was trained on another backbone. Raises BackboneMismatchError."""
    from adapters_store import backbones
    from adapters_store.errors import BackboneMismatchError
    from adapters_store.store import AdapterStore

    opened = AdapterStore(config.store)
    mine = backbones.fingerprint(backbones.locate(config.backbone), config.dtype)
    for task in sorted(set(tasks) & set(opened.names())):
        theirs = opened.resolve(task).backbone
        if not mine.is_same(theirs):
            raise BackboneMismatchError(
                f"{config.store} holds {task!r} trained on another {theirs.architecture}; "
                "give the demo on this backbone a store of its own: --store (make demo STORE=…)"
            )


def _train(config: DemoConfig, tasks: list[str]) -> None:
    from training.fit import fit
    from training.publish import publish
    from training.relate import relate
    from training.run import Run

    machine = config.model_dump(include={"device", "dtype", "threads", "token_budget"})
    wanted = FitConfig(
        data=DATA, runs=config.runs, run=RUN, tasks=tuple(tasks), backbone=config.backbone, seed=config.seed, **machine
    )
    run = Run(config.runs / RUN)
    if run.exists and run.config().data.resolve() != DATA.resolve():
        raise RunError(f"{run.folder} is a run of other data, {run.config().data}; rename it, or give --runs")
    if run.exists and (run.is_finished or run.config() != wanted):
        shutil.rmtree(run.folder)  # a demo's run is the demo's to replace; the store keeps what was published
    fit(wanted, resume=run.exists)
    publish(PublishConfig(run=run.folder, store=config.store, actor="espalier-train demo"))
    relate(RelateConfig(run=run.folder, store=config.store, **machine))
