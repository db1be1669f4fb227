"""Which lorasmith this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str | None:
    """The version that pip knows; None where lorasmith runs from its folder without being installed."""
    try:
        return version("lorasmith")
    except PackageNotFoundError:
        return None
