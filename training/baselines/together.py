"""What the joint baselines share: modules and heads trained at once, then answered with.

A bench's modules start from different values (suite/modules.py): alike they would stay one module under equal weights.
"""

from collections.abc import Callable

from torch import Tensor

from training.baselines.answering import NOTHING_MORE, answered, under
from training.suite.heads import Heads
from training.suite.joint import Extra, Recipe, train
from training.suite.methods import Nodes, Result
from training.suite.modules import Modules, mixes
from training.suite.workbench import Workbench


def trained_together(
    bench: Workbench, count: int, weigh: Callable[[], Tensor], recipe: Recipe, extra: Extra = NOTHING_MORE,
    ties: Tensor | None = None,
) -> Result:  # fmt: skip
    """Modules and heads trained under weights that may be learned, then answered under the weights as they ended.

    ties: (T, T) how much heads share where tasks have the same labels; None: nothing.
    """
    modules = Modules(bench.tail, count, bench.setting.seed)
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed, ties)
    history = train(bench, modules, heads, lambda _: mixes(weigh()), recipe, extra)
    weights, frozen = weigh().detach(), heads.frozen()
    pool = under(bench, Nodes(modules.adapters(), frozen), weights)
    return answered(bench, frozen, pool, weights, {"losses": [round(loss, 5) for loss in history.losses]})
