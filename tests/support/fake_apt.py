"""A made-up apt with made-up packages: `apt-cache` and `apt-get` as scripts, packages built by the real `dpkg-deb`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = {
    "apt-cache": 'case $1 in pkgnames) cat "$FAKE/names";; show) cat "$FAKE/records";; esac',
    "apt-get": """for last; do :; done
name=${last%%=*}
echo "$name" >> "$FAKE/calls"
if [ -e "$FAKE/slow" ]; then touch half.deb; touch "$FAKE/begun"; sleep 60; fi
if [ -e "$FAKE/fails-$name" ]; then echo "E: no route to the server" >&2; exit 100; fi
cp "$FAKE/store/$name"_*.deb .""",
}


@dataclass(frozen=True, kw_only=True)
class FakeApt:
    """Folders of the made-up apt."""

    tools: Path
    """To put first in PATH."""
    state: Path
    """The value of FAKE; a file `fails-NAME` makes the download of a package fail, a file `slow` makes it hang."""

    @property
    def calls(self) -> list[str]:
        """Packages downloaded so far, in order."""
        path = self.state / "calls"
        return path.read_text().split() if path.exists() else []

    def add(self, name: str, files: dict[str, str], *, version: str = "1.0-1") -> None:
        """Build a package and list it."""
        tree = self.state / "trees" / name
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        control = tree / "DEBIAN" / "control"
        control.parent.mkdir()
        control.write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Me <me@example.org>\n"
            "Description: made up\n"
        )
        deb = self.state / "store" / f"{name}_{version.replace(':', '%3a')}_all.deb"
        deb.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-Znone", "-b", str(tree), str(deb)], check=True, capture_output=True)
        shutil.rmtree(tree)
        data = deb.read_bytes()
        record = (
            f"Package: {name}\nVersion: {version}\nFilename: pool/{deb.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription: made up\n\n"
        )
        self.list(name, record)

    def list(self, name: str, record: str) -> None:
        """Add a package to apt's lists."""
        with (self.state / "names").open("a") as names, (self.state / "records").open("a") as records:
            names.write(f"{name}\n")
            records.write(record)


def make_apt(folder: Path) -> FakeApt:
    """An apt without packages."""
    apt = FakeApt(tools=folder / "tools", state=folder / "state")
    apt.tools.mkdir(parents=True)
    apt.state.mkdir()
    for name in ("names", "records"):
        (apt.state / name).touch()
    for name, script in SCRIPTS.items():
        (apt.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (apt.tools / name).chmod(0o755)
    return apt
