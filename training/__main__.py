"""`python -m training …` and the console script `espalier-train`."""

import os


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # said before the tokenizers library is loaded
    from training.cli import app

    app()


if __name__ == "__main__":
    main()
