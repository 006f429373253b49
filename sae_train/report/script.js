"use strict";
// Sorting, choosing an SAE, the table of words, highlighting and hovering; latents.js follows in the same script. Page text goes in through textContent only.
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const make = (tag, text, parent) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};

const tokens = (value) => (value >= 1e9 ? `${+(value / 1e9).toPrecision(4)}B` : value >= 1e6 ? `${+(value / 1e6).toPrecision(4)}M` : value >= 1e3 ? `${+(value / 1e3).toPrecision(4)}k` : value);

// --- sortable tables made by the writer
const keyOf = (row, column) => {
  const text = row.cells[column] ? row.cells[column].textContent.trim() : "";
  const value = parseFloat(text);
  return Number.isNaN(value) ? text : value;
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
  : typeof a === "number" ? -1 : typeof b === "number" ? 1 : String(a ?? "").localeCompare(String(b ?? "")));
const turn = (head, heads) => {
  const down = head.getAttribute("aria-sort") !== "descending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  return down ? -1 : 1;
};
$$("table.sortable").forEach((table) => {
  const heads = $$("thead th", table);
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const sign = turn(head, heads);
    const rows = $$("tbody tr", table).sort((a, b) => sign * compare(keyOf(a, column), keyOf(b, column)));
    $("tbody", table).append(...rows);
  }));
});

// --- words: [word, letter, main latents, activation, absorber, cosine, share, fraction, full, outcome, next absorbers,
// [recalled until, silent since, taken over since] or null, and of some: latent of the largest effect, effect, second effect, cosine]; the table's head names its columns
const words = JSON.parse($("#words").textContent);
const names = $$("#sae option").map((option) => option.textContent);
const wordTable = $("table.words");
const columns = wordTable ? $$("thead th", wordTable).map((head) => head.dataset.column) : [];
const PAGE = 20;
let current = $("#sae") ? Number($("#sae").value) : 0;
let limit = PAGE;
let order = null;

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const rest = (row, family) => (family.get(row[4]) || []).filter((word) => word !== row[0]);
function others(row, family) {
  const found = rest(row, family);
  return found.slice(0, 8).map((word) => word.trim()).join(", ") + (found.length > 8 ? ` and ${found.length - 8} more` : "");
}
const rounded = (value) => (value === null ? "never" : tokens(Number(value.toPrecision(3))));
const COLUMNS = { // what a cell says and what it is sorted by
  word: [(row) => row[0].trim(), (row) => row[0].trim()],
  letter: [(row) => (row[1].length === 1 ? row[1].toUpperCase() : row[1]), (row) => row[1]],
  main: [(row) => row[2].join(", "), (row) => row[2][0]],
  activation: [(row) => (row[3] === null ? "silent" : fixed(row[3])), (row) => row[3] ?? 0],
  outcome: [(row) => row[9] ?? "–", (row) => row[9]],
  absorber: [(row) => row[4] ?? "–", (row) => row[4]],
  cosine: [(row) => fixed(row[5]), (row) => row[5]],
  share: [(row) => (row[6] === null ? "–" : `${(100 * row[6]).toFixed(0)} %`), (row) => row[6]],
  fraction: [(row) => fixed(row[7]), (row) => row[7]],
  full: [(row) => (row[8] ? "yes" : "no"), (row) => row[8]],
  effect_latent: [(row) => row[12] ?? "–", (row) => row[12]],
  effect: [(row) => fixed(row[13]), (row) => row[13]],
  second: [(row) => fixed(row[14]), (row) => row[14]],
  effect_cos: [(row) => fixed(row[15]), (row) => row[15]],
  before: [(row) => (row[11] ? rounded(row[11][0]) : "–"), (row) => (row[11] ? row[11][0] ?? -1 : null)],
  silent: [(row) => (row[11] ? rounded(row[11][1]) : "–"), (row) => (row[11] ? row[11][1] : null)],
  taken: [(row) => (row[11] ? rounded(row[11][2]) : "–"), (row) => (row[11] ? row[11][2] : null)],
  next: [(row) => row[10].map(([latent, cosine]) => `${latent} (${fixed(cosine)})`).join(", ") || "–", (row) => row[10].length],
  others: [others, (row, family) => (family.get(row[4]) || []).length],
};

function showWords() {
  if (!wordTable) return;
  const all = words[current] || [];
  const family = new Map();
  all.forEach((row) => row[4] !== null && (row[7] > 0 || row[8])
    && family.set(row[4], [...(family.get(row[4]) || []), row[0]]));
  const sought = $("#search").value.trim().toLowerCase();
  const full = $("#only-full").checked;
  const fits = (row) => !sought || row[0].toLowerCase().includes(sought) || row[1].toLowerCase() === sought
    || row[9] === sought || [row[4], row[12], ...row[2], ...row[10].map((pair) => pair[0])].map(String).includes(sought);
  let rows = all.filter((row) => (!full || row[8]) && fits(row));
  if (order) {
    const key = COLUMNS[columns[order.column]][1];
    rows = rows.slice().sort((a, b) => order.sign * compare(key(a, family), key(b, family)));
  }
  const body = $("tbody", wordTable);
  body.textContent = "";
  rows.slice(0, limit).forEach((row) => {
    const line = make("tr", undefined, body);
    columns.forEach((name, i) => {
      const cell = make(i ? "td" : "th", COLUMNS[name][0](row, family), line);
      if (name === "main") linkLatents(cell, row[2]);
      if (name === "absorber" && row[4] !== null) linkLatents(cell, [row[4]]);
    });
    line.cells[0].scope = "row";
  });
  $("#more").hidden = rows.length <= limit;
  $("#count").textContent = all.length ? `${Math.min(limit, rows.length)} of ${rows.length} words` : "no absorbed word for this SAE";
  $("#words-of").textContent = names.length > 1 ? names[current] : "";
}
if (wordTable) {
  const heads = $$("thead th", wordTable);
  heads.forEach((head, column) => head.addEventListener("click", () => {
    order = { column, sign: turn(head, heads) };
    showWords();
  }));
  const restart = () => { limit = PAGE; showWords(); };
  $("#search").addEventListener("input", restart);
  $("#only-full").addEventListener("change", restart);
  $("#more").addEventListener("click", () => { limit += 4 * PAGE; showWords(); });
}
if ($("#sae")) $("#sae").addEventListener("change", (event) => {
  current = Number(event.target.value);
  limit = PAGE;
  $$(".panel").forEach((panel) => { panel.hidden = Number(panel.dataset.sae) !== current; });
  showWords();
  showLabels();
});

