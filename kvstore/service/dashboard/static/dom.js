// Elements with as little as needed. Text goes in as text, never as markup: names come from clients.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Write only what is different: nothing that is being read, selected or focused is replaced.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// Make the children of `parent` those of `items`, in order, keeping elements whose key stays.
export function reconcile(parent, items, key, create, update) {
  const known = new Map();
  for (const child of [...parent.children]) {
    if (known.has(child.dataset.key)) child.remove(); // two of one name: the second is made anew
    else known.set(child.dataset.key, child);
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let element = known.get(name);
    if (element) {
      known.delete(name);
    } else {
      element = create(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const left of known.values()) left.remove();
}

// A bar of segments: [class, share of the whole, name].
export function segments(parent, parts) {
  reconcile(parent, parts, (part) => part[0], (part) => make("span", { class: `part ${part[0]}` }),
    (element, part) => {
      element.style.setProperty("--share", Math.max(0, Math.min(1, part[1] || 0)));
      setAttribute(element, "title", part[2] || null);
    });
}
