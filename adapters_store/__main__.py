"""`python -m adapters_store`, also installed as `espalier-store`."""

from adapters_store.cli import app


def main() -> None:
    """Run the command line."""
    app(prog_name="espalier-store")


if __name__ == "__main__":
    main()
