// Misses, pins, tenants and clients.

import { byId, make, reconcile, setAttribute, setText } from "./dom.js";
import { ago, bytes, clock, count, hitRate, percent, seconds } from "./format.js";

const REASONS = {
  never_stored: "never stored",
  evicted: "evicted",
  expired: "expired",
  deleted: "deleted",
  lost: "lost",
  detached: "tier detached",
  tier_down: "tier down",
  no_state: "no state",
  not_worth: "not worth it",
  below_minimum: "too little",
  other_namespace: "other namespace",
};

const say = (reason) => REASONS[reason] ?? reason.replaceAll("_", " ");

function cells(...classes) {
  return make("tr", {}, ...classes.map((name) => make("td", { class: name })));
}

function fill(row, ...texts) {
  texts.forEach((text, index) => setText(row.children[index], text));
}

function nothing(body, isEmpty, text, columns) {
  const known = body.querySelector("tr.note");
  if (!isEmpty) known?.remove();
  else if (!known) body.replaceChildren(make("tr", { class: "note" }, make("td", { colspan: columns, text })));
}

export class Misses {
  constructor() {
    this.reason = "";
    this.now = null;
    byId("reasons").addEventListener("click", (event) => {
      const chip = event.target.closest("button");
      if (!chip) return;
      this.reason = this.reason === chip.dataset.key ? "" : chip.dataset.key;
      this.show(this.now);
    });
  }

  show(now) {
    this.now = now;
    const reasons = Object.entries(now.reasons).sort((one, other) => other[1] - one[1]);
    if (this.reason && !(this.reason in now.reasons)) this.reason = "";
    reconcile(byId("reasons"), reasons, ([reason]) => reason,
      ([reason]) => make("button", { type: "button", class: `chip ${reason}` }, make("span", { text: say(reason) }), make("b")),
      (element, [reason, number]) => {
        setText(element.lastChild, count(number));
        setAttribute(element, "aria-pressed", this.reason === reason);
      });
    const body = byId("misses").tBodies[0];
    const misses = now.misses.filter((miss) => !this.reason || miss.reason === this.reason);
    nothing(body, !misses.length, "No lookup fell short lately.", 6);
    if (!misses.length) return;
    const several = new Set(now.namespaces.map((one) => one.tenant)).size > 1;
    reconcile(body, misses, (miss) => `${miss.at} ${miss.hash} ${miss.prompt_tokens}`,
      () => {
        const row = cells("when", "why", "num", "num", "grow", "whose");
        row.children[1].append(make("span", { class: "badge" }));
        return row;
      },
      (row, miss) => {
        setText(row.children[0], clock(miss.at));
        row.children[1].firstChild.className = `badge ${miss.reason}`;
        setText(row.children[1].firstChild, say(miss.reason));
        setText(row.children[2], count(miss.hit_tokens));
        setText(row.children[3], count(miss.prompt_tokens));
        setText(row.children[4], miss.text);
        setText(row.children[5], [several ? miss.tenant : "", miss.session].filter(Boolean).join(" · ") || "–");
        setAttribute(row, "title", miss.hash ? `block ${miss.block}, ${miss.hash}` : null);
      });
  }
}

// Bytes in all tiers below host memory.
function lower(used) {
  const total = Object.entries(used).reduce((sum, [tier, size]) => sum + (tier === "host" ? 0 : size), 0);
  return total ? bytes(total) : "–";
}

export function showTenants(now) {
  const body = byId("tenants").tBodies[0];
  nothing(body, !now.tenants.length, "No tenant has stored anything yet.", 6);
  if (!now.tenants.length) return;
  reconcile(body, now.tenants, (row) => row.tenant, () => cells("", "num", "num roomy", "num", "num", "num"),
    (element, row) => fill(element, row.tenant, percent(hitRate(row.total)), count(row.total.prompt_tokens),
      seconds(row.total.ttft_saved_s), bytes(row.used_bytes.host), lower(row.used_bytes)));
}

// Who has how much kept, and until when at the latest.
export function showKept(now) {
  byId("kept-card").hidden = !now.kept.length;
  const several = now.tenants.length > 1;
  reconcile(byId("kept").tBodies[0], now.kept, (row) => `${row.tenant} ${row.namespace} ${row.salt} ${row.holder}`,
    () => cells("", "num", "num"),
    (element, row) => fill(element,
      [row.holder || "this process", several ? row.tenant : "", row.salt && `tenant ${row.salt}`].filter(Boolean).join(" · "),
      bytes(row.num_bytes), clock(row.until)));
}

export function showClients(now) {
  const body = byId("clients").tBodies[0];
  nothing(body, !now.clients.length, "No client is attached.", 6);
  setText(byId("client-note"), now.num_clients > now.clients.length ? `the ${now.clients.length} busiest of ${now.num_clients}` : "");
  if (!now.clients.length) return;
  const several = now.tenants.length > 1;
  reconcile(body, now.clients, (row) => `${row.client} ${row.attached_at}`, () => cells("", "num", "num", "num roomy", "num roomy", "num"),
    (element, row) => fill(element, several ? `${row.client} · ${row.tenant}` : row.client,
      row.prompt_tokens ? percent(row.hit_tokens / row.prompt_tokens) : "–", count(row.prompt_tokens), bytes(row.saved_bytes),
      String(row.leases), ago(now.at - row.seen_at)));
}

// Clients that make different prompts of the same conversation: a line for each namespace where there are such.
export function showRenderings(now) {
  const ways = new Map();
  for (const one of now.renderings) {
    const key = `${one.tenant}/${one.namespace}`;
    ways.set(key, [...(ways.get(key) ?? []), one]);
  }
  byId("renderings").hidden = !ways.size;
  reconcile(byId("renderings"), [...ways], ([key]) => key, () => make("p"), (element, [, found]) => {
    const model = now.namespaces.find((one) => one.tenant === found[0].tenant && one.id === found[0].namespace)?.model;
    const told = found.map((one) => {
      const more = one.num_clients - one.clients.length;
      return `${one.clients.join(", ")}${more > 0 ? ` and ${more} more` : ""} (${one.rendering.slice(0, 8)})`;
    });
    setText(element, `Clients${model ? ` of ${model}` : ""} render chats in ${found.length} ways: ${told.join("; ")}. They share no pages of `
      + "chats until they have the same chat template and the same version of what renders it.");
  });
}
