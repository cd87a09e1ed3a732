"""``python -m tests.wheel WHEEL FOLDER``: an environment in FOLDER with the wheel and what it declares to need, and no more.

What it needs is taken from the environment that this runs in, as links: nothing is downloaded, and a library that the wheel
uses and does not declare is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement


def declared(wheel: Path) -> list[str]:
    """Return the requirements of the wheel, without those of its extras."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    return re.findall(r"^Requires-Dist: (.*)$", text, flags=re.MULTILINE)


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that ``requirements`` come to."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        distribution = metadata.distribution(name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), f"{text}: {distribution.version}"
        seen = name in found
        found[name] = distribution
        for more in ["", *requirement.extras] if not seen else requirement.extras:
            waiting += [(needed, more) for needed in distribution.requires or []]
    return found


def main() -> None:
    """Make the environment."""
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    for distribution in closure(declared(wheel)).values():
        for top in {file.parts[0] for file in distribution.files or [] if not file.parts[0].startswith((".", "__"))}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )


if __name__ == "__main__":
    assert sysconfig.get_path("purelib") != sysconfig.get_path("stdlib")
    main()