// --- pressed names bring their curves forward
const picked = new Set();
$$(".chip").forEach((chip) => chip.addEventListener("click", () => {
  const on = picked.has(chip.dataset.sae);
  on ? picked.delete(chip.dataset.sae) : picked.add(chip.dataset.sae);
  chip.setAttribute("aria-pressed", String(!on));
  const section = chip.closest("section");
  section.classList.toggle("picked", picked.size > 0);
  $$(".plots [data-sae]", section).forEach((line) => {
    line.classList.toggle("on", picked.has(line.dataset.sae));
    line.classList.toggle("dim", picked.size > 0 && !picked.has(line.dataset.sae));
  });
}));

// --- values at the pointer
const tip = $("#tip");
const chips = $$(".chip");
const numbers = (text) => (text ? text.split(" ").map(Number) : null);
const showTip = (event) => { // beside the pointer, inside the window
  tip.hidden = false;
  const wide = tip.offsetWidth, tall = tip.offsetHeight;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 6))}px`;
  tip.style.top = `${event.clientY + 18 + tall > innerHeight ? Math.max(4, event.clientY - tall - 12) : event.clientY + 18}px`;
};
const hideTip = () => { tip.hidden = true; $$(".guide").forEach((guide) => guide.setAttribute("visibility", "hidden")); };
const brief = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
function values(plot, at) {
  return $$(".line:not(.dim)", plot).map((line) => {
    const x = numbers(line.dataset.x);
    const i = x.reduce((best, value, j) => (Math.abs(value - at) < Math.abs(x[best] - at) ? j : best), 0);
    const low = numbers(line.dataset.low), high = numbers(line.dataset.high);
    const band = low ? ` (${brief(low[i])} to ${brief(high[i])})` : "";
    return { x: x[i], y: numbers(line.dataset.y)[i], band, css: line.getAttribute("class"), sae: Number(line.dataset.sae), name: line.dataset.name };
  });
}
function hover(event) {
  const plot = event.currentTarget, box = plot.getBoundingClientRect(), data = plot.dataset;
  const left = Number(data.left), right = Number(data.right), end = Number(data.end);
  const px = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
  const found = values(plot, Math.min(Math.max((px - left) / (right - left), 0), 1) * end).sort((a, b) => b.y - a.y);
  if (!found.length) return;
  const nearest = found.reduce((a, b) => (Math.abs(a.x / end * (right - left) + left - px) <= Math.abs(b.x / end * (right - left) + left - px) ? a : b));
  const guide = $(".guide", plot), x = left + nearest.x / end * (right - left);
  guide.setAttribute("x1", x); guide.setAttribute("x2", x); guide.setAttribute("visibility", "visible");
  tip.textContent = "";
  make("div", `${tokens(nearest.x)} tokens`, tip);
  found.slice(0, 14).forEach((item) => {
    const row = make("div", undefined, tip);
    make("i", undefined, row).className = item.css.replace("line", "");
    const of = item.name || (chips[item.sae] ? chips[item.sae].textContent.trim() : "");
    const name = of ? `${of}: ` : "";
    row.append(`${name}${brief(item.y)}${item.band}`);
  });
  if (found.length > 14) make("div", `and ${found.length - 14} more`, tip);
  showTip(event);
}
const NEAR = 24; // pixels between a finger and the mark that it means
const away = (box, event) => Math.hypot(Math.max(box.left - event.clientX, 0, event.clientX - box.right), Math.max(box.top - event.clientY, 0, event.clientY - box.bottom));
function nameMark(chart, event) {
  const marks = $$("title", chart).map((title) => [away(($("circle", title.parentNode) || title.parentNode).getBoundingClientRect(), event), title.textContent]);
  const nearest = marks.reduce((a, b) => (a[0] <= b[0] ? a : b), [NEAR, ""]);
  tip.textContent = nearest[1];
  if (nearest[1]) showTip(event);
}
// A finger has no place to hover: what it touched stays until it touches something else.
document.addEventListener("pointerdown", (event) => {
  if (event.pointerType !== "touch") return;
  hideTip();
  const chart = event.target.closest("svg:not(.plot)");
  if (chart) nameMark(chart, event);
}, { capture: true });
$$("svg.plot").forEach((plot) => {
  ["pointermove", "pointerdown"].forEach((kind) => plot.addEventListener(kind, hover));
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hideTip(); });
});
