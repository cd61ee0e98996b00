"""Would nbdev 3 change anything that matters? `python .ci/nbdev3.py`, run by nbdev 3: exit code 1 and what, if so.

settings.ini keeps nbdev 2 as the tool, and nbdev 3 refuses to run beside it. So a copy is migrated as nbdev 3 proposes,
then exported and cleaned. Modules may gain the address of their page on top, _modidx.py may change; notebooks not."""
import configparser
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FORGOTTEN = ("allowed_metadata_keys", "allowed_cell_metadata_keys")  # by the migration
ADDRESS = re.compile(r'\A"""Docs: https://\S+"""\n\n')


def migrated(folder: Path) -> None:
    "settings.ini into [tool.nbdev] of the pyproject.toml that is there: the migration would write a new one over it."
    ini, ours = configparser.ConfigParser(), (folder / "pyproject.toml").read_text()
    ini.read(folder / "settings.ini")
    subprocess.run([BIN / "nbdev-migrate-config"], cwd=folder, check=True)
    theirs = (folder / "pyproject.toml").read_text()
    section = re.search(r"^\[tool\.nbdev\]\n(?:(?!\[).*\n?)*", theirs, flags=re.M)[0].rstrip()
    section += "".join(f"\n{key} = {ini['DEFAULT'][key].split()}" for key in FORGOTTEN if f"\n{key} =" not in section)
    (folder / "pyproject.toml").write_text(f"{ours}\n{section}\n")
    (folder / "settings.ini").unlink()


def texts(folder: Path) -> dict[str, str]:
    "Notebooks and modules; modules without the address on top."
    found = [*folder.glob("nbs/**/*.ipynb"), *folder.glob("qkrestore_nb/*.py")]
    return {p.relative_to(folder).as_posix(): ADDRESS.sub("", p.read_text()) for p in found if p.name != "_modidx.py"}


def changed() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nbs", "qkrestore_nb"): shutil.copytree(ROOT / name, copy / name)
        for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, copy)
        before = texts(copy)
        migrated(copy)
        for command in ("nbdev-export", "nbdev-clean"): subprocess.run([BIN / command], cwd=copy, check=True)
        after = texts(copy)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


if __name__ == "__main__":
    found = changed()
    sys.exit(f"nbdev 3 would change {', '.join(found)}" if found else None)
