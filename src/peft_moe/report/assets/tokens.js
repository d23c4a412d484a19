// The token view: the text of a sample, each token in the colour of the expert that weighs it most.

// alone: the name of an expert, or null for all · traced: a token, or null for the row
const tokenView = {sample: 0, layer: 0, alone: null, traced: null, decoded: new Map()};
const MANY = 8;  // experts; colours of more are not told apart by all readers, so that names are written into the text

// The weights of a sample in a layer as {rows: n or 1, width: E, at(token, expert) -> 0 ... 1}
function weightsOf(sample, layer) {
  const key = `${sample} ${layer}`;
  if (!tokenView.decoded.has(key)) {
    const bytes = new DataView(Uint8Array.from(atob(samples[sample].weights[layer]), c => c.charCodeAt(0)).buffer);
    const width = routing.layers[layer].experts.length, rows = bytes.byteLength / width / 2;
    const at = (token, e) => bytes.getUint16(2 * ((rows === 1 ? 0 : token) * width + e), true) / 65535;
    tokenView.decoded.set(key, {rows, width, at});
  }
  return tokenView.decoded.get(key);
}

// Of these experts, the one with the largest weight; the first of equal ones.
function strongest(weights, token, of) {
  return of.reduce((best, e) => weights.at(token, e) > weights.at(token, best) ? e : best);
}

// A token as it is shown. What has no look of its own, the end of a line and a part of a character, is a mark of the
// style sheet, so that the text can be copied as it is.
const sign = text => make("i", {class: "sign", "data-sign": text});
function readable(piece) {
  if (piece === "") return [sign("·")];
  // An accent or a joiner alone would go to the letter before it, which is another token.
  if (/^[\p{M}\u200c\u200d]+$/u.test(piece)) {
    return [/^\p{M}/u.test(piece) ? "◌" : null, piece.replace(/[\u200c\u200d]/g, byNumber)];
  }
  return piece.split(/(\r|\n)/).map(part => part === "\r" ? sign("\\r") : part === "\n" ? [sign("↵"), "\n"] : part).flat();
}
const nameOf = piece => piece === "" ? "part of a character" : /\n/.test(piece) ? "line break" : "white space";
const inWords = piece => piece.trim() || nameOf(piece);

// What starts and ends turns in the templates of chats, with the role that speaks.
const TURNS = new RegExp([
  /<\|im_start\|>\s*\w*/, /<\|start_header_id\|>\s*\w*\s*<\|end_header_id\|>/, /<start_of_turn>\s*\w*/, /<end_of_turn>/,
  /<\|[^|<>]{1,30}\|>/, /<\/?s>/, /<[be]os>/, /\[\/?INST\]/,
].map(({source}) => source).join("|"), "g");

// A row by the end of its prompt, as the start is often the same in all, and its answer.
function rowName(i) {
  const {tokens, prompt_tokens: cut, task} = samples[i];
  const plain = pieces => Array.from(pieces.join("").replace(TURNS, " ").replace(/\s+/g, " ").trim());
  const prompt = plain(tokens.slice(0, cut)), answer = short(plain(tokens.slice(cut)).join(""), 40);
  const end = prompt.length > 40 ? `…${prompt.slice(-40).join("")}` : prompt.join("");
  return `${i + 1}. ${task === null ? "" : `${short(task, 24)}: `}${[end, answer].filter(Boolean).join(" → ")}`;
}

function renderTokens() {
  const rows = samples.map((_, i) => i).filter(i => !ofOneTask() || samples[i].task === filters.task);
  const layers = shownLayers().map(layer => routing.layers.indexOf(layer));
  const nothing = !rows.length || !layers.length;
  for (const id of ["token-controls", "token-legend", "token-text", "token-depth-map"]) byId(id).hidden = nothing;
  if (nothing) {
    byId("token-note").textContent = rows.length ? "No layer fits the filters." : "No sample row fits the filters.";
    return;
  }
  if (!rows.includes(tokenView.sample)) tokenView.sample = rows[0];
  if (!layers.includes(tokenView.layer)) tokenView.layer = layers[0];
  tokenControls(rows, layers);
  writeText();
  paintTokens();
}

