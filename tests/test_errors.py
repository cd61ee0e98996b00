"What the package raises: short sentences; and what its modules ask of each other: public names."
import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qkrestore_nb"
MODULES = [p for p in sorted(PACKAGE.glob("*.py")) if p.name != "_modidx.py"]


def typical(value: ast.expr) -> int:
    "How many characters usually stand in these braces."
    code = ast.unparse(value)
    if cut := re.search(r"\[:(\d+)\]", code): return int(cut[1])
    if "join" in code or code == "e": return 30
    paths = r"folder|path|file|\bpost\b|\bpre\b|\bout\b|checkpoint|name"
    return 24 if re.search(paths, code) and "__name__" not in code else 10


def length(message: ast.expr) -> int:
    "Of a message with usual values, in its longest form."
    match message:
        case ast.Constant(): return len(str(message.value))
        case ast.JoinedStr(): return sum(map(length, message.values))
        case ast.FormattedValue(value=ast.IfExp() | ast.JoinedStr() as inner): return length(inner)
        case ast.FormattedValue(): return typical(message.value)
        case ast.BinOp(op=ast.Add()): return length(message.left) + length(message.right)
        case ast.IfExp(): return max(length(message.body), length(message.orelse))
    return typical(message)


def raised(source: str) -> list[tuple[int, int]]:
    "Line and length of every message of an error."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and n.args]
    return [(n.lineno, length(n.args[0])) for n in calls if ast.unparse(n.func).endswith("Error")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_sentences_are_short(path):
    assert [(line, n) for line, n in raised(path.read_text()) if n > 160] == []


def test_that_check_can_fail():
    words = "x" * 140
    for source, n in (
        (f"raise ValueError('{words}')", 140),
        (f"return AnError(f'{words}{{folder}}')", 164),
        (f"raise AnError(f'{words}{{str(e)[:80]}}') from e", 220),
        (f"raise AnError('{words}' + (f'{{n}}' if n else 'nothing'))", 150),
    ):
        assert raised(source) == [(1, n)]
    assert sum(len(raised(p.read_text())) for p in MODULES) > 300


def private(source: str) -> list[str]:
    "Names with an underscore that are taken from another module of the package."
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    ours = [n for n in found if n.level or (n.module or "").startswith("qkrestore_nb")]
    return [a.name for n in ours for a in n.names if a.name.startswith("_") and a.name != "__version__"]


def test_modules_use_each_other_s_public_names():
    benchmarks = (PACKAGE.parent / "benchmarks").rglob("*.py")
    assert {p.name: names for p in [*MODULES, *benchmarks] if (names := private(p.read_text()))} == {}
    source = "from .core import _a, b\nfrom torch import _C\nfrom qkrestore_nb.scale import _d"
    assert private(source) == ["_a", "_d"]
