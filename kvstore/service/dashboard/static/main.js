// The page: asks the daemon once a second while it is looked at, and shows what it answers.

import { get, hasToken, setToken, TokenNeeded } from "./api.js";
import { Beliefs } from "./beliefs.js";
import { FlowChart, HitChart, Spark } from "./charts.js";
import { byId, make, reconcile, segments, setAttribute, setText } from "./dom.js";
import { count, hitRate, percent, seconds, sum } from "./format.js";
import { Prefixes } from "./prefixes.js";
import { Series } from "./series.js";
import { Misses, showClients, showKept, showRenderings, showTenants } from "./tables.js";
import { showHealth, showTiers } from "./tiers.js";

const PERIOD_MS = 1000;
const MAX_WAIT_MS = 5000;
// Samples that a point of a chart is taken over, where samples are seconds, for each five minutes that are shown.
const HIT_WINDOW = 15;
const FLOW_WINDOW = 3;
const FINE_S = 900;

const state = { span: 300, shown: "", failures: 0, timer: 0, startedAt: 0, ticks: 0, seenAt: 0 };
const series = new Series();
const hits = new HitChart(byId("hit-chart"), byId("hit-legend"));
const flows = new FlowChart(byId("flow-chart"), byId("flow-legend"));
const ttftSpark = new Spark(byId("ttft-spark"));
const tokensSpark = new Spark(byId("tokens-spark"));
const prefixes = new Prefixes();
const misses = new Misses();
const beliefs = new Beliefs();

// ---- asking

async function tick() {
  clearTimeout(state.timer);
  if (document.hidden || byId("login").open) return; // goes on with visibilitychange, or the token
  try {
    const began = state.shown + state.span;
    const [now, told] = await Promise.all([
      get("/v1/dashboard/now", chosen()),
      get("/v1/dashboard/series", { ...chosen(), span_s: state.span, since: series.last || "" }),
    ]);
    if (state.ticks % 2 === 0) await prefixes.refresh();
    await beliefs.refresh(chosen(), (place) => prefixes.names.get(place) ?? "");
    if (began !== state.shown + state.span) return; // what was chosen meanwhile is on its way
    state.ticks += 1;
    state.failures = 0;
    state.seenAt = Date.now();
    series.add(told, state.span);
    show(now);
  } catch (error) {
    if (error instanceof TokenNeeded) return askToken();
    if (error.status === 404 && state.shown) return choose("");
    state.failures += 1;
    away(error);
  }
  state.timer = setTimeout(tick, state.failures ? Math.min(MAX_WAIT_MS, PERIOD_MS * state.failures) : PERIOD_MS);
  return undefined;
}

function again() {
  state.ticks = 0;
  tick();
}

// A namespace is chosen as "tenant/id": two tenants may use the same one, each with a store of its own.
function chosen() {
  const [tenant, namespace] = state.shown.split("/");
  return state.shown ? { tenant, namespace } : {};
}

function choose(shown) {
  state.shown = shown;
  byId("namespace").value = shown;
  series.clear();
  prefixes.reset(chosen());
  beliefs.reset();
  again();
}

function askToken() {
  setText(byId("login-error"), hasToken() ? "The daemon does not know this token." : "");
  setToken("");
  byId("token").value = "";
  if (!byId("login").open) byId("login").showModal();
}

// ---- showing

function away(error) {
  const banner = byId("away");
  const since = state.seenAt ? ` What you see is from ${seconds((Date.now() - state.seenAt) / 1000)} ago.` : "";
  // A daemon that answers with an error is there; one that does not answer is not.
  setText(banner, error.status
    ? `The daemon answers with an error: ${error.message}.${since}`
    : `The daemon is away.${since} The page goes on by itself when it is back.`);
  banner.hidden = false;
  setStatus("away", "away");
  document.body.classList.add("stale");
}

function setStatus(kind, text) {
  byId("status").className = `pill ${kind}`;
  setText(byId("status"), text);
}

