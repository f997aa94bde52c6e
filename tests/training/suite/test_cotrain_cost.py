"""The sides of the benchmark of co-training run on a tiny model, on the same layers, and tell what they did."""

from pathlib import Path

import pytest

from tests.bench import cotrain_ours, cotrain_peft, cotrain_sides
from tests.bench.cotrain_cost import over_peft
from training.suite.workbench import Setting, Workbench, prepare


@pytest.fixture(scope="module", params=[0, 1])
def bench(bert_folder: Path, data_folder: Path, request: pytest.FixtureRequest) -> Workbench:
    setting = Setting((data_folder,), 8, test_examples=1, dtype="float32", backbone=str(bert_folder))
    return prepare(Setting(**{**vars(setting), "first_layer": request.param}))


class _Told:
    def __init__(self) -> None:
        self.turns: list[tuple[float, int]] = []

    def wait(self) -> bool:
        return True

    def tell(self, seconds: float, examples: int) -> None:
        self.turns.append((seconds, examples))


@pytest.mark.parametrize("side", cotrain_sides.SIDES)
@pytest.mark.filterwarnings("ignore")  # Trainer's and PEFT's own
def test_a_side_tells_of_every_round(side: str, bench: Workbench) -> None:
    told = _Told()

    cotrain_sides.SIDES[side](bench, "all-linear", 2, told)

    tasks = len(range(0, 3, 2)) if "peft" in side else 3
    assert [examples for _, examples in told.turns] == [8 * tasks] * 2
    assert all(seconds > 0 for seconds, _ in told.turns)


@pytest.mark.parametrize("sites", cotrain_peft.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_peft_trains_the_layers_that_ours_trains(sites: str, bench: Workbench) -> None:
    model = cotrain_peft.classifier(bench, sites, 0)
    ours = cotrain_ours.modules_of(bench, sites).parameters[0]

    trained = {
        name.split("base_model.model.")[1] for name, p in model.named_parameters() if p.requires_grad and "lora" in name
    }
    assert {name.rsplit(".lora", 1)[0] for name in trained} == set(ours)


def test_ratios_are_over_the_faster_of_pefts_ways() -> None:
    lines = [
        {
            "dtype": "float32",
            "first_layer": 0,
            "sites": "all-linear",
            "threads": 1,
            "side": side,
            "examples_per_s": rate,
        }
        for side, rate in (("ours, prior", 6.0), ("peft", 2.0), ("peft, autocast", 3.0))
    ]

    assert over_peft(lines, lines[0]) == 2.0
