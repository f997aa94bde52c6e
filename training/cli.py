"""The command line of training: fit -> publish -> relate -> score; compose, cotrain; the demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from training.commands import command
from training.composing.settings import ComposeConfig, CotrainConfig
from training.config import DemoConfig, FitConfig, PublishConfig, RelateConfig, ScoreConfig, StylesConfig, resolve
from training.suite.settings import EvaluateConfig, ReportConfig

app = typer.Typer(
    name="espalier-train",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="Train task adapters on one frozen backbone, find out how they help each other, and publish them.\n\n"
    "The usual way: fit, then publish, relate, score; or fit, then compose; or cotrain alone. Every command takes its "
    "settings from flags, from a file (--config), or both.",
)

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped; without --run the newest unfinished one.")
]
Jobs = Annotated[bool, typer.Option("--dry-run", help="List cells and jobs; nothing is run or written.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="One batch through everything, nothing is written.")]


def _fit_settings(file: Path | None, flags: dict[str, Any], switches: dict[str, bool]) -> FitConfig:
    if not switches["resume"]:
        return resolve(FitConfig, file, flags)
    from training.resume import settings

    return settings(file, flags)


@command(app, FitConfig, _fit_settings, resume=Resume, dry_run=DryRun)
def fit(config: FitConfig, *, resume: bool, dry_run: bool) -> None:
    """Train one adapter per task, into a run folder.

    All tasks train together in mixed batches, through the very sites that serve, with the result of training alone.
    Tasks whose lines are {"prompt", "completion"} learn to generate: the loss is on the completion and the end of text
    behind it, and --backbone must be a decoder.
    Ctrl-C finishes the step, writes a checkpoint and says how to go on; the result is the same as without the stop.

    Example:  espalier-train fit --data training/demo_data --run first --set r=8 --epochs 5
    """
    from training import fit as training_fit

    if dry_run:
        training_fit.dry_run(config)
    else:
        training_fit.fit(config, resume=resume)


@command(app, PublishConfig)
def publish(config: PublishConfig) -> None:
    """Put a run's adapters into an adapter store.

    Each becomes a new version of its task's name, and an alias (prod) points at it.

    Example:  espalier-train publish --run runs/first --store adapters_store/data --alias prod
    """
    from training import publish as training_publish

    training_publish.publish(config)


@command(app, RelateConfig)
def relate(config: RelateConfig) -> None:
    """Estimate how adapters help each other: the graph.

    The relations become a version of the store's relation graph, by which the server composes adapters.
    Also writes relations.json and relations.png (a heat map) into the run's folder.

    Example:  espalier-train relate --run runs/first --store adapters_store/data --set c=0.5
    """
    from training import relate as training_relate

    training_relate.relate(config)


@command(app, ComposeConfig)
def compose(config: ComposeConfig) -> None:
    """Compose a run's adapters and publish the whole.

    In place of publish and relate, for tasks that classify: estimates how the tasks of a finished run of fit relate,
    composes their adapters by it, refits every head on its train texts under that composition, and publishes versions
    with these heads and the graph that composes exactly so. The head suits the composition: ask in mode prior.

    Example:  espalier-train compose --run runs/first --store adapters_store/data --set c=0.95
    """
    from training.composing import apart

    apart.compose(config)


@command(app, CotrainConfig)
def cotrain(config: CotrainConfig) -> None:
    """Train adapters, their graph and heads together.

    In place of fit, publish and relate, for tasks that classify: what related tasks learn, they share, as widely as
    the graph says, and the graph learns along. --set is for the kind of adapter, as in fit, --knob for the prior,
    --loss for what is added to the tasks' losses. Nothing is written before training is done.

    Example:  espalier-train cotrain --data training/demo_data --run together --set r=8 --knob c=0.9 --loss relation=0
    """
    from training.composing import together

    together.cotrain(config)


@command(app, ScoreConfig)
def score(config: ScoreConfig) -> None:
    """Scores of published adapters per task on the test texts.

    Accuracy, or loss and accuracy per token of the completions for tasks that generate:
    of the bare backbone, of each task's own adapter, and of adapters composed by the graph.
    JSON lines go to stdout (and to --out), a table to stderr.

    Example:  espalier-train score --data training/demo_data --store adapters_store/data --modes single,prior
    """
    from training import score as training_score

    training_score.score(config)


@command(app, EvaluateConfig, dry_run=Jobs)
def evaluate(config: EvaluateConfig, *, dry_run: bool) -> None:
    """Compare ways to compose adapters on a suite of tasks.

    Every method, for every number of training examples and seed; adapters are trained here and no store is needed.
    Ctrl-C stops, the same command goes on; what failed is tried again. At the end a report is written.

    Example:  espalier-train evaluate --data training/demo_data --seeds 0,1 --examples 30 --out runs/evaluate/demo
    """
    from training.suite import runner

    if dry_run:
        runner.dry_run(config)
    else:
        runner.evaluate_and_report(config)


@command(app, ReportConfig)
def report(config: ReportConfig) -> None:
    """Tables and pictures of what evaluate found.

    Joins the results of several folders; says which seeds are missing and how sure differences are.

    Example:  espalier-train report --results runs/evaluate/demo --out runs/evaluate/demo/report
    """
    from training.suite import report as training_report

    training_report.report(config)


@command(app, DemoConfig)
def demo(config: DemoConfig) -> None:
    """Train, publish and relate the demo's tasks.

    Eleven small tasks in four families; what the store has already is not made again.

    Example:  espalier-train demo --store adapters_store/data
    """
    from training import demo as training_demo

    training_demo.demo(config)


@command(app, StylesConfig)
def styles(config: StylesConfig) -> None:
    """Write three small tasks that generate.

    Endings of children's stories, one style each: cheerful, spooky and chatty. They suit small decoders.

    Example:  espalier-train styles --out my-styles
    """
    from training import styles as training_styles

    training_styles.styles(config)
