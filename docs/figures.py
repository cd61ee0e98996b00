"""A figure's panels below one another, for narrow windows: from the SVG that matplotlib wrote, not drawn again.

Panels that stand side by side become pieces of the one picture, each as a view of its own; a piece that shares the
scale of the first gets a copy of that scale at its left."""
import re
from dataclasses import dataclass
from html import escape, unescape

SCALE = 25      # points: axes that are narrower or lower are the scale of colours of those beside them
SMALLEST = 10   # pixels: no letter is shown smaller
WIDEST = 832    # pixels of the column of text in a wide window


@dataclass
class Axes:
    "The frame of one panel in points, where its words begin, and whether its y axis has any."
    left: float
    right: float
    top: float
    bottom: float
    start: float
    labelled: bool


def size(svg: str) -> tuple[float, float]:
    "Width and height in points."
    width, height = re.findall(r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', svg)[0]
    return float(width), float(height)


def letters(svg: str) -> float:
    "Points of the smallest letters, or infinity."
    found = re.findall(r'<g id="text_\d+">.*?scale\(([\d.]+) -', svg, flags=re.S)
    return min((100 * float(s) for s in found), default=float("inf"))


def axes(svg: str) -> list[Axes]:
    "The panels, in the order in which they were drawn."
    found = []
    for group in re.split(r'^  <g id="axes_\d+">', svg, flags=re.M)[1:]:
        group = re.split(r"^  </g>", group, flags=re.M)[0]
        corners = re.search(r'<g id="patch_\d+">\s*<path d="([^"]+)"', group)
        numbers = [float(x) for x in re.findall(r"[\d.]+", corners[1])] if corners else [0, 0]
        y_axis = re.split(r'^   <g id="matplotlib\.axis_\d+">', group, flags=re.M)[2:]
        words = [part for part in y_axis if '<g id="text_' in re.split(r"^   </g>", part, flags=re.M)[0]]
        words_at = re.findall(r'<g id="text_\d+">.*?translate\(([\d.]+) [\d.]+\)( rotate\(-90\))? scale\(([\d.]+)',
                              group, flags=re.S)
        starts = [float(x) - 90 * float(scale) * bool(turned) for x, turned, scale in words_at]  # the baseline is at x
        left = min(numbers[::2])
        found.append(Axes(left, max(numbers[::2]), min(numbers[1::2]), max(numbers[1::2]),
                          min([left, *starts]), bool(words)))
    return found


def groups(spans: list[tuple[float, float, Axes]]) -> list[list[Axes]]:
    "Axes whose spans overlap, together; in the order of the spans. Scales of colours stay with those before them."
    made: list[list[Axes]] = []
    end = float("-inf")
    for low, high, a in sorted(spans, key=lambda s: s[:2]):
        if low < end or made and min(a.right - a.left, a.bottom - a.top) < SCALE: made[-1].append(a)
        else: made.append([a])
        end = max(end, high)
    return made


def pieces(svg: str) -> list[tuple[float, float, float, float, float]]:
    """The panels of a figure as (left, top, width, height, width of the scale to repeat), points; one piece: no panels.

    Columns, where the figure has some; else the columns of each row. A figure with words of its own is one piece."""
    width, height = size(svg)
    own = re.search(r'^  <g id="(?:legend|text)_', svg, flags=re.M)
    if own or not axes(svg): return [(0, 0, width, height, 0)]
    columns = groups([(a.left, a.right, a) for a in axes(svg)])
    rows = [(columns, 0., height)]
    if len(columns) == 1:
        lines = groups([(a.top, a.bottom, a) for a in axes(svg)])
        cuts = [0., *(max(a.bottom for a in line) + 26 for line in lines[:-1]), height]
        rows = [(groups([(a.left, a.right, a) for a in line]), *cut) for line, cut in zip(lines, zip(cuts, cuts[1:]))]
    found = []
    for columns, top, bottom in rows:
        starts = [0., *(min(a.start for a in c) - 3 for c in columns[1:]), width]
        scale = min((a.left for a in columns[0]), default=0) - 4
        for c, left, right in zip(columns, starts, starts[1:]):
            shared = c is not columns[0] and columns[0][0].labelled and not any(a.labelled for a in c)
            found.append((left, top, right - left, bottom - top, scale if shared else 0))
    return found


def view(href: str, whole: tuple[float, float], x: float, y: float, box: tuple[float, float, float, float]) -> str:
    "One part of a picture, at a place of the svg that surrounds it."
    left, top, width, height = (round(v, 1) for v in box)
    return (f'<svg x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f'<image href="{escape(href)}" width="{whole[0]}" height="{whole[1]}"/></svg>')


def stacked(svg: str, href: str, alt: str) -> str:
    "The pieces of a figure below one another as one inline svg, or nothing where it has one piece only."
    found = pieces(svg)
    if len(found) < 2 or len({round(top) for _, top, *_ in found}) == len(found): return ""
    whole, y, parts = size(svg), 0., []
    for left, top, width, height, scale in found:
        if scale: parts.append(view(href, whole, 0, y, (0, top, scale, height)))
        parts.append(view(href, whole, scale, y, (left, top, width, height)))
        y += height + 6
    width = round(max(width + scale for _, _, width, _, scale in found), 1)
    style = f"--natural: {width * 4 / 3:.0f}px; --readable: {readable(width, svg):.0f}px"
    return (f'<svg class="stacked" role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {y:.1f}" '
            f'style="{style}">{"".join(parts)}</svg>')


def readable(width: float, svg: str) -> float:
    "Pixels that so many points need, at least, so that the smallest letters can be read."
    return width * SMALLEST / letters(svg)


def shown(img: str, svg: str) -> str:
    "The img of a figure with its size, and behind it its panels below one another; site.css chooses."
    said = {k: unescape(v) for k, v in re.findall(r'(\w+)="([^"]*)"', img)}
    (width, height), low = size(svg), stacked(svg, said["src"], said.get("alt", ""))
    need = readable(width, svg)
    kind = f' class="side{" never" * (need > WIDEST)}"' if low else ""
    return (f'<img alt="{escape(said.get("alt", ""))}" src="{said["src"]}" width="{width * 4 / 3:.0f}" '
            f'height="{height * 4 / 3:.0f}"{kind} style="--readable: {need:.0f}px">{low}')
