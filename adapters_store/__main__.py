"""`python -m adapters_store` and the console script `espalier-store`."""

from adapters_store import import_cli  # noqa: F401  # adds its command to the app
from adapters_store.cli import app


def main() -> None:
    """Run the command line."""
    app(prog_name="espalier-store")


if __name__ == "__main__":
    main()
