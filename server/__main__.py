"""`python -m server …` and the console script `espalier-serve`."""

import os


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # these two are read when the libraries are loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve the event loop
    from server.serve import serve

    serve()


if __name__ == "__main__":
    main()
