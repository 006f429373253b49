
// --- latents: [latent, main of, words taken over, density, maximum, histogram, contexts [kind, tokens, activations],
// favoured and disfavoured tokens [token, value]]; one label at a time
const latents = JSON.parse($("#latents").textContent);
const SHOWN = 8;
let asked = null;
function record(latent) { return (latents[current] || []).find((row) => row[0] === latent); }
function labelName(label) { return label.length === 1 ? label.toUpperCase() : label; }
function labelsOf(row) {
  const absorbed = (words[current] || []).filter((word) => word[4] === row[0] && (word[8] || word[9] === "carried"));
  return [...row[1], ...absorbed.map((word) => word[1])];
}
function linkLatents(cell, numbers) {
  if (!numbers.some(record)) return;
  cell.textContent = "";
  numbers.forEach((latent, i) => {
    if (i) cell.append(", ");
    if (!record(latent)) { cell.append(String(latent)); return; }
    const link = make("button", String(latent), cell);
    link.className = "link";
    link.addEventListener("click", () => { showLatent(latent); $("#cards").scrollIntoView({ block: "center" }); });
  });
}
function drawHistogram(counts, most, card) {
  const bars = counts.map(Number).map((count, i, all) => `<rect x="${i * 10}" width="9" y="${30 - 28 * count / Math.max(...all)}" height="30"/>`);
  const box = make("div", undefined, card);
  box.className = "sparkline";
  box.innerHTML = `<svg viewBox="0 0 120 30" aria-hidden="true">${bars.join("")}</svg>`; // numbers only
  make("small", `activations where it fires, 0 to ${most}`, box);
}
function drawContext([kind, shown, acts], most, list) {
  const line = make("li", undefined, list);
  if (kind !== "top") line.className = "everyday";
  shown.forEach((token, i) => {
    const part = make("span", token.replace(/\n/g, "↵"), line);
    if (acts[i] > 0) {
      part.style.setProperty("--share", `${Math.round(15 + 70 * Math.min(acts[i] / most, 1))}%`);
      part.className = "lit";
      part.title = String(acts[i]);
    }
  });
}
function drawTokens(title, pairs, card) {
  if (!pairs.length) return;
  const line = make("p", `${title} `, card);
  line.className = "favoured";
  pairs.forEach(([token, value]) => { make("code", token.trim() || JSON.stringify(token), line).title = String(value); line.append(" "); });
}
function drawCard(row) {
  const [latent, main, taken, density, most, histogram, contexts, top, bottom] = row;
  const card = make("article", undefined, $("#cards"));
  const head = make("h3", `latent ${latent} `, card);
  const roles = main.length ? [`main latent of ${main.map(labelName).join(", ")}`] : [];
  if (taken.length) {
    const few = taken.slice(0, 6).map((word) => word.trim()).join(", ");
    roles.push(`took over ${few}${taken.length > 6 ? ` and ${taken.length - 6} more` : ""}`);
  }
  make("span", roles.join("; "), head);
  make("p", `fires on ${(100 * density).toPrecision(2)} % of held-out tokens`, card).className = "note-line";
  if (histogram.length) drawHistogram(histogram, most, card);
  const list = make("ol", undefined, card);
  contexts.forEach((context) => drawContext(context, most, list));
  if (!contexts.length) make("p", "It fires on no token of the held-out text.", card);
  drawTokens("next token, favours", top, card);
  drawTokens("disfavours", bottom, card);
}
function showCards(rows, all) {
  $("#cards").textContent = "";
  rows.forEach(drawCard);
  $("#latent-note").textContent = all > rows.length ? `${rows.length} of ${all} latents` : "";
}
function showLabel() {
  const label = $("#latent-label").value;
  const rows = (latents[current] || []).filter((row) => labelsOf(row).includes(label));
  rows.sort((a, b) => b[1].includes(label) - a[1].includes(label) || b[2].length - a[2].length);
  showCards(rows.slice(0, SHOWN), rows.length);
}
function showLatent(latent) {
  const row = record(latent);
  $("#latent-number").value = latent;
  showCards(row ? [row] : [], 0);
  if (!row) $("#latent-note").textContent = "no page was kept for this latent";
}
function showLabels() {
  if (!$("#cards")) return;
  const counts = new Map();
  (latents[current] || []).forEach((row) => labelsOf(row).forEach((label) => counts.set(label, (counts.get(label) || 0) + 1)));
  const chooser = $("#latent-label");
  chooser.textContent = "";
  [...counts.keys()].sort().forEach((label) => { make("option", labelName(label), chooser).value = label; });
  const absorbed = (words[current] || []).filter((word) => word[8]).map((word) => word[1]);
  const most = [...counts.keys()].sort((a, b) => absorbed.filter((label) => label === b).length - absorbed.filter((label) => label === a).length)[0];
  if (most) chooser.value = most;
  $("#latents-of").textContent = names.length > 1 ? names[current] : "";
  $("#latent-number").value = "";
  showLabel();
}
if ($("#cards")) {
  $("#latent-label").addEventListener("change", () => { $("#latent-number").value = ""; showLabel(); });
  $("#latent-number").addEventListener("input", (event) => (event.target.value.trim() ? showLatent(Number(event.target.value)) : showLabel()));
  showLabels();
}
showWords();
