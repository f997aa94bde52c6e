"""`python -m adapters_store` and the console script `espalier-store`."""

from adapters_store import import_cli
from adapters_store.cli import app


def main() -> None:
    """Run the command line."""
    assert import_cli.app is app, "our bug: the import command registered elsewhere"
    app(prog_name="espalier-store")


if __name__ == "__main__":
    main()
