"Plain English: words of this project's own stay out of prose, captions, docstrings, help texts and error sentences."
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# Pattern -> what to write instead. \b at both ends, in any case.
BANNED = {
    r"put(?:s|ting)?(?: \w+)? back": "restore",
    r"(?:bring|brought)s?(?: \w+)? back": "recover",
    r"going back|goes? back to": "restore, is restored",
    r"(?:Q and K|weights|what else)(?: can)? go(?:es)? back": "are restored",
    r"(?:of|from) (?:before|after)(?= (?:fine-tuning )?(?:and|in|with)|[.,;:)])": "pre-SFT, post-SFT; of pre, of post",
    r"a row each": "unpacked, one example per sequence",
    r"(?:packed|problems|chains) end to end": "packed without document borders",
    r"(?:said|right) at once": "exact match",
    r"manners": "answer format",
    r"rivals?": "baseline, alternative",
    r"(?:was|were|been|be) asked(?! for)": "evaluated",
    r"needles? of \d* ?(?:letters|digits|numbers)": "value of 16 letters, of 5 digits",
    r"near-sighted|finder's|mumbles?": "say it without a metaphor",
    r"third-party notes?": "say once, in chapter 16, how the paper is known",
    r"(?:first|second) edition|the (?:old|shipped) recipe|prototype|as announced|had been (?:announced|predicted)":
        "no history of the project in lessons",
    r"until then|the earlier run|at that time": "no history of the project in lessons",
    }
RUNS = {r"the (?:first|second|third|fourth|fifth|sixth|seventh) run": "no history of the project in lessons"}


def prose(nb: dict) -> list[str]:
    "What a reader reads as English: prose, alt texts, docstrings; and of exported cells every string and comment."
    found = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found.append(re.sub(r"```.*?```|`[^`\n]+`|\]\([^)]*\)", "]", source, flags=re.S))
            continue
        found += re.findall(r"^#\| fig-alt:? (.*)", source, flags=re.M)
        if "#| hide" in source: continue
        source = "\n".join("" if line.startswith(("%", "!")) else line for line in source.split("\n"))
        nodes = list(ast.walk(ast.parse(source)))
        if re.search(r"^#\| export", source, flags=re.M):
            found += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            tokens = tokenize.generate_tokens(io.StringIO(source).readline)
            found += [t.string for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith("#|")]
        else:
            named = (ast.FunctionDef, ast.ClassDef)
            found += filter(None, (ast.get_docstring(n) for n in nodes if isinstance(n, named)))
    return found


def house_words(texts: list[str], banned: dict[str, str]) -> list[str]:
    "Banned words with what stands around them, and what to write."
    found = []
    for text in texts:
        for pattern, instead in banned.items():
            for m in re.finditer(rf"\b(?:{pattern})(?!\w)", text, flags=re.I):
                around = " ".join(text[max(0, m.start() - 40):m.end() + 30].split())
                found.append(f"{m[0]!r} in {around!r}: write {instead}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_plain_words(path):
    log = path.stem.startswith("log")
    found = house_words(prose(json.loads(path.read_text())), BANNED | ({} if log else RUNS))
    assert not found, "\n".join(found)


def claim(nb: dict) -> str:
    "What a chapter claims, or nothing."
    found = re.search(r"\*\*Claim\.\*\* (.+?)(?: \*\*You need|$)", "".join(nb["cells"][0]["source"]), flags=re.M)
    return found[1] if found else ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_claims_are_short(path):
    words = len(claim(json.loads(path.read_text())).split())
    assert words <= 25, f"the claim of {path.stem} has {words} words: at most 25"
    assert words or path.stem in {"index", "15_glossary"} or path.stem.startswith("log"), f"{path.stem} has no claim"


def test_claims_are_read():
    assert claim(cells("# T\n\n**Claim.** One two. **You need:** x", kind="markdown")) == "One two."
    assert claim(cells("# T\n\n**Claim.** One.\n\nMore.", kind="markdown")) == "One."


def cells(*sources, kind="code"):
    return {"cells": [{"cell_type": kind, "source": [s]} for s in sources]}


@pytest.mark.parametrize("nb, word", [
    (cells("Q and K are put back.", kind="markdown"), "put back"),
    (cells("It is a matter of manners.", kind="markdown"), "manners"),
    (cells("#| fig-alt: Four rivals against length"), "rivals"),
    (cells("#| export\ndef f(\n    x,  # the mixer of after, here\n): pass"), "of after"),
    (cells('def f():\n    "What the first edition did."'), "first edition"),
    (cells('#| export\nHELP = "models that were asked"'), "were asked"),
    (cells("#| export\nraise ValueError(f'putting {x} back')"), None)])
def test_this_check_can_fail(nb, word):
    found = house_words(prose(nb), BANNED)
    assert [f.split("'")[1] for f in found] == ([word] if word else [])


def test_code_and_links_are_not_prose():
    text = "`put back` and [rules](manners.html)\n```text\nrivals\n```"
    assert house_words(prose(cells(text, kind="markdown")), BANNED) == []