function tokenControls(rows, layers) {
  const toSample = value => { tokenView.sample = Number(value); writeText(); paintTokens(); };
  const toLayer = value => {
    tokenView.layer = Number(value);
    toDepth();
    byId("token-layer").value = value;
    paintTokens();
  };
  const slider = make("input", {type: "range", id: "token-depth", min: 0, max: layers.length - 1});
  const toDepth = () => {
    slider.value = layers.indexOf(tokenView.layer);
    slider.setAttribute("aria-valuetext", visible(routing.layers[tokenView.layer].name));
  };
  toDepth();
  slider.addEventListener("input", () => toLayer(layers[slider.value]));
  const numbers = make("input", {type: "checkbox", id: "token-names"});
  numbers.checked = byId("token-text").classList.contains("named");
  numbers.addEventListener("change", () => byId("token-text").classList.toggle("named", numbers.checked));
  byId("token-controls").replaceChildren(
    chooser("token-sample", "Row", rows.map(i => [i, rowName(i)]), tokenView.sample, toSample),
    chooser("token-layer", "Layer", layers.map(l => [l, routing.layers[l].name]), tokenView.layer, toLayer),
    make("div", {class: `field${layers.length > 1 ? "" : " gone"}`}, make("label", {for: "token-depth"}, "Depth"), slider),
    make("div", {class: "field check"}, numbers, make("label", {for: "token-names"}, "Name the expert where it changes")));
}

function writeText() {
  const {tokens, prompt_tokens: border, cut = 0, task} = samples[tokenView.sample];
  const part = (title, from, to) => from >= to ? null : make("div", {class: `part ${title.toLowerCase()}`},
    make("h3", {}, title), make("p", {class: "text", role: "listbox", "aria-orientation": "horizontal", "data-items": "",
      "aria-label": visible(`${title}, ${to - from} tokens`)},
    tokens.slice(from, to).map((piece, i) => make("span", {role: "option", class: "token", "data-item": from + i,
      tabindex: i ? "-1" : "0", "aria-selected": "false"}, readable(piece)))));
  byId("token-text").replaceChildren(...[
    task === null ? null : make("p", {class: "task"}, "Task ", make("bdi", {}, short(task, 200))),
    cut > 0 ? make("p", {class: "help"}, `… ${count(cut, "earlier token is", "earlier tokens are")} not shown.`) : null,
    part("Prompt", 0, border), part("Answer", border, tokens.length)].filter(Boolean));
  for (const text of byId("token-text").querySelectorAll(".text")) said.set(text, item => tokenSays(Number(item.dataset.item)));
  tokenView.traced = null;
}

// Where a token goes in the layers above and below, in the same module; the mean of the row before one is chosen.
function traceToken() {
  const {sample, layer, traced} = tokenView, {module} = routing.layers[layer], {tokens} = samples[sample];
  const layers = shownLayers().filter(other => other.module === module), box = byId("token-depth-map");
  box.hidden = layers.length < 2;
  if (box.hidden) return;
  const names = namesIn(layers);
  const weight = (other, name) => {
    const e = other.experts.indexOf(name), weights = weightsOf(sample, routing.layers.indexOf(other));
    return e < 0 ? null : traced === null ? mean(tokens.map((_, token) => weights.at(token, e))) : weights.at(traced, e);
  };
  const table = new Map(layers.map(other => [other, names.map(name => weight(other, name))]));
  const high = largest([...table.values()]) || 1, scale = make("div", {class: "scale"});
  showScale(scale, 0, high, percent);
  const things = names.map(name => ({text: expertName(name)}));  // long, so that depth goes across
  const text = traced === null ? "" : tokens[traced].trim();
  const title = traced === null ? "The row" : text ? `“${short(text, 40)}”` : `The ${nameOf(tokens[traced])}`;
  const where = `Weights${module ? ` in ${short(module)}` : ""}, from the first block to the last. `;
  const hint = traced === null ? "Mean of the row; press a token to see it alone."
    : "Press the token again, or Escape, for the mean of the row.";
  box.replaceChildren(make("h3", {}, `${title} through the depth`), make("p", {class: "help"}, where + hint), scale, depthMap({
    label: "Weights through the depth", layers, things, high, value: (other, e) => table.get(other)[e],
    say: (other, e) => ofCell(`${other.name}, ${expertName(names[e])}`, "weight", table.get(other)[e])}));
}

