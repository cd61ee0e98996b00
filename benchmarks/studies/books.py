"""Long documents for chapter 12b: `python benchmarks/studies/books.py books.txt.xz`, on Debian with apt-get.

Fetches the packages anarchism, debian-handbook and debian-reference-en (An Anarchist FAQ, The Debian Administrator's Handbook,
Debian Reference: GFDL, GPL and CC BY-SA), unpacks them without installing, and keeps their English prose: documents divided by a
zero byte, compressed by xz (2.8 MB). The text is used for training and is not part of the package."""
import argparse
import html
import lzma
import re
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ("anarchism", "debian-handbook", "debian-reference-en")


def plain(page: str) -> str:
    "The longer lines of an HTML page as text."
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", page)
    page = re.sub(r"(?i)</?(p|div|li|ul|ol|h\d|br|tr|table|blockquote|dd|dt|dl)\b[^>]*>", "\n", page)
    lines = [" ".join(line.split()) for line in html.unescape(re.sub(r"<[^>]+>", "", page)).splitlines()]
    return "\n".join(line for line in lines if len(line) > 60 and line.count("|") < 3)


def documents(folder: Path) -> list[str]:
    "Every page of more than 4,000 characters, without lines that an earlier one has."
    seen, out = set(), []
    for name in PACKAGES:
        for file in sorted((folder / name).rglob("*.html")):
            if name != "anarchism" and "en-US" not in str(file) and ".en.html" not in file.name: continue
            lines = [x for x in plain(file.read_text(errors="replace")).splitlines() if x not in seen]
            seen.update(lines)
            text = "\n".join(lines)
            if len(text) > 4000: out.append(text)
    return out


ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ask.add_argument("out", type=Path)
args = ask.parse_args()
with tempfile.TemporaryDirectory() as work:
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
    for deb in Path(work).glob("*.deb"): subprocess.run(["dpkg", "-x", deb, Path(work) / deb.name.split("_")[0]], check=True)
    found = documents(Path(work))
args.out.write_bytes(lzma.compress("\0".join(found).encode(), preset=9 | lzma.PRESET_EXTREME))
print(f"{len(found)} documents, {sum(map(len, found)):,} characters, {args.out.stat().st_size:,} bytes in {args.out}")
