"""The versions of installed packages; that of this one stands in `pyproject.toml` alone."""

from importlib.metadata import PackageNotFoundError, version

NAME = "flow-generator-matching"


def version_of(package: str) -> str:
    """Version of a package; this package can also run from its checkout, not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
