"Exercises: a stub, a check that the stub fails and a reader's answer can pass, and a folded solution that is checked."
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))


def wrong(cells: list[dict]) -> list[str]:
    "What is wrong with the exercises of a notebook, as sentences."
    found, text = [], ["".join(c["source"]) for c in cells]
    for i, source in enumerate(text):
        stub = cells[i]["cell_type"] == "code" and "raise NotImplementedError" in source
        if not stub or "@exercise" in source: continue
        name = re.findall(r"^def (\w+)\(", source, flags=re.M)[-1]
        prose = next(text[j] for j in range(i, -1, -1) if cells[j]["cell_type"] == "markdown")
        hard = re.search(r"\(★+, \d+ minutes\)", prose)
        if not hard: found.append(f"{name}: say how hard it is, as in (★, 5 minutes)")
        check, solution = (text[i + 1:i + 3] + ["", ""])[:2]
        if f"@exercise\ndef check_{name}():" not in check: found.append(f"{name}: no check below the stub")
        else:
            printed = "".join("".join(o.get("text", "")) for o in cells[i + 1]["outputs"])
            if "Not written yet" not in printed: found.append(f"{name}: the stub passes the check, or it was not run")
        folded = solution.startswith("#| code-fold: true\n#@title Solution\n")
        if not folded or cells[i + 2]["metadata"].get("cellView") != "form": found.append(f"{name}: no folded solution")
        elif not solution.endswith(f"\n\ncheck_{name}()"): found.append(f"{name}: the solution is not checked")
    return found


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "00_core"], ids=lambda p: p.stem)
def test_exercises(path):
    found = wrong(json.loads(path.read_text())["cells"])
    assert not found, "\n".join(found)


def exercise(stub="def f():\n    raise NotImplementedError", check="@exercise\ndef check_f(): assert f() == 1",
             said="Not written yet", solution="#| code-fold: true\n#@title Solution\ndef f(): return 1\n\ncheck_f()",
             prose="**1. One.** (★, 5 minutes) Return one.", view="form"):
    code = dict(cell_type="code", metadata={}, outputs=[])
    return [dict(cell_type="markdown", source=[prose]), {**code, "source": [stub]},
            {**code, "source": [check], "outputs": [dict(text=[said])]},
            {**code, "source": [solution], "metadata": {"cellView": view}}]


@pytest.mark.parametrize("change, sentence", [
    ({}, None), (dict(prose="**1. One.** Return one."), "say how hard"), (dict(check="assert f() == 1"), "no check"),
    (dict(said="Right."), "the stub passes"), (dict(view="code"), "no folded solution"),
    (dict(solution="#| code-fold: true\n#@title Solution\ndef f(): return 1"), "the solution is not checked")])
def test_this_check_can_fail(change, sentence):
    found = wrong(exercise(**change))
    assert (not found) if sentence is None else (len(found) == 1 and sentence in found[0])


def test_a_check(capsys):
    "A stub is told from an answer, and a wrong answer fails."
    from qkrestore_nb import core
    answers = iter((NotImplementedError(), 1, 2))
    def check():
        if isinstance(answer := next(answers), Exception): raise answer
        assert answer == 1
    said = []
    for _ in range(2):
        assert core.exercise(check) is check
        said.append(capsys.readouterr().out)
    assert said[0].startswith("Not written yet") and said[1] == "Right.\n"
    with pytest.raises(AssertionError): core.exercise(check)
