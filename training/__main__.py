"""`python -m training …` and the console script `espalier-train`."""

import os


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # these two are read when the libraries are loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve a shared machine
    from training.cli import app
    from training.memory import keep_freed

    keep_freed()
    app()


if __name__ == "__main__":
    main()
