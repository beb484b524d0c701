"""Find, download and unpack Debian packages with the machine's own apt and its configured sources.

Nothing is installed. Only `download` uses the network. `download` needs no root, and never downloads a package that is
in its folder.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

TOOLS = ("apt-cache", "apt-get", "dpkg-deb")
_FIELDS = re.compile(r"^(Package|Version|Size|SHA256|Filename): (\S+)", re.M)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that apt can download."""

    name: str
    version: str
    size: int
    """Bytes to download."""
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def check_tools() -> None:
    """Check for the programs that this module runs.

    Raises:
        ValueError: one is missing.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"Debian's or Ubuntu's {', '.join(TOOLS)} are required; this machine lacks {', '.join(missing)}"
        )


def find_packages(patterns: Iterable[str]) -> dict[str, Package]:
    """Pattern -> the package whose whole name matches, with the highest numbers in its name.

    Patterns without a package are left out. Only apt's local lists are read.

    Raises:
        ValueError: apt-cache failed.
    """
    names = _run("apt-cache", "pkgnames").split()
    matching = {pattern: [name for name in names if re.fullmatch(pattern, name)] for pattern in dict.fromkeys(patterns)}
    wanted = sorted({name for found in matching.values() for name in found})
    known = _show(wanted) if wanted else {}
    found = {}
    for pattern, some in matching.items():
        available = [name for name in some if name in known]
        if available:
            found[pattern] = known[max(available, key=_numbers)]
    return found


def missing_packages(packages: Iterable[Package], folder: Path) -> list[Package]:
    """The packages that `download` would download."""
    return [package for package in packages if _downloaded(package, folder) is None]


def download(packages: Sequence[Package], folder: Path) -> None:
    """Download the packages that `folder` lacks, each whole and with the right hash or not at all.

    Raises:
        ValueError: a package cannot be downloaded, or has another content than apt's lists say.
    """
    missing = missing_packages(packages, folder)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(package.size for package in missing)
    # an unfinished file of an earlier call is removed with its folder
    with (
        tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch,
        tqdm(total=total, desc="downloading", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for package in missing:
            # as root, apt would switch to a user who cannot write here, and warn
            options = ("-o", "APT::Sandbox::User=root", "-qq", "download")
            _run("apt-get", *options, f"{package.name}={package.version}", folder=Path(scratch))
            arrived = _downloaded(package, Path(scratch))
            if arrived is None:
                raise ValueError(f"apt-get did not download {package} with the hash of apt's lists: run apt-get update")
            arrived.rename(folder / arrived.name)
            bar.update(package.size)


def unpack(package: Package, debs: Path, folder: Path) -> None:
    """Unpack the files of a downloaded package into a folder, without installing the package.

    Raises:
        ValueError: dpkg-deb failed.
    """
    deb = _downloaded(package, debs)
    assert deb is not None, package
    folder.mkdir(parents=True)
    _run("dpkg-deb", "-x", str(deb), str(folder))


def _downloaded(package: Package, folder: Path) -> Path | None:
    """The file of a package in a folder, if the content is the right one."""
    # apt writes the colon of a version as %3a
    version = package.version.replace(":", "%3a")
    for path in sorted(folder.glob(f"{package.name}_{version}_*.deb")):
        if path.stat().st_size == package.size:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == package.sha256:
                    return path
    return None


def _show(names: list[str]) -> dict[str, Package]:
    """Name -> the version that apt would install; packages that apt cannot download are left out."""
    records = _run("apt-cache", "show", "--no-all-versions", *names, may_fail=True).split("\n\n")
    found = {}
    for record in records:
        fields = dict(_FIELDS.findall(record))
        # a package that is installed but in no source has no file name
        if fields.keys() >= {"Package", "Version", "Size", "SHA256", "Filename"}:
            name = fields["Package"]
            found[name] = Package(
                name=name, version=fields["Version"], size=int(fields["Size"]), sha256=fields["SHA256"]
            )
    return found


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _run(*command: str, folder: Path | None = None, may_fail: bool = False) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if done.returncode and not may_fail:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(f"{' '.join(command[:1])} failed: {lines[-1]}")
    return done.stdout.decode(errors="replace")
