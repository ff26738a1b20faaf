// Numbers as people read them: with units, and no more digits than matter.

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const DECIMAL = ["", "k", "M", "G", "T"];

// Three digits that matter: 1.23, 12.3, 123.
function digits(value) {
  return value >= 99.95 || Number.isInteger(value) ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

function scaled(value, base, units) {
  let index = 0;
  let size = Math.abs(value);
  while (size >= base * 0.9995 && index < units.length - 1) {
    size /= base;
    index += 1;
  }
  return [size, units[index]];
}

export function bytes(value) {
  const [size, unit] = scaled(value, 1024, BINARY);
  return `${unit === "B" ? size.toFixed(0) : digits(size)} ${unit}`;
}

// Whole below ten thousand: people know their prompts as 1,024 or 2,048 tokens.
export function count(value) {
  if (value < 9999.5) return value < 10 && !Number.isInteger(value) ? value.toFixed(1) : Math.round(value).toLocaleString("en");
  const [size, unit] = scaled(value, 1000, DECIMAL);
  return `${digits(size)} ${unit}`;
}

export function percent(share) {
  if (share === null || Number.isNaN(share)) return "–";
  const value = Math.min(100, share * 100);
  return `${value >= 99.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

export function seconds(value) {
  const size = Math.abs(value);
  const sign = value < 0 ? "−" : "";
  if (size < 0.9995) return `${sign}${(size * 1000).toFixed(0)} ms`;
  if (size < 59.95) return `${sign}${size < 9.995 ? size.toFixed(1) : size.toFixed(0)} s`;
  if (size < 3599.5) return `${sign}${Math.floor(size / 60)} min ${Math.floor(size % 60)} s`;
  if (size < 86400) return `${sign}${Math.floor(size / 3600)} h ${Math.floor((size % 3600) / 60)} min`;
  return `${sign}${Math.floor(size / 86400)} d ${Math.floor((size % 86400) / 3600)} h`;
}

// How long ago, in one unit.
export function ago(value) {
  if (value === null) return "–";
  if (value < 1.5) return "now";
  if (value < 59.5) return `${value.toFixed(0)} s`;
  if (value < 3570) return `${(value / 60).toFixed(0)} min`;
  return value < 84600 ? `${(value / 3600).toFixed(0)} h` : `${(value / 86400).toFixed(0)} d`;
}

export function clock(at) {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

export function sum(numbers) {
  return Object.values(numbers).reduce((total, value) => total + value, 0);
}

export function hitRate(use) {
  return use.prompt_tokens ? sum(use.hit_tokens) / use.prompt_tokens : null;
}
