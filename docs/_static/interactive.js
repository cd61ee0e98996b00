// Figures with sliders. A cell shows Interactive("margin", ...) of qkrestore_nb.core: a div with the figure's name and its
// data. Every measured number comes from there; formulas stand here as in the chapter, and tests/test_site.py compares them.
const SVG = "http://www.w3.org/2000/svg", PHONE = 600, LETTER = 12;  // pixels; svg is drawn at its real size, so letters keep theirs
const INK = "#222222", GRID = "#e6e6e6";

function make(name, attributes = {}, ...children) {
  const svg = /^(svg|g|path|line|circle|text|rect)$/.test(name);
  const e = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  e.append(...children);
  return e;
}

const thousands = (n) => n.toLocaleString("en-US"), range = (n) => [...Array(n).keys()];
const short = (n) => n >= 1e6 ? `${n / 1e6}M` : n >= 1e3 ? `${n / 1e3}K` : `${n}`;

// A slider with a label that says its value in words: {node, value(), text()}.
function slider(label, { min, max, step = 1, value, show = String }, changed) {
  const input = make("input", { type: "range", min, max, step, value }), said = make("b");  // no output: a label would belong to it
  const update = () => { said.textContent = show(+input.value); input.setAttribute("aria-valuetext", said.textContent); };
  input.addEventListener("input", () => { update(); changed(); });
  update();
  return { node: make("label", {}, make("span", {}, `${label}: `, said), input), value: () => +input.value };
}

// Axes, grid and title of one panel: [left, top, width, height] of the whole, letters included. Returns the two scales.
function panel(svg, [left, top, width, height], { title, xlabel, x, y, log = false, xticks, yticks }) {
  const box = { left: left + 38, right: left + width - 14, top: top + 26, bottom: top + height - 42 };
  const along = (v, [a, b], from, to) => from + (to - from) * (log && from < to ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a));
  const X = (v) => along(v, x, box.left, box.right), Y = (v) => along(v, y, box.bottom, box.top);
  const text = (words, at) => svg.append(make("text", { fill: INK, "font-size": LETTER, ...at }, words));
  text(title, { x: left + 4, y: top + 14, "font-weight": 600 });
  for (const [v, words] of yticks) {
    svg.append(make("line", { x1: box.left, x2: box.right, y1: Y(v), y2: Y(v), stroke: GRID }));
    text(words, { x: box.left - 6, y: Y(v) + 4, "text-anchor": "end" });
  }
  for (const [v, words] of xticks) {
    svg.append(make("line", { x1: X(v), x2: X(v), y1: box.top, y2: box.bottom, stroke: GRID }));
    text(words, { x: X(v), y: box.bottom + 17, "text-anchor": "middle" });
  }
  svg.append(make("path", { d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: INK }));
  text(xlabel, { x: (box.left + box.right) / 2, y: box.bottom + 35, "text-anchor": "middle" });
  return { X, Y, box };
}

