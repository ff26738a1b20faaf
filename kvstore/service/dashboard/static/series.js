// The samples the page has, as parallel columns that grow at their end and are cut at their beginning.

import { LOWER } from "./kinds.js";

const COLUMNS = ["prompt_tokens", "ttft_saved_s", "saved_bytes", "loaded_bytes"];
const BY_TIER = { hit_tokens: ["host", ...LOWER], fetched_bytes: LOWER, spilled_bytes: LOWER };
const GAP = 2.5; // steps without a sample that are shown as a gap

export class Series {
  constructor() {
    this.clear();
  }

  clear() {
    this.at = [];
    this.step = 1;
    this.columns = Object.fromEntries([...COLUMNS, ...Object.entries(BY_TIER).flatMap(([name, tiers]) => tiers.map((tier) => `${name}.${tier}`))]
      .map((name) => [name, []]));
  }

  get last() {
    return this.at.length ? this.at[this.at.length - 1] : 0;
  }

  // Append what is newer; a hole (the daemon was away) becomes a row of nulls, which charts leave open.
  add(answer, span) {
    this.step = answer.step_s;
    for (let row = 0; row < answer.at.length; row += 1) {
      const at = answer.at[row];
      if (at <= this.last + this.step / 100) continue;
      if (this.at.length && at - this.last > GAP * this.step) this.#push(this.last + this.step, () => null);
      this.#push(at, (name, tier) => (tier ? answer[name][tier][row] : answer[name][row]));
    }
    const first = this.at.findIndex((at) => at >= this.last - span);
    if (first > 0) {
      this.at.splice(0, first);
      for (const column of Object.values(this.columns)) column.splice(0, first);
    }
  }

  // Means over the `window` rows up to each; null where nothing is known.
  smooth(name, window) {
    const column = this.columns[name];
    const out = new Array(column.length);
    let total = 0;
    let known = 0;
    for (let row = 0; row < column.length; row += 1) {
      if (column[row] !== null) { total += column[row]; known += 1; }
      const gone = row >= window ? column[row - window] : null;
      if (gone !== null) { total -= gone; known -= 1; }
      out[row] = column[row] === null || !known ? null : Math.max(0, total / known);
    }
    return out;
  }

  #push(at, value) {
    this.at.push(at);
    for (const [key, column] of Object.entries(this.columns)) {
      const [name, tier] = key.split(".");
      column.push(value(name, tier));
    }
  }
}
