"use strict";
const data = id => JSON.parse(document.getElementById(id).textContent);
const $ = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const NS = "http://www.w3.org/2000/svg";
const svg = (tag, attributes = {}, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const isNumber = value => typeof value === "number";
const compact = value => {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(1);
  return size < 10 ? value.toFixed(3) : value.toFixed(1);
};

(() => {  // light or dark: the system's choice until the button says otherwise
  const root = document.documentElement;
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.getElementById("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };
})();

(() => {
  const metrics = data("metrics"), panels = data("panels");
  const steps = metrics.map(m => m.step), first = Math.min(...steps), last = Math.max(...steps);
  const slider = document.getElementById("smooth");
  slider.value = metrics.length > 60 ? 0.8 : metrics.length > 25 ? 0.6 : 0;
  const PAD = { left: 46, right: 10, top: 8, bottom: 22 }, HEIGHT = 168;
  const charts = [];

  const niceTicks = (low, high, count) => {
    const span = high - low || Math.abs(high) || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].find(m => m * power >= raw) * power, out = [];
    for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + size * 1e-9; v += size) out.push(Math.abs(v) < size * 1e-9 ? 0 : v);
    return out;
  };
  const tickLabel = v => Math.abs(v) >= 1e4 ? `${+(v / 1e3).toPrecision(3)}k` : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(1).replace(".0e", "e") : `${+v.toPrecision(3)}`;

  // exponential moving average without the pull towards its start
  const smoothed = (points, weight) => {
    let sum = 0, norm = 0;
    return points.map(([x, y]) => { sum = weight * sum + (1 - weight) * y; norm = weight * norm + (1 - weight); return [x, sum / norm]; });
  };

  const range = (panel, rows) => {
    if (panel.unit_interval) return [0, 1];
    let values = rows.flat().map(p => p[1]);
    if (panel.log) values = values.filter(v => v > 0).map(Math.log10);
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) return [0, 1];
    if (panel.log) return [Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1)];
    if (panel.kind === "stack" || (low >= 0 && low < 0.6 * high)) low = 0;
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; return low === 0 ? [0, 1] : [low - room, high + room]; }
    const room = 0.06 * (high - low);
    return [low === 0 ? 0 : low - room, high + room];
  };

  class Chart {
    constructor(panel, home) {
      this.panel = panel;
      this.colour = i => `var(--s${i % 5 + 1})`;
      const title = $("h3", {}, panel.title);
      if (panel.unit) title.append($("span", {}, `  ${panel.unit}`));
      this.values = panel.series.map(() => $("b"));
      const legend = $("div", { class: "legend" }, ...panel.series.map(([, label], i) => $("span", {}, $("i", { style: `background:${this.colour(i)}` }), `${label} `, this.values[i])));
      this.svg = svg("svg", { height: HEIGHT, role: "img", "aria-label": panel.title });
      this.node = $("figure", { class: "panel" }, title, ...(panel.note ? [$("p", { class: "note" }, panel.note)] : []), legend, this.svg);
      home.append(this.node);
      this.points = panel.series.map(([key]) => metrics.filter(m => isNumber(m[key])).map(m => [m.step, m[key]]));
      this.svg.addEventListener("pointermove", e => point(this.stepAt(e)));
      this.svg.addEventListener("pointerleave", () => point(null));
      charts.push(this);
    }
    stepAt(event) {
      const box = this.svg.getBoundingClientRect(), share = (event.clientX - box.left - PAD.left) / (this.width - PAD.left - PAD.right);
      const wanted = first + share * (last - first);
      return steps.reduce((best, s) => Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best);
    }
    draw() {
      this.width = this.svg.clientWidth || 360;
      const right = this.width - PAD.right, bottom = HEIGHT - PAD.bottom, { panel } = this;
      const rows = panel.kind === "stack" ? this.stacked() : this.points, [low, high] = range(panel, rows);
      this.x = s => last === first ? (PAD.left + right) / 2 : PAD.left + (s - first) / (last - first) * (right - PAD.left);
      const scale = v => panel.log ? Math.log10(v) : v;
      this.y = v => bottom - (Math.min(Math.max(scale(v), low), high) - low) / (high - low) * (bottom - PAD.top);
      this.svg.replaceChildren();
      const ticks = panel.log ? Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((_, i, all) => i % Math.ceil(all.length / 4) === 0) : niceTicks(low, high, 4);
      for (const t of ticks) {
        const at = this.y(panel.log ? 10 ** t : t);
        this.svg.append(svg("line", { x1: PAD.left, x2: right, y1: at, y2: at, class: "grid" }),
          svg("text", { x: PAD.left - 7, y: at + 3.5, "text-anchor": "end" }, panel.log ? `1e${t}` : tickLabel(t)));
      }
      const across = first === last ? [first] : niceTicks(first, last, 5).filter(Number.isInteger);
      for (const s of across) this.svg.append(svg("text", { x: this.x(s), y: HEIGHT - 6, "text-anchor": "middle" }, s.toLocaleString("en-US")));
      if (panel.kind === "stack") this.drawStack(rows); else rows.forEach((row, i) => this.drawLine(panel.log ? row.filter(p => p[1] > 0) : row, i));
      this.cursor = svg("line", { y1: PAD.top, y2: bottom, class: "cursor", visibility: "hidden" });
      this.mark = svg("text", { y: PAD.top + 3 });
      this.svg.append(this.cursor, this.mark, svg("rect", { x: 0, y: 0, width: this.width, height: HEIGHT, fill: "transparent" }));
      this.tell(null);
    }
    path(row) { return row.map(([s, v], i) => `${i ? "L" : "M"}${this.x(s).toFixed(1)},${this.y(v).toFixed(1)}`).join(""); }
    drawLine(row, i) {
      const stroke = this.colour(i), rare = this.panel.kind === "points", weight = rare || row.length < 8 ? 0 : +slider.value;
      const line = (points, attributes) => this.svg.append(svg("path", { d: this.path(points), fill: "none", stroke, "stroke-linejoin": "round", ...attributes }));
      if (weight) line(row, { "stroke-width": 1, opacity: 0.28 });
      line(weight ? smoothed(row, weight) : row, { "stroke-width": 1.7 });
      if (rare || row.length < 8) for (const [s, v] of row) this.svg.append(svg("circle", { cx: this.x(s), cy: this.y(v), r: 2.6, fill: stroke }));
    }
    stacked() {  // each row is the sum up to and including its series, a missing value counting nothing
      const seen = metrics.filter(m => this.panel.series.some(([key]) => isNumber(m[key]))), sums = seen.map(() => 0);
      return this.panel.series.map(([key]) => seen.map((m, j) => [m.step, sums[j] += m[key] ?? 0]));
    }
    drawStack(rows) {
      if (rows[0].length < 8) {
        const wide = Math.max(4, Math.min(26, 0.6 * (this.width - PAD.left) / (last - first + 1)));
        rows.forEach((row, i) => row.forEach(([s, v], j) => { const base = i ? rows[i - 1][j][1] : 0;
          this.svg.append(svg("rect", { x: this.x(s) - wide / 2, y: this.y(v), width: wide, height: this.y(base) - this.y(v), fill: this.colour(i), opacity: 0.85 })); }));
        return;
      }
      rows.forEach((row, i) => {
        const base = i ? rows[i - 1] : row.map(([s]) => [s, 0]);
        this.svg.append(svg("path", { d: `${this.path(row)}${this.path([...base].reverse()).replace("M", "L")}Z`, fill: this.colour(i), opacity: 0.75 }));
      });
    }
    tell(step) {  // the values at a step in the legend; without one, the latest
      this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
      this.mark.textContent = step === null ? "" : `step ${step.toLocaleString("en-US")}`;
      if (step !== null) {
        const at = this.x(step), late = at > this.width / 2;
        this.cursor.setAttribute("x1", at);
        this.cursor.setAttribute("x2", at);
        this.mark.setAttribute("x", late ? at - 5 : at + 5);
        this.mark.setAttribute("text-anchor", late ? "end" : "start");
      }
      this.points.forEach((row, i) => {
        const at = step === null ? row.at(-1) : row.find(p => p[0] === step);
        this.values[i].textContent = at ? compact(at[1]) : "–";
      });
    }
  }
  const point = step => charts.forEach(c => c.cursor && c.tell(step));
  const build = (list, home) => list.forEach(panel => new Chart(panel, home));
  build(panels.main, document.getElementById("main-panels"));
  const draw = () => charts.forEach(c => c.svg.clientWidth && c.draw());
  const more = document.getElementById("more");
  if (more) { build(panels.more, document.getElementById("more-panels")); more.addEventListener("toggle", draw); }
  slider.addEventListener("input", draw);
  addEventListener("resize", draw);
  draw();
})();
