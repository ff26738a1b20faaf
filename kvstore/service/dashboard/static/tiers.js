// The map: engines, host memory, and the tiers below it, with what lies in each and what flows between them.

import { byId, make, reconcile, segments, setAttribute, setText } from "./dom.js";
import { ago, bytes, count, percent, seconds } from "./format.js";

const NAMES = { engines: "Engines", host: "Host memory" }; // a lower tier has the name that its package gives it
const FULL = 1 << 30; // bytes per second that are drawn as the thickest line

export function showTiers(now) {
  const rows = [{ kind: "place", id: "engines", now }];
  const [host, ...lower] = now.tiers;
  for (const level of [host ? [host] : [], lower]) {
    rows.push(...level.map((tier) => ({ kind: "flow", id: tier.tier, now })));
    rows.push(...level.map((tier) => ({ kind: "place", id: tier.tier, tier, now })));
  }
  byId("tiers").classList.toggle("split", lower.length > 1);
  reconcile(byId("tiers"), rows, (row) => `${row.kind} ${row.id}`,
    (row) => (row.kind === "flow" ? makeFlow(row.id) : makePlace(row.id)),
    (element, row) => (row.kind === "flow" ? updateFlow(element, row) : updatePlace(element, row)));
}

function makePlace(id) {
  return make("div", { class: `place ${id}` },
    make("div", { class: "head" }, make("b", { text: NAMES[id] ?? id[0].toUpperCase() + id.slice(1) }), make("span", { class: "state" })),
    make("div", { class: "stack", role: "img" }),
    make("div", { class: "quiet facts" }));
}

function updatePlace(element, { id, tier, now }) {
  const [head, bar, facts] = element.children;
  if (id === "engines") {
    bar.hidden = true;
    setText(head.lastChild, now.num_clients === 1 ? "1 attached" : `${now.num_clients} attached`);
    const rate = Math.max(0, ...now.namespaces.map((one) => one.prefill_tokens_per_s ?? 0));
    setText(facts, rate ? `prefill ${Math.round(rate).toLocaleString("en")} tokens/s` : "prefill rate not told yet");
    return;
  }
  element.classList.toggle("down", !tier.is_up);
  setText(head.lastChild, tier.is_up
    ? (tier.capacity_bytes ? percent(tier.used_bytes / tier.capacity_bytes) : bytes(tier.used_bytes))
    : `down for ${seconds(now.at - tier.since)}`);
  const parts = [];
  bar.hidden = tier.capacity_bytes === null;
  if (tier.capacity_bytes) {
    const share = (size) => size / tier.capacity_bytes;
    const dirty = id === "host" ? Math.min(tier.waiting_bytes, tier.used_bytes) : 0;
    parts.push([`${id} clean`, share(tier.used_bytes - dirty), `${bytes(tier.used_bytes - dirty)} clean`]);
    if (dirty) parts.push([`${id} dirty`, share(dirty), `${bytes(dirty)} not yet below`]);
    if (tier.filling_bytes) parts.push(["filling", share(tier.filling_bytes), `${bytes(tier.filling_bytes)} being filled`]);
  }
  segments(bar, parts);
  const told = [];
  if (tier.capacity_bytes) {
    told.push(`${bytes(tier.used_bytes)} of ${bytes(tier.capacity_bytes)}`);
    told.push(`${bytes(tier.free_bytes ?? Math.max(0, tier.capacity_bytes - tier.used_bytes))} free`);
  } else {
    told.push("as far as is known here; it evicts by itself");
  }
  if (id === "host" && tier.pinned_bytes) told.push(`${bytes(tier.pinned_bytes)} in use`);
  if (tier.waiting_bytes) told.push(id === "host" ? `${bytes(tier.waiting_bytes)} dirty` : `${bytes(tier.waiting_bytes)} owed to it`);
  if (tier.queued) told.push(tier.queued === 1 ? "1 batch queued" : `${tier.queued} batches queued`);
  if (tier.latency_s) told.push(`answers in ${tier.latency_s < 0.001 ? `${(tier.latency_s * 1e6).toFixed(0)} µs` : seconds(tier.latency_s)}`);
  if (tier.budget) told.push(budget(tier.budget));
  if (tier.lost_pages) told.push(`${count(tier.lost_pages)} ${tier.lost_pages === 1 ? "page" : "pages"} left host memory before it was written here`);
  told.push(...refused(tier));
  setText(facts, told.join(" · "));
  setAttribute(bar, "aria-label", told.join(", "));
}

