"""Versions: what is installed against what Headwise asks for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement

from headwise.runtime.doctor.finding import Finding, failed, passed, warned

EXTRAS = ("cuda", "grammar", "gateway", "otel", "plot")
"""What a user may install besides; the others are for Headwise's developers."""

_SHOWN = ("headwise", "torch", "ray", "numba")
_CONSTRAINED = "-c constraints.txt of the checkout has versions that go together"


def installed_version(package: str) -> str | None:
    """None if the package is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_requirements() -> list[str]:
    """What Headwise asks for, Python among it, as its own package says.

    Raises:
        PackageNotFoundError: Headwise is not installed, but only on Python's path.
    """
    python = metadata.metadata("headwise")["Requires-Python"]
    return [f"python{python}", *(metadata.requires("headwise") or ())]


def packages(requirements: Iterable[str], version_of: Callable[[str], str | None] = installed_version) -> list[Finding]:
    """A failure for each package that is missing or out of its bounds, a warning if it belongs to an extra; one line
    if all are well.

    Args:
        requirements: as in a package's metadata, extras with their markers.
    """
    found, well = [], 0
    for requirement in map(Requirement, requirements):
        extra = _extra(requirement)
        if extra is None:
            continue
        name, version = requirement.name, version_of(requirement.name)
        if version is None:
            if not extra:
                found.append(failed(f"package {name}", "is not installed", _install(requirement)))
        elif not requirement.specifier.contains(version, prereleases=True):
            make = failed if not extra else warned
            for_what = f" for the extra {extra}" if extra else ""
            said = f"{version} is installed, and Headwise needs {requirement.specifier}{for_what}"
            found.append(make(f"package {name}", said, _install(requirement)))
        else:
            well += 1
    if found:
        return found
    shown = ", ".join(f"{name} {version}" for name in _SHOWN if (version := version_of(name)) is not None)
    return [passed("packages", f"{well} are within their bounds: {shown}")]


def _extra(requirement: Requirement) -> str | None:
    """The extra that asks for it, "" if every Headwise needs it; None if it is not wanted here."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    return next((extra for extra in EXTRAS if requirement.marker.evaluate({"extra": extra})), None)


def _install(requirement: Requirement) -> str:
    if requirement.name == "python":
        return f"install Python {requirement.specifier}, and Headwise with it"
    return f'pip install "{requirement.name}{requirement.specifier}"; {_CONSTRAINED}'
