"""The installed version of lorasmith."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str | None:
    """The version of the installed package, or None if lorasmith runs from its source folder."""
    try:
        return version("lorasmith")
    except PackageNotFoundError:
        return None
