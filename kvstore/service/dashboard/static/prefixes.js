// The stored prefixes as a tree: open branches are asked for together, every other second.

import { get } from "./api.js";
import { byId, make, reconcile, segments, setAttribute, setText } from "./dom.js";
import { ago, bytes, count, sum } from "./format.js";

const MAX_OPEN = 64;
const MAX_ROWS = 14; // what is seen without scrolling

export class Prefixes {
  constructor() {
    this.table = byId("prefixes");
    this.body = this.table.tBodies[0];
    this.open = new Set();
    this.levels = {};
    this.shown = {};
    this.names = new Map(); // "tenant/id" of a namespace -> its name, where there are several
    this.wasTouched = false;
    this.body.addEventListener("click", (event) => this.#click(event));
    this.body.addEventListener("keydown", (event) => this.#key(event));
  }

  reset(shown) {
    this.shown = shown;
    this.open.clear();
    this.levels = {};
    this.wasTouched = false;
  }

  async refresh() {
    const asked = [...this.open];
    const shown = this.shown;
    const answer = await get("/v1/dashboard/prefixes", { ...shown, open: asked.join(",") });
    if (shown !== this.shown) return undefined; // something else was chosen meanwhile
    for (const id of asked) if (!(id in answer.levels)) this.open.delete(id); // gone from the store
    // What was opened since it was asked is not in the answer: it stays as it was.
    const opened = [...this.open].filter((id) => !asked.includes(id) && id in this.levels);
    this.levels = { ...answer.levels, ...Object.fromEntries(opened.map((id) => [id, this.levels[id]])) };
    if (!this.wasTouched && !this.open.size) {
      // A visitor should see at once what most share and what continues it, as long as no other root is pushed away.
      const roots = this.levels[""]?.nodes ?? [];
      const first = roots.find((node) => node.branches > 1);
      if (first && roots.length + first.branches <= MAX_ROWS) {
        this.open.add(first.id);
        return this.refresh();
      }
    }
    this.#draw();
    const blocks = `${count(answer.num_blocks)} blocks stored`;
    setText(byId("prefix-note"), answer.is_cut ? `${blocks}; not all are shown` : blocks);
    return undefined;
  }

  #draw() {
    const rows = [];
    const roots = this.levels[""] ?? { nodes: [], more: 0 };
    this.most = Math.max(1, ...roots.nodes.map((node) => node.hits));
    const walk = (level, depth, path) => {
      level.nodes.forEach((node, index) => {
        const isOpen = this.open.has(node.id) && node.id in this.levels;
        rows.push({ id: `${path}${node.id}`, node, depth, isOpen, place: index + 1, of: level.nodes.length });
        if (isOpen) walk(this.levels[node.id], depth + 1, path);
      });
      if (level.more) rows.push({ id: `more ${path}${level.nodes[0]?.id}`, more: level.more, depth });
    };
    walk(roots, 1, "");
    if (!rows.length) rows.push({ id: "none", none: true, depth: 1 });
    reconcile(this.body, rows, (row) => row.id, (row) => (row.node ? makeRow(row) : make("tr", { class: "note" }, make("td", { colspan: 5 }))),
      (element, row) => (row.node ? this.#update(element, row) : setText(element.firstChild, noteOf(row))));
    for (const note of this.body.querySelectorAll("tr.note td")) note.style.setProperty("--depth", 1);
    if (!this.body.querySelector('tr[tabindex="0"]')) this.body.querySelector('tr[role="row"]')?.setAttribute("tabindex", "0");
  }

  #update(element, { node, depth, isOpen, place, of }) {
    element.style.setProperty("--depth", depth - 1);
    element.style.setProperty("--heat-share", node.hits / this.most);
    setAttribute(element, "aria-level", depth);
    setAttribute(element, "aria-posinset", place);
    setAttribute(element, "aria-setsize", of);
    setAttribute(element, "aria-expanded", node.branches ? isOpen : null);
    const [name, tokens, stored, hits, used] = element.children;
    const label = name.querySelector(".label");
    setText(label.children[0], node.id.slice(0, 10));
    const badge = label.children[1];
    badge.className = `badge ${node.branches > 1 ? "shared" : node.session ? "session" : ""}`;
    setText(badge, node.branches > 1 ? `shared by ${count(node.branches)}` : node.session || (node.is_shared ? "several sessions" : ""));
    badge.hidden = !badge.textContent;
    setText(label.children[2], depth === 1 ? this.names.get(`${node.tenant}/${node.namespace}`) ?? "" : "");
    setText(tokens.firstChild, count(node.tokens));
    setAttribute(tokens, "title", `${node.tokens.toLocaleString("en")} tokens, after ${node.depth_tokens.toLocaleString("en")}; ${node.deep_tokens.toLocaleString("en")} with all that continues it`);
    const size = sum(node.bytes);
    setText(stored.firstChild.firstChild, size ? bytes(size) : "nothing");
    segments(stored.firstChild.lastChild, Object.entries(node.bytes).map(([tier, held]) => [tier, held / size, `${bytes(held)} on ${tier}`]));
    setAttribute(stored, "title", Object.entries(node.bytes).map(([tier, held]) => `${tier} ${bytes(held)}`).join(", ") || null);
    setText(hits.firstChild, count(node.hits));
    setText(used, ago(node.used_s));
  }

  #toggle(row, open) {
    const id = row.dataset.key;
    if (!row.hasAttribute("aria-expanded")) return;
    this.wasTouched = true;
    if (open) {
      while (this.open.size >= MAX_OPEN) this.open.delete(this.open.values().next().value);
      this.open.add(id);
    } else {
      this.open.delete(id);
    }
    this.#draw();
    if (open) this.refresh().catch(() => {}); // the poll that follows tells what is wrong
  }

  #click(event) {
    const row = event.target.closest('tr[role="row"]');
    if (!row) return;
    this.#focus(row);
    this.#toggle(row, row.getAttribute("aria-expanded") === "false");
  }

