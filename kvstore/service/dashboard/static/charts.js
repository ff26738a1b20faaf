// The two charts over time, drawn by uPlot (window.uPlot), in the colours of the style sheet.

import { make, reconcile, setText } from "./dom.js";
import { bytes, percent } from "./format.js";
import { LOWER } from "./kinds.js";

export const TIERS = ["host", ...LOWER];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const POWERS = Array.from({ length: 60 }, (_, power) => 2 ** power);

function axes(format, size, incrs) {
  const line = { stroke: colour("--line"), width: 1 };
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return [
    { stroke: colour("--quiet"), grid: { show: false }, ticks: { ...line, size: 4 }, font, size: 30, space: 72, values: times },
    { stroke: colour("--quiet"), grid: line, ticks: { show: false }, font, size, space: 40, values: (_, ticks) => ticks.map(format), ...(incrs && { incrs }) },
  ];
}

function times(plot, ticks) {
  const isLong = ticks.length > 1 && ticks[1] - ticks[0] >= 60;
  return ticks.map((at) => new Date(at * 1000).toLocaleTimeString([], isLong
    ? { hour: "2-digit", minute: "2-digit", hour12: false }
    : { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false }));
}

// What both have in common: size, theme, legend with the values under the cursor or the last ones.
class Chart {
  constructor(element, legend, names) {
    this.element = element;
    this.all = names;
    this.names = names;
    this.legend = legend;
    this.plot = null;
    this.data = null;
    this.span = 300;
    new ResizeObserver(() => this.#resize()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#rebuild());
  }

  show(data, span) {
    this.data = data;
    this.span = span;
    if (!this.plot) this.#rebuild();
    else this.plot.setData(data);
    this.tell();
  }

  // Names of tiers that nobody has configured would only say that they are at zero.
  only(tiers) {
    this.names = this.all.filter((name) => !TIERS.includes(name.id) || tiers.includes(name.id));
    this.tell();
  }

  tell() {
    const index = this.plot?.cursor.idx ?? (this.data ? this.data[0].length - 1 : -1);
    reconcile(this.legend, this.names, (name) => name.id,
      (name) => make("span", { class: `key ${name.swatch}` }, make("span", { text: name.text }), make("b")),
      (element, name) => setText(element.lastChild, index >= 0 ? this.value(name, index) : ""));
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!this.plot) this.#rebuild();
    else if (width && (width !== this.plot.width || height !== this.plot.height)) this.plot.setSize({ width, height });
  }

  #rebuild() {
    this.plot?.destroy();
    this.plot = null;
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!this.data || !width) return;
    this.plot = new window.uPlot({
      width,
      height,
      padding: [8, 24, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      hooks: { setCursor: [() => this.plot && this.tell()] },
      ...this.options(),
    }, this.data, this.element);
  }

  // The newest sample is at the right edge, however few there are.
  x() {
    return { time: true, range: (_, first, last) => (last === null ? [0, 1] : [last - this.span, last]) };
  }
}

// Stacked areas: from the bottom what host memory gave, then what each tier below it gave.
export class HitChart extends Chart {
  constructor(element, legend) {
    super(element, legend, TIERS.map((tier) => ({ id: tier, text: tier, swatch: tier })));
  }

  update(series, span, window) {
    const prompts = series.smooth("prompt_tokens", window);
    const hits = TIERS.map((tier) => series.smooth(`hit_tokens.${tier}`, window));
    this.shares = hits.map((column) => column.map((value, row) => {
      if (prompts[row] === null || value === null) return null;
      const total = hits.reduce((all, one) => all + one[row], 0);
      // A load is counted when it ends, its prompt when it is looked up: over seconds there may be more of the one.
      return prompts[row] > 0 ? (100 * value) / Math.max(prompts[row], total) : null;
    }));
    const stacked = [];
    this.shares.forEach((column, index) => {
      stacked.push(column.map((value, row) => (value === null ? null : value + (index ? stacked[index - 1][row] : 0))));
    });
    // The tallest is drawn first, so that the others lie before it.
    this.show([series.at, ...stacked.reverse()], span);
  }

  value(name, row) {
    const share = this.shares[TIERS.indexOf(name.id)][row];
    return share === null || share === undefined ? "–" : percent(share / 100);
  }

  options() {
    const area = (tier) => ({
      stroke: colour(`--${tier}`), fill: colour(`--${tier}-area`), width: 1.5, points: { show: false }, spanGaps: false,
    });
    return {
      scales: { x: this.x(), y: { range: [0, 100] } },
      series: [{}, ...[...TIERS].reverse().map(area)],
      axes: axes((value) => `${value} %`, 52),
    };
  }
}

const WAYS = [
  { id: "engines", text: "engines", swatch: "engines", into: "saved_bytes", out: "loaded_bytes" },
  ...LOWER.map((tier) => ({ id: tier, text: tier, swatch: tier, into: `fetched_bytes.${tier}`, out: `spilled_bytes.${tier}` })),
];

// Lines: above zero what comes into host memory, below it what goes out.
export class FlowChart extends Chart {
  constructor(element, legend) {
    super(element, legend, WAYS);
  }

  update(series, span, window) {
    const into = WAYS.map((way) => series.smooth(way.into, window));
    const out = WAYS.map((way) => series.smooth(way.out, window).map((value) => (value === null ? null : -value)));
    this.show([series.at, ...into, ...out], span);
  }

  value(way, row) {
    const index = WAYS.indexOf(way) + 1;
    const [into, out] = [this.data[index][row], this.data[index + WAYS.length][row]];
    return into === null || into === undefined ? "–" : `↑${bytes(into)} ↓${bytes(-out)}`;
  }

  options() {
    const line = (way) => ({
      // Areas lie over each other here: a fifth of the colour lets the others through.
      stroke: colour(`--${way.swatch}`), fill: `${colour(`--${way.swatch}`)}30`, width: 1.5, points: { show: false },
    });
    return {
      scales: { x: this.x(), y: { range: (_, low, high) => {
        const most = Math.max(1024, -low, high);
        const step = 2 ** Math.ceil(Math.log2(most) - 1.9);
        const top = step * Math.ceil(most / step);
        return [-top, top];
      } } },
      series: [{}, ...WAYS.map(line), ...WAYS.map(line)],
      axes: axes((value) => (value ? bytes(Math.abs(value)) : "0"), 68, POWERS),
    };
  }
}

// A line without axes, as wide as its place.
export class Spark {
  constructor(element) {
    this.element = element;
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.append(this.path);
    element.append(this.svg);
  }

  update(values) {
    const known = values.slice(-240);
    const most = Math.max(...known.map((value) => value ?? 0), 1e-9);
    this.svg.setAttribute("viewBox", `0 0 ${Math.max(1, known.length - 1)} 100`);
    let path = "";
    known.forEach((value, index) => {
      if (value !== null) path += `${path && known[index - 1] !== null ? "L" : "M"}${index} ${(97 - (94 * value) / most).toFixed(1)}`;
    });
    this.path.setAttribute("d", path);
  }
}
