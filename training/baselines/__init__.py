"""Baselines of a suite: what an expert will ask to see beside a composition by the graph.

All get the same node adapters and the same N examples per task (suite/methods.py); the joint ones train their own under
the same budget. A file per baseline, `run(bench, nodes, recipe)` in each. `accuracy` is by the heads as published,
`Result.facts["accuracy_refitted"]` by heads refitted on the training texts under the same composition.
"""

from training.baselines import (
    adapterfusion,
    adaptersoup,
    arrow,
    dare,
    head_only,
    lorahub,
    model_soup,
    nearest,
    phatgoose,
    poly,
    shared,
    shared_tied,
    single,
    task_arithmetic,
    ties,
    uniform,
    uniform_joint,
    xlora,
)
from training.suite.methods import Method

_ALL = (
    Method("head_only", "pluggable", head_only.run, "Alain & Bengio 2016, linear probe"),
    Method("single", "pluggable", single.run, "Hu et al. 2021, LoRA"),
    Method("uniform", "pluggable", uniform.run, "Wortsman et al. 2022, uniform soup"),
    Method("model_soup", "pluggable", model_soup.run, "Wortsman et al. 2022, greedy soup"),
    Method("task_arithmetic", "pluggable", task_arithmetic.run, "Ilharco et al. 2023"),
    Method("nearest", "pluggable", nearest.run, "Chronopoulou et al. 2023, l = 1"),
    Method("adaptersoup", "pluggable", adaptersoup.run, "Chronopoulou et al. 2023"),
    Method("ties", "pluggable", ties.run, "Yadav et al. 2023"),
    Method("dare", "pluggable", dare.run, "Yu et al. 2024"),
    Method("lorahub", "pluggable", lorahub.run, "Huang et al. 2024"),
    Method("arrow", "pluggable", arrow.run, "Ostapenko et al. 2024"),
    Method("phatgoose", "pluggable", phatgoose.run, "Muqeeth et al. 2024"),
    Method("xlora", "pluggable", xlora.run, "Buehler & Buehler 2024"),
    Method("adapterfusion", "pluggable", adapterfusion.run, "Pfeiffer et al. 2021"),
    Method("shared", "joint", shared.run, "Caruana 1997, hard parameter sharing"),
    Method("shared_tied", "joint", shared_tied.run, "Caruana 1997, one model for all labels of a name"),
    Method("uniform_joint", "joint", uniform_joint.run, "uniform weights, trained together"),
    Method("poly", "joint", poly.run, "Ponti et al. 2023; Caccia et al. 2023"),
)
BASELINES: dict[str, Method] = {method.name: method for method in _ALL}
