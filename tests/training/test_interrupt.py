"""Ctrl-C and SIGTERM in a real process: a checkpoint, a line that says how to go on, and 130 or 143."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training.config import FitConfig
from training.fit import fit
from training.run import Run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_resumes_to_the_same_bytes(
    fit_config: Callable[..., FitConfig], tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    config = fit_config(epochs=30, tasks=("books",))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "training", "fit", "--config", str(file)]

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("training:"):  # the first tenth is done
                process.send_signal(signum)
                break
        said = process.stderr.read()

    assert process.returncode == status
    assert f"go on with: espalier-train fit --resume --runs {config.runs} --run one" in said
    assert "Traceback" not in said
    run = Run(config.runs / "one")
    assert not run.is_finished
    resumed = fit(config, resume=True)
    whole = fit(config.model_copy(update={"run": "whole"}))
    blob = Path("adapters/books/tensors.safetensors")
    assert (resumed.folder / blob).read_bytes() == (whole.folder / blob).read_bytes()