function show(now) {
  byId("away").hidden = true;
  document.body.classList.remove("stale");
  setStatus(now.status === "ready" ? "live" : "away", now.status === "ready" ? "live" : now.status);
  setText(byId("node"), now.node);
  setText(byId("version"), `kvstore${now.version === "0" ? "" : ` ${now.version}`}, up ${seconds(now.at - now.started_at)}${now.is_operator ? "" : `, tenant ${now.tenant}`}`);
  document.title = `${percent(hitRate(now.recent))} · kvstore ${now.node}`;
  showNamespaces(now);
  showEmpty(now);
  showNumbers(now);
  showRenderings(now);
  showHealth(now);
  showTiers(now);
  misses.show(now);
  const tiers = now.tiers.map((tier) => tier.tier);
  hits.only(tiers);
  flows.only(tiers);
  showKept(now);
  showTenants(now);
  showClients(now);
  const isFine = state.span <= FINE_S;
  const window = (samples) => (isFine ? (samples * state.span) / 300 : 1);
  hits.update(series, state.span, window(HIT_WINDOW));
  setText(byId("hit-window"), isFine ? `, over ${window(HIT_WINDOW)} seconds` : ", by the minute");
  flows.update(series, state.span, window(FLOW_WINDOW));
  ttftSpark.update(series.smooth("ttft_saved_s", isFine ? 5 : 1));
  tokensSpark.update(series.smooth("prompt_tokens", isFine ? 5 : 1));
}

function showNamespaces(now) {
  const rows = [{ id: "", text: "All namespaces" },
    ...now.namespaces.map((one) => ({ id: `${one.tenant}/${one.id}`, text: nameOf(one, now.namespaces) }))];
  reconcile(byId("namespace"), rows, (row) => row.id, (row) => make("option", { value: row.id }), (element, row) => setText(element, row.text));
  byId("namespace").closest("label").hidden = now.namespaces.length < 2;
  prefixes.names = new Map(now.namespaces.length < 2 ? [] : now.namespaces.map((one) => [`${one.tenant}/${one.id}`, nameOf(one, now.namespaces)]));
}

// As little as tells it from the others.
function nameOf(one, all) {
  const parts = [one.model.split("/").pop() + (one.adapter ? ` + ${one.adapter}` : "")];
  if (all.some((other) => other.dtype !== one.dtype)) parts.push(one.dtype);
  return (all.some((other) => other.tenant !== one.tenant) ? `${one.tenant}: ` : "") + parts.join(" · ");
}

function showEmpty(now) {
  byId("empty").hidden = now.total.lookups > 0;
  if (now.total.lookups > 0) return;
  setText(byId("empty-text"), now.num_clients
    ? `${now.num_clients} ${now.num_clients === 1 ? "client is" : "clients are"} attached; as soon as one asks for a prompt, this page fills by itself.`
    : "The daemon is up, and no engine is attached to it yet. This page fills by itself as soon as one is.");
  setText(byId("attach"), `KVSTORE_SERVICE__URL=${location.origin} python engine.py`);
  setText(byId("top"), `kvstore top ${location.origin}`);
}

function showNumbers(now) {
  const { recent, total } = now;
  const isQuiet = recent.prompt_tokens === 0;
  const use = isQuiet ? total : recent;
  setText(byId("hit-rate"), percent(hitRate(use)));
  const prompt = Math.max(use.prompt_tokens, sum(use.hit_tokens));
  const parts = Object.entries(use.hit_tokens).map(([tier, tokens]) => [tier, prompt ? tokens / prompt : 0, `${tier} ${percent(prompt ? tokens / prompt : null)}`]);
  segments(byId("hit-stack"), parts);
  setAttribute(byId("hit-stack"), "aria-label", parts.map((part) => part[2]).join(", "));
  setText(byId("hit-note"), total.prompt_tokens === 0 ? "no lookups yet"
    : isQuiet ? `since the start; nothing was asked in the last minute`
      : `of the last minute's prompt tokens; ${percent(hitRate(total))} since the start`);

  const told = now.namespaces.some((one) => one.prefill_tokens_per_s);
  setText(byId("ttft"), told || total.ttft_saved_s ? seconds(total.ttft_saved_s) : "–");
  setText(byId("ttft-note"), told || total.ttft_saved_s
    ? `since the start; ${seconds(recent.ttft_saved_s)} in the last minute`
    : "known once an engine tells its prefill rate");

  const rate = recent.span_s ? recent.prompt_tokens / recent.span_s : 0;
  setText(byId("tokens"), `${count(rate)}/s`);
  setText(byId("tokens-note"), `${count(recent.lookups)} lookups in the last minute; ${count(total.prompt_tokens)} tokens since the start`);
}

// ---- what a visitor does

for (const input of document.querySelectorAll("#range input")) {
  input.addEventListener("change", () => {
    state.span = Number(input.value);
    series.clear();
    again();
  });
}
byId("namespace").addEventListener("change", (event) => choose(event.target.value));
byId("login").addEventListener("cancel", (event) => event.preventDefault());
byId("login").addEventListener("close", () => {
  setToken(byId("token").value.trim());
  again();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) again();
});
tick();