  #focus(row) {
    for (const other of this.body.querySelectorAll('tr[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    row.setAttribute("tabindex", "0");
    row.focus();
  }

  #key(event) {
    const row = event.target.closest('tr[role="row"]');
    if (!row) return;
    const rows = [...this.body.querySelectorAll('tr[role="row"]')];
    const index = rows.indexOf(row);
    const level = Number(row.getAttribute("aria-level"));
    const isOpen = row.getAttribute("aria-expanded") === "true";
    let next = null;
    if (event.key === "ArrowDown") next = rows[index + 1];
    else if (event.key === "ArrowUp") next = rows[index - 1];
    else if (event.key === "Home") next = rows[0];
    else if (event.key === "End") next = rows[rows.length - 1];
    else if (event.key === "ArrowRight" && !isOpen) this.#toggle(row, true);
    else if (event.key === "ArrowRight") next = rows[index + 1];
    else if (event.key === "ArrowLeft" && isOpen) this.#toggle(row, false);
    else if (event.key === "ArrowLeft") next = rows.slice(0, index).reverse().find((one) => Number(one.getAttribute("aria-level")) < level);
    else if (event.key === "Enter" || event.key === " ") this.#toggle(row, !isOpen);
    else return;
    event.preventDefault();
    if (next) this.#focus(next);
  }
}

function makeRow() {
  const cell = (...inside) => make("td", { role: "gridcell", class: "num" }, ...inside);
  return make("tr", { role: "row", tabindex: "-1" },
    make("td", { role: "gridcell", class: "name" }, make("div", { class: "indent" }, make("span", { class: "twist", "aria-hidden": "true" }),
      make("span", { class: "label" }, make("code"), make("span", { class: "badge" }), make("span", { class: "quiet" })))),
    cell(make("span")),
    cell(make("div", { class: "stored" }, make("span"), make("span", { class: "stack thin" }))),
    cell(make("span", { class: "hits" })),
    cell());
}

function noteOf(row) {
  if (row.none) return "Nothing is stored yet.";
  return `and ${row.more.toLocaleString("en")} more, used less`;
}
