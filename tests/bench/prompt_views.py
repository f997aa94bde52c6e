"""Views of trained soft prompts, by the functions that relate adapters where those fit, and their measured transfer."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.relations import Matrix, arrow, cka, embedding, subspace

RANK = 8  # of the subspace of a prompt: the rank that adapters have by default


def read(folder: Path, backbone: str, tasks: list[str]) -> Matrix:
    """(K, K) measured transfer: row target, column source; NaN where it was not measured."""
    with (folder / f"{backbone}.csv").open() as file:
        found = {(row["target_dataset"], row["source_prompt"]): row["metric_value"] for row in csv.DictReader(file)}
    return np.array([[float(found.get((i, j), "nan")) for j in tasks] for i in tasks])


def prompts_of(folder: Path) -> dict[str, Matrix]:
    """Task -> (100, d) the trained prompt for t5-base."""
    with np.load(folder / "prompts_t5-base.npz") as archive:
        return {task: archive[task].astype(np.float64) for task in archive.files}


def views_of(prompts: list[Matrix]) -> dict[str, Matrix]:
    """(K, K) by name, from the prompts alone."""
    flat = np.stack([prompt.ravel() for prompt in prompts])
    bases = [subspace.basis(prompt, RANK) for prompt in prompts]
    norms = np.log([np.linalg.norm(prompt) for prompt in prompts])
    return {
        "flat cosine": embedding.cosine(flat),
        "flat cosine, centred": embedding.cosine(flat - flat.mean(axis=0)),
        "mean token": embedding.cosine(np.stack([prompt.mean(axis=0) for prompt in prompts])),
        "mean token, centred": embedding.similarity(prompts),
        "matched tokens": _pairwise(prompts, _matched),
        "subspace": _pairwise(bases, subspace.overlap),
        "arrow": _pairwise([basis[:, 0] for basis in bases], arrow.alignment),
        "cka of tokens": cka.similarity(prompts),
        "cka of dimensions": cka.similarity([prompt.T for prompt in prompts]),
        "norm": -np.abs(norms[:, None] - norms[None, :]),
    }


def _pairwise(things: list[Matrix], compare: Callable[[Matrix, Matrix], float]) -> Matrix:
    return np.array([[compare(a, b) for b in things] for a in things])


def _matched(a: Matrix, b: Matrix) -> float:
    """Mean cosine of each token with its nearest one of the other prompt, in both directions."""
    cosines = embedding.cosine(np.concatenate([a, b]))[: len(a), len(a) :]
    return float(cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2