function tokenSays(token) {
  const layer = routing.layers[tokenView.layer], weights = weightsOf(tokenView.sample, tokenView.layer);
  const order = layer.experts.map((_, e) => e).sort((a, b) => weights.at(token, b) - weights.at(token, a) || a - b);
  const rows = order.slice(0, 12).map(e => [expertName(layer.experts[e]), percent(weights.at(token, e)), weights.at(token, e)]);
  if (order.length > 12) rows.push([`${order.length - 12} others`, percent(sum(order.slice(12).map(e => weights.at(token, e))))]);
  const piece = samples[tokenView.sample].tokens[token];
  return {head: piece.trim() ? `“${piece}”` : nameOf(piece), rows};
}

function paintTokens() {
  const {sample, layer} = tokenView, {experts} = routing.layers[layer], weights = weightsOf(sample, layer);
  const alone = experts.indexOf(tokenView.alone), tops = samples[sample].tokens.map(() => 0);
  const between = competing(routing.layers[layer]), whole = between.length === experts.length;
  let before = null;
  for (const item of byId("token-text").querySelectorAll(".token")) {
    const token = Number(item.dataset.item), top = strongest(weights, token, between), shown = alone < 0 ? top : alone;
    tops[token] = top;
    item.dataset.expert = visible(experts[top]).slice(0, 300);
    item.classList.toggle("change", top !== before);
    before = top;
    const weight = weights.at(token, shown), all = whole ? 1 : sum(between.map(e => weights.at(token, e))) || 1;
    const strength = alone < 0 ? 0.15 + 0.85 * weight / all : weight;
    item.style.backgroundColor = `rgb(var(--e${colourOf(experts[shown])}) / ${strength.toFixed(3)})`;
    const text = inWords(samples[sample].tokens[token]);
    item.setAttribute("aria-label", visible(`${text}, ${expertName(experts[top])} ${percent(weights.at(token, top))}`));
  }
  byId("token-note").textContent = [
    weights.rows === 1 && tops.length > 1
      ? "In this layer all tokens of the row have the same weights: the router decides for the row, not for a token." : "",
    samples[sample].tokens.includes("")
      ? "A dot is a token that is only part of a character; the last of its tokens has the character." : "",
    whole ? "" : "The colour is that of an expert in a group; the general expert, which every token has, is left out of it.",
  ].filter(Boolean).join(" ");
  tokenLegend(experts, tops, weights);
  traceToken();
}

function trace(token) {
  tokenView.traced = token;
  for (const item of byId("token-text").querySelectorAll(".token")) {
    item.setAttribute("aria-selected", String(Number(item.dataset.item) === token));
  }
  traceToken();
}

// A token is traced when it is gone to, and no more when it is pressed again.
function listenForTokens() {
  const box = byId("token-text"), tokenAt = ({target}) => target.closest(".token")?.dataset.item ?? null;
  let before = null;  // what was traced before a press, which moves the focus first
  box.addEventListener("pointerdown", () => { before = tokenView.traced; });
  box.addEventListener("focusin", event => { if (tokenAt(event) !== null) trace(Number(tokenAt(event))); });
  box.addEventListener("click", event => {
    if (tokenAt(event) !== null) trace(Number(tokenAt(event)) === before ? null : Number(tokenAt(event)));
  });
  box.addEventListener("keydown", event => {
    if (tokenAt(event) === null || ![" ", "Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    const item = Number(tokenAt(event));
    trace(event.key === "Escape" || tokenView.traced === item ? null : item);
  });
}

function tokenLegend(experts, tops, weights) {
  byId("token-legend").classList.toggle("many", experts.length > 16);
  byId("token-legend").replaceChildren(...experts.map((name, e) => {
    const pressed = tokenView.alone === name;
    const share = mean(tops.map((_, token) => weights.at(token, e)));
    // The general expert has no colour in the text, unless it is looked at alone.
    const swatch = general.has(name) && !pressed ? null : make("i", {"aria-hidden": "true"});
    const button = make("button", {type: "button", class: "key", "aria-pressed": String(pressed)},
      swatch, short(expertName(name), 40), make("small", {}, percent(share)));
    button.style.setProperty("--key", `rgb(var(--e${colourOf(name)}))`);
    button.addEventListener("click", () => {
      tokenView.alone = pressed ? null : name;
      paintTokens();
      byId("token-legend").children[e].focus();
    });
    return button;
  }));
}
