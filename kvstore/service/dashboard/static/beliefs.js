// What the policies believe: for each class of blocks, the chance of a next use by its time.

import { get } from "./api.js";
import { byId, make, reconcile, segments, setText } from "./dom.js";
import { count, percent, seconds } from "./format.js";

const EVERY = 10; // ticks of the page between two looks

export class Beliefs {
  constructor() {
    this.card = byId("beliefs-card");
    this.ticks = 0;
  }

  reset() {
    this.ticks = 0;
  }

  async refresh(shown, nameOf) {
    this.ticks += 1;
    if (this.ticks % EVERY !== 1) return;
    const answer = await get("/v1/dashboard/policies", shown);
    const learning = answer.policies.filter((one) => one.learns);
    this.card.hidden = !learning.length;
    const still = answer.policies.filter((one) => !one.learns).map((one) => `${one.tier}: ${one.policy}`);
    setText(byId("beliefs-note"), still.length ? `${[...new Set(still)].join(", ")} learns nothing` : "");
    reconcile(byId("beliefs"), learning, (one) => `${one.tenant}/${one.namespace}/${one.tier}`, makePolicy,
      (element, one) => updatePolicy(element, one, nameOf(`${one.tenant}/${one.namespace}`), answer.spans_s));
  }
}

function makePolicy() {
  const heads = ["Blocks", "Next use", "1 min", "5 min", "1 h", "Mean", "Seen"];
  const classes = ["", "curve", "num", "num", "num", "num roomy", "num roomy"];
  return make("section", { class: "policy" }, make("h3", { class: "sub" }),
    make("div", { class: "scroll capped", tabindex: 0, role: "region" },
      make("table", { class: "beliefs" },
        make("thead", {}, make("tr", {}, ...heads.map((text, at) => make("th", { scope: "col", class: classes[at], text })))),
        make("tbody"))));
}

function updatePolicy(element, one, name, spans) {
  const [title, region] = element.children;
  const cut = one.num_classes > one.classes.length ? `; the ${one.classes.length} seen most of ${count(one.num_classes)} classes` : "";
  setText(title, `${one.policy} of ${one.tier}${name ? `, ${name}` : ""}${one.num_classes ? cut : ": nothing was seen yet"}`);
  region.hidden = !one.num_classes;
  region.setAttribute("aria-label", title.textContent);
  reconcile(region.firstChild.tBodies[0], one.classes, (belief) => belief.words.join("\n"), makeBelief,
    (row, belief) => updateBelief(row, belief, spans));
}

function makeBelief() {
  const row = make("tr", {}, ...["class", "curve", "num", "num", "num", "num roomy", "num roomy"].map((name) => make("td", { class: name })));
  row.children[0].append(make("span", { class: "indent" }));
  row.children[1].append(make("div", { class: "stack", role: "img" }));
  return row;
}

function updateBelief(row, belief, spans) {
  const [words, curve, ...numbers] = row.children;
  words.firstChild.style.setProperty("--depth", belief.words.length);
  setText(words.firstChild, belief.words.length ? belief.words.at(-1) : "all blocks");
  words.title = belief.words.join(", ");
  let before = 0;
  segments(curve.firstChild, belief.within.map((share, at) => {
    const part = [`soon soon-${at}`, share - before, `${percent(share)} within ${seconds(spans[at])}`];
    before = share;
    return part;
  }));
  curve.firstChild.setAttribute("aria-label", belief.within.map((share, at) => `${percent(share)} within ${seconds(spans[at])}`).join(", "));
  const texts = [...belief.within.map(percent), belief.mean_s === null ? "–" : seconds(belief.mean_s), count(belief.seen)];
  texts.forEach((text, at) => setText(numbers[at], text));
}