// The bytes that may be written to a tier in a day.
function budget({ bytes_per_day: perDay, left_bytes: left, num_spent: spent, is_spent: isSpent }) {
  const times = spent ? `, spent ${spent === 1 ? "once" : `${count(spent)} times`}` : "";
  return isSpent ? `write budget of ${bytes(perDay)} a day is spent${times}` : `may write ${bytes(Math.max(0, left))} now, ${bytes(perDay)} a day${times}`;
}

// What a tier that is up does not do, and its own words for why.
function refused(tier) {
  if (!tier.is_up) return [];
  return Object.entries(tier.left_out).map(([way, why]) => `${way} left out${why ? `: ${why}` : ""}`);
}

function makeFlow(id) {
  const arrow = (way) => make("div", { class: `arrow ${way}` }, make("i", { "aria-hidden": "true" }), make("span"));
  return make("div", { class: `flow ${id}` }, arrow("down"), arrow("up"));
}

// Between host memory and the engines, or between a lower tier and host memory.
function updateFlow(element, { id, now }) {
  const [above, below] = id === "host" ? ["engines", "host"] : ["host", id];
  const rate = (source, target) => now.flows.find((flow) => flow.source === source && flow.target === target)?.bytes_per_s ?? 0;
  const verbs = id === "host" ? ["saved", "loaded"] : ["written", "fetched"];
  [[above, below], [below, above]].forEach(([source, target], index) => {
    const arrow = element.children[index];
    const speed = rate(source, target);
    arrow.classList.toggle("flowing", speed > 0);
    arrow.style.setProperty("--strength", speed ? Math.max(0.15, Math.min(1, Math.log2(1 + speed) / Math.log2(FULL))) : 0);
    setText(arrow.lastChild, `${verbs[index]} ${bytes(speed)}/s`);
  });
}

export function showHealth(now) {
  const down = now.tiers.filter((tier) => !tier.is_up);
  const partly = now.tiers.filter((tier) => tier.is_up && Object.keys(tier.left_out).length);
  setText(byId("health"), down.length ? `${down.length} down` : partly.length ? `${partly.length} in part`
    : now.tiers.length ? "All up" : "–");
  byId("health").classList.toggle("bad", down.length + partly.length > 0);
  reconcile(byId("lamps"), now.tiers, (tier) => tier.tier, () => make("li", {}, make("i", { "aria-hidden": "true" }), make("span")),
    (element, tier) => {
      const ways = Object.keys(tier.left_out);
      element.className = tier.is_up && !ways.length ? "up" : "down";
      setText(element.lastChild, !tier.is_up ? `${tier.tier} down` : ways.length ? `${tier.tier}: no ${ways.join(", ")}` : tier.tier);
    });
  const opened = now.tiers.reduce((total, tier) => total + tier.num_opened, 0);
  setText(byId("health-note"), down.length
    ? `${down[0].tier} is left out for ${seconds(now.at - down[0].since)}; requests go on without it`
    : partly.length ? `${partly[0].tier}: ${refused(partly[0])[0]}`
    : opened ? `breakers opened ${opened} ${opened === 1 ? "time" : "times"} since the start` : "no breaker has opened");
  const several = new Set(now.namespaces.map((one) => one.tenant)).size > 1;
  const rows = now.incidents.slice(0, 5).map((one) => ({
    key: `${one.at} ${one.tenant} ${one.namespace} ${one.tier} ${one.direction}`, isUp: one.is_up,
    text: `${one.tier}${one.direction === "read" ? "" : ` (${one.direction})`} ${one.is_up ? "came back" : "was taken out"}${several ? ` (${one.tenant})` : ""}`, ago: now.at - one.at,
  }));
  if (!rows.length) rows.push({ key: "none", isUp: true, text: "Nothing went down since the daemon started", ago: null });
  reconcile(byId("incidents"), rows, (row) => row.key,
    () => make("li", {}, make("i", { "aria-hidden": "true" }), make("span"), make("time", { class: "quiet" })),
    (element, row) => {
      element.className = row.isUp ? "up" : "down";
      setText(element.children[1], row.text);
      setText(element.children[2], row.ago === null ? "" : row.ago < 1.5 ? "now" : `${ago(row.ago)} ago`);
    });
}