// A line through points [x, y]; what leaves the panel above or below runs along its edge.
function curve(svg, { X, Y, box }, points, style) {
  const inside = (v) => Math.min(box.bottom, Math.max(box.top, v));
  const d = points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${inside(Y(y)).toFixed(1)}`).join("");
  svg.append(make("path", { d, fill: "none", "stroke-width": 2, ...style }));
}

const sample = (style) => make("svg", { width: 28, height: 8, "aria-hidden": "true" }, make("line", { x1: 0, x2: 28, y1: 4, y2: 4, "stroke-width": 3, ...style }));

// Two panels: side by side, on a phone one below the other.
function places(width, height = 260) {
  return width < PHONE ? [[0, 0, width, height], [0, height, width, height]] : [[0, 0, width / 2, height], [width / 2, 0, width / 2, height]];
}

const FIGURES = {
  // chapter 01: the share of attention on a needle, against the length
  margin(data) {
    const share = (T, exponent) => 1 / (1 + (T - 1) * Math.exp(exponent));
    const scale = (T, a) => Math.log(T - 1 + a) / Math.log(a);
    const curves = [
      { name: "equal", words: "equal distractors", style: { stroke: "#777777" }, has: (m) => m },
      { name: "random", words: "random distractors", style: { stroke: "#444444", "stroke-dasharray": "6 4" }, has: (m) => m - 1 / 2 },
      { name: "scaled", words: "random distractors, log scale", style: { stroke: data.colors.softmax },
        has: (m, T, a) => scale(T, a) * m - scale(T, a) ** 2 / 2 }];
    const length = (v) => Math.round(10 ** v), [first, last] = data.lengths, ticks = [1, 2, 3, 4, 5, 6].map((n) => [10 ** n, short(10 ** n)]);
    return {
      alt: "Left: the margin that a needle needs and the one it has, against the length. Right: its share of the attention",
      sliders: (changed) => ({
        m: slider("margin m", { min: 0, max: 16, step: .1, value: data.margin, show: (v) => v.toFixed(1) }, changed),
        T: slider("tokens T", { min: Math.log10(first), max: Math.log10(last), step: .05, value: 5, show: (v) => thousands(length(v)) }, changed),
        a: slider("a of the log scale", { min: 100, max: 1000, step: 50, value: data.a }, changed) }),
      draw(svg, width, values) {
        const m = values.m, a = values.a, T = length(values.T), lengths = range(101).map((i) => first * (last / first) ** (i / 100));
        const [left, right] = places(width);
        const margins = panel(svg, left, { title: "margin, logits", xlabel: "tokens", x: data.lengths, log: true, y: [0, 18], xticks: ticks, yticks: [0, 6, 12, 18].map((v) => [v, v]) });
        const shares = panel(svg, right, { title: "share of attention on the needle", xlabel: "tokens", x: data.lengths, log: true, y: [0, 1], xticks: ticks, yticks: [0, .5, 1].map((v) => [v, v]) });
        curve(svg, margins, lengths.map((t) => [t, Math.log(t - 1)]), { stroke: "#000000", "stroke-dasharray": "2 4" });
        for (const { style, has } of curves) {
          curve(svg, margins, lengths.map((t) => [t, has(m, t, a)]), style);
          curve(svg, shares, lengths.map((t) => [t, share(t, -has(m, t, a))]), style);
          svg.append(make("circle", { cx: shares.X(T), cy: shares.Y(share(T, -has(m, T, a))), r: 4, fill: style.stroke }));
        }
        for (const { X, box } of [margins, shares]) svg.append(make("line", { x1: X(T), x2: X(T), y1: box.top, y2: box.bottom, stroke: INK, "stroke-width": 1 }));
        const row = (style, words, name, value) => make("li", {}, sample(style), ` ${words} `, make("output", { name }, value));
        return make("ul", {}, row({ stroke: "#000000", "stroke-dasharray": "2 4" }, "margin for one half, ln (T − 1):", "needed", Math.log(T - 1).toFixed(2)),
          ...curves.map(({ name, words, style, has }) => row(style, `share, ${words}:`, name, share(T, -has(m, T, a)).toFixed(4))));
      } };
  },

  // chapter 02: pairs remembered against half-life and state size, as a cell measured them
  memory(data) {
    const greys = ["#b5b5b5", data.colors.linear, "#606060", "#000000"], n = data.lives.length;
    return {
      alt: "Left: share of pairs read back right against their age. Right: pairs remembered against half-life, a line for each size of the state",
      sliders: (changed) => ({
        size: slider("state", { min: 0, max: data.sizes.length - 1, value: data.sizes.indexOf(64), show: (i) => `${data.sizes[i]} × ${data.sizes[i]}` }, changed),
        life: slider("half-life, tokens", { min: 0, max: n - 1, value: data.lives.indexOf("128"), show: (i) => data.lives[i] }, changed) }),
      draw(svg, width, { size, life }) {
        const [left, right] = places(width), most = Math.max(...data.remembered.flat()), top = Math.ceil(most / 100) * 100;
        const ages = panel(svg, left, { title: "read back right, %", xlabel: "age of the pair, tokens", x: [0, data.pairs], y: [0, 100],
          xticks: range(5).map((i) => [i * data.pairs / 4, i * data.pairs / 4]), yticks: [0, 50, 100].map((v) => [v, v]) });
        const lives = panel(svg, right, { title: "pairs remembered", xlabel: "half-life, tokens", x: [-.3, n], y: [0, top],
          xticks: data.lives.map((words, i) => [i, words]), yticks: range(top / 100 + 1).map((i) => [100 * i, 100 * i]) });
        curve(svg, ages, [[0, data.chance], [data.pairs, data.chance]], { stroke: "#000000", "stroke-width": 1, "stroke-dasharray": "2 4" });
        svg.append(make("text", { x: ages.box.right, y: ages.Y(data.chance) + 11, "text-anchor": "end", "font-size": LETTER, fill: INK }, "chance"));
        const shares = data.by_age[size][life];
        curve(svg, ages, shares.map((v, i) => [(i + .5) * data.pairs / shares.length, v]), { stroke: greys[size] });
        data.sizes.forEach((d, i) => {
          curve(svg, lives, data.remembered[i].map((v, j) => [j, v]), { stroke: greys[i], "stroke-width": i === size ? 3 : 1.5 });
          svg.append(make("text", { x: lives.X(n - 1) + 7, y: lives.Y(data.remembered[i].at(-1)) + 4, "font-size": LETTER, fill: INK, "font-weight": i === size ? 700 : 400 }, d));
        });
        svg.append(make("circle", { cx: lives.X(life), cy: lives.Y(data.remembered[size][life]), r: 6, fill: "#ffffff", stroke: INK, "stroke-width": 2.5 }));
        return make("p", {}, `Of ${data.pairs} pairs the state remembers `, make("output", { name: "remembered" }, data.remembered[size][life].toFixed(1)), " beyond guessing.");
      } };
  },

  // chapter 10a: recall against reasoning for every repair, as results/experiment has them
  repairs(data) {
    const counts = Object.keys(data.counts), starts = [0, 20, 40, 60, 80, 90];
    return {
      alt: "Recall against 8-step chains, a point for each repair; Tab goes from point to point",
      sliders: (changed) => ({
        length: slider("length of the text, tokens", { min: 0, max: data.lengths.length - 1, value: data.lengths.indexOf(16384), show: (i) => `${data.lengths[i] / 1024}K` }, changed),
        count: slider("recall counted as", { min: 0, max: counts.length - 1, value: 0, show: (i) => data.counts[counts[i]] }, changed),
        from: slider("chains shown from", { min: 0, max: starts.length - 1, value: starts.indexOf(60), show: (i) => `${starts[i]}%` }, changed) }),
      draw(svg, width, { length, count, ...values }) {
        const from = starts[values.from], recall = (r) => r[counts[count]][length], there = data.repairs.filter((r) => recall(r) !== null);
        const seen = there.filter((r) => r.chains >= from), ordered = [...seen].sort((a, b) => recall(a) - recall(b));
        const low = Math.floor(Math.min(95, ...seen.map(recall)) / 5) * 5 - (width < PHONE ? 5 : 0), step = (100 - from) / 4;
        const scales = panel(svg, [0, 0, width, 380], { title: "8-step chains, %", xlabel: `recall: S1 to MK at ${data.lengths[length] / 1024}K tokens, ${data.counts[counts[count]]}, %`,
          x: [low, 102], y: [from - step / 5, 100 + step / 3], xticks: range(21).map((i) => i * 5).filter((v) => v >= low && (width >= PHONE || low > 60 || v % 10 === 0)).map((v) => [v, v]),
          yticks: range(5).map((i) => [from + i * step, from + i * step]) });
        const at = (r) => [scales.X(recall(r)), scales.Y(r.chains)], taken = seen.map((r) => at(r)).map(([x, y]) => [x - 5, y - 5, x + 5, y + 5]);
        for (const family of new Set(seen.map((r) => r.family).filter(Boolean))) {  // one repair in several strengths, or with several lam
          const members = ordered.filter((r) => r.family === family);
          curve(svg, scales, members.map((r) => [recall(r), r.chains]), { stroke: members.at(-1).color, "stroke-width": 1.2 });
        }
        const words = (r) => `${r.name}: recall ${recall(r).toFixed(1)}%, chains ${r.chains.toFixed(1)}%, chains against SFT ${r.cost}`;
        const said = make("p", { role: "status" }, `${there.length} variants at this length, ${seen.length} of them shown. Point at one, or press Tab to go through them.`);
        const ring = make("circle", { r: 9, fill: "none", stroke: INK, "stroke-width": 2, visibility: "hidden" });
        const dots = ordered.map((r) => {
          const [cx, cy] = at(r), dot = make("circle", { cx, cy, r: 5, fill: r.color, stroke: "#ffffff", tabindex: 0, role: "img", "aria-label": words(r) });
          dot.show = () => { said.textContent = words(r); for (const [k, v] of Object.entries({ cx, cy, visibility: "visible" })) ring.setAttribute(k, v); };
          dot.addEventListener("focus", dot.show);
          return dot;
        });
        svg.append(ring, ...dots);
        svg.onpointermove = (event) => {
          const corner = svg.getBoundingClientRect(), away = (d) => Math.hypot(d.cx.baseVal.value - event.clientX + corner.left, d.cy.baseVal.value - event.clientY + corner.top);
          const nearest = dots.length && dots.reduce((a, b) => away(a) <= away(b) ? a : b);
          if (nearest && away(nearest) < 25) nearest.show();
        };
        svg.onpointerdown = svg.onpointermove;
        for (const r of seen.filter((r) => r.label)) {  // names, where there is room for them: the important ones come first
          const [x, y] = at(r), w = r.label.length * 6.8;
          const free = [[8, 4], [-w - 8, 4], [-w / 2, -9], [-w / 2, 17], [8, -6], [8, 14], [-w - 8, -6], [-w - 8, 14], [-w / 2, -16], [-w / 2, 24]].map(([dx, dy]) => [x + dx, y + dy - 10, x + dx + w, y + dy + 2])
            .find((b) => b[0] > scales.box.left && b[2] < width && b[1] > scales.box.top - 4 && b[3] < scales.box.bottom && taken.every((t) => b[2] < t[0] || t[2] < b[0] || b[3] < t[1] || t[3] < b[1]));
          if (!free) continue;
          taken.push(free);
          svg.append(make("text", { x: free[0], y: free[3] - 2, "font-size": LETTER, fill: INK, "pointer-events": "none" }, r.label));
        }
        return said;
      } };
  },
};

for (const box of document.querySelectorAll("div.interactive")) {
  const data = JSON.parse(box.querySelector("script").textContent), figure = FIGURES[box.dataset.figure](data);
  const drawn = make("div"), said = make("div", { class: "said" });
  let width = 0;
  const draw = () => {
    if (!width) return;
    const svg = make("svg", { width, role: "group", "aria-label": figure.alt });
    said.replaceChildren(figure.draw(svg, width, Object.fromEntries(Object.entries(sliders).map(([k, s]) => [k, s.value()]))));
    drawn.replaceChildren(svg);
    const { height } = svg.getBBox();
    svg.setAttribute("height", Math.ceil(height) + 8);
  };
  const sliders = figure.sliders(draw);
  box.replaceChildren(make("div", { class: "sliders" }, ...Object.values(sliders).map((s) => s.node)), drawn, said);
  new ResizeObserver(() => {
    if (drawn.clientWidth === width) return;
    width = drawn.clientWidth;
    draw();
  }).observe(drawn);
}
