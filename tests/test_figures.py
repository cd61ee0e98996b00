"The figures of all chapters: colours that keep their meaning, and few lines in a panel."
import json
import re
from pathlib import Path

import pytest

from qkrestore_nb.core import colors

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
# beside `core.colors` and greys: tints of a colour that keep its meaning, and one colour for what has none
TINTS = {"#A86F00": "softmax, dark enough for words", "#F6DCA6": "softmax, pale", "#E58A4E": "post, paler",
         "#F2B48C": "post, palest", "#56B4E9": "something else than the models of the course"}
MOST = 8  # lines of one look in a panel


def strange(source: str) -> list[str]:
    "Colours in a cell that have no meaning in this book."
    known = {c.upper() for c in (*colors.values(), *TINTS)}
    written = dict.fromkeys(re.findall(r"#[0-9a-fA-F]{6}\b", source))
    found = [c for c in written if c.upper() not in known and not c[1:3] == c[3:5] == c[5:7]]
    named = r"\b(?:color|facecolor|edgecolor)=[\"'](?!none|black|white)([a-zA-Z][\w:]*)[\"']"
    return found + re.findall(named, source)


def crowded(svg: str) -> list[int]:
    "Lines of different colour or dash in each panel with more than MOST of them."
    found = []
    for panel in re.split(r'^  <g id="axes_\d+">', svg, flags=re.M)[1:]:
        lines = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; ([^"]*)"', panel)
        looks = {tuple(re.findall(r"stroke(?:-dasharray)?: ([^;]+)", line)) for line in lines if "#e6e6e6" not in line}
        if len(looks) > MOST: found.append(len(looks))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures(path):
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        source = "".join(cell["source"])
        found += [f"{c} has no meaning" for c in strange(source)]
        svgs = ["".join(o.get("data", {}).get("image/svg+xml", "")) for o in cell["outputs"]]
        found += [f"{n} lines in a panel: {source[:60]!r}" for svg in svgs for n in crowded(svg)]
    assert not found, "\n".join(found)


def test_these_checks_can_fail():
    import io

    from matplotlib.figure import Figure
    assert strange('ax.plot(x, color="#123456")') == ["#123456"]
    assert strange('ax.plot(x, color="tab:red")') == ["tab:red"]
    assert strange('color="#777777", c=colors["post"], other="#56B4E9", facecolor="white"') == []
    for n in (MOST, MOST + 1):
        fig = Figure()
        ax = fig.subplots()
        for i in range(n): ax.plot([0, 1], [i, 0], color=f"#0000{20 * i + 20:02x}"), ax.plot([0, 1], color="#000000")
        fig.savefig(out := io.StringIO(), format="svg")
        assert bool(crowded(out.getvalue())) == (n >= MOST)
