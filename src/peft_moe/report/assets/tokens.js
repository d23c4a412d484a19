// The token view: the text of a sample, each token in the colour of the expert that weighs it most.

// alone: the name of an expert, or null for all · traced: a token, or null for the row
const tokenView = {sample: 0, layer: 0, alone: null, traced: null, decoded: new Map()};

// The weights of a sample in a layer as {rows: n or 1, width: E, at(token, expert) -> 0 ... 1}
function weightsOf(sample, layer) {
  const key = `${sample} ${layer}`;
  if (!tokenView.decoded.has(key)) {
    const bytes = Uint8Array.from(atob(samples[sample].weights[layer]), c => c.charCodeAt(0));
    const width = routing.layers[layer].experts.length, rows = bytes.length / width;
    tokenView.decoded.set(key, {rows, width, at: (token, e) => bytes[(rows === 1 ? 0 : token) * width + e] / 255});
  }
  return tokenView.decoded.get(key);
}

// The expert with the largest weight; the first of equal ones.
function strongest(weights, token) {
  let best = 0;
  for (let e = 1; e < weights.width; e++) if (weights.at(token, e) > weights.at(token, best)) best = e;
  return best;
}

// What white space and nothing look like when they are a token.
const readable = piece => piece === "" ? "∅" : visible(piece.replace(/\r/g, "␍")).replace(/\n/g, "↵\n");

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
  const name = i => `${i + 1}. ${samples[i].task === null ? "" : `${samples[i].task}: `}${samples[i].tokens.join("").trim()}`;
  const toLayer = value => {
    tokenView.layer = Number(value);
    slider.value = layers.indexOf(tokenView.layer);
    byId("token-layer").value = value;
    paintTokens();
  };
  const slider = make("input", {type: "range", id: "token-depth", min: 0, max: layers.length - 1,
    value: layers.indexOf(tokenView.layer)});
  slider.addEventListener("input", () => toLayer(layers[slider.value]));
  const numbers = make("input", {type: "checkbox", id: "token-names"});
  numbers.checked = byId("token-text").classList.contains("named");
  numbers.addEventListener("change", () => byId("token-text").classList.toggle("named", numbers.checked));
  byId("token-controls").replaceChildren(
    chooser("token-sample", "Row", rows.map(i => [i, name(i)]), tokenView.sample, toSample),
    chooser("token-layer", "Layer", layers.map(l => [l, routing.layers[l].name]), tokenView.layer, toLayer),
    make("div", {class: `field${layers.length > 1 ? "" : " gone"}`}, make("label", {for: "token-depth"}, "Depth"), slider),
    make("div", {class: "field check"}, numbers, make("label", {for: "token-names"}, "Name the expert where it changes")));
}

function writeText() {
  const {tokens, prompt_tokens: cut, task} = samples[tokenView.sample];
  const part = (title, from, to) => from >= to ? null : make("div", {class: `part ${title.toLowerCase()}`},
    make("h3", {}, title), make("p", {class: "text", role: "listbox", "aria-orientation": "horizontal", "data-items": "",
      "aria-label": visible(`${title}, ${to - from} tokens`)},
    tokens.slice(from, to).map((piece, i) => make("span", {role: "option", class: "token", "data-item": from + i,
      tabindex: i ? "-1" : "0"}, readable(piece)))));
  byId("token-text").replaceChildren(...[
    task === null ? null : make("p", {class: "task"}, "Task ", make("bdi", {}, short(task, 200))),
    part("Prompt", 0, cut), part("Answer", cut, tokens.length)].filter(Boolean));
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
  const title = traced === null ? "The row" : `“${short(tokens[traced].trim(), 40)}”`;
  const where = `Weights${module ? ` in ${short(module)}` : ""}, from the first block to the last. `;
  const hint = traced === null ? "Mean of the row; press a token to see it alone." : "";
  box.replaceChildren(make("h3", {}, `${title} through the depth`), make("p", {class: "help"}, where + hint), scale, depthMap({
    label: "Weights through the depth", layers, things, high, value: (other, e) => table.get(other)[e],
    say: (other, e) => ofCell(`${other.name}, ${expertName(names[e])}`, "weight", table.get(other)[e])}));
}

function tokenSays(token) {
  const layer = routing.layers[tokenView.layer], weights = weightsOf(tokenView.sample, tokenView.layer);
  const order = layer.experts.map((_, e) => e).sort((a, b) => weights.at(token, b) - weights.at(token, a) || a - b);
  const rows = order.slice(0, 12).map(e => [expertName(layer.experts[e]), percent(weights.at(token, e)), weights.at(token, e)]);
  if (order.length > 12) rows.push([`${order.length - 12} others`, percent(sum(order.slice(12).map(e => weights.at(token, e))))]);
  return {head: `“${samples[tokenView.sample].tokens[token]}”`, rows};
}

function paintTokens() {
  const {sample, layer} = tokenView, {experts} = routing.layers[layer], weights = weightsOf(sample, layer);
  const alone = experts.indexOf(tokenView.alone), tops = samples[sample].tokens.map(() => 0);
  let before = null;
  for (const item of byId("token-text").querySelectorAll(".token")) {
    const token = Number(item.dataset.item), top = strongest(weights, token), shown = alone < 0 ? top : alone;
    tops[token] = top;
    item.dataset.expert = visible(experts[top]).slice(0, 300);
    item.classList.toggle("change", top !== before);
    before = top;
    const weight = weights.at(token, shown), strength = alone < 0 ? 0.15 + 0.85 * weight : weight;
    item.style.backgroundColor = `rgb(var(--e${expertKind(experts[shown])}) / ${strength.toFixed(3)})`;
    const text = samples[sample].tokens[token].trim() || "white space";
    item.setAttribute("aria-label", visible(`${text}, ${expertName(experts[top])} ${percent(weights.at(token, top))}`));
  }
  byId("token-note").textContent = weights.rows === 1 && tops.length > 1
    ? "In this layer all tokens of the row have the same weights: the router decides for the row, not for a token." : "";
  tokenLegend(experts, tops, weights);
  traceToken();
}

function listenForTokens() {
  byId("token-text").addEventListener("focusin", ({target}) => {
    if (!target.classList.contains("token")) return;
    tokenView.traced = Number(target.dataset.item);
    traceToken();
  });
}

function tokenLegend(experts, tops, weights) {
  byId("token-legend").classList.toggle("many", experts.length > 16);
  byId("token-legend").replaceChildren(...experts.map((name, e) => {
    const pressed = tokenView.alone === name;
    const share = mean(tops.map((_, token) => weights.at(token, e)));
    const button = make("button", {type: "button", class: "key", "aria-pressed": String(pressed)},
      make("i", {"aria-hidden": "true"}), short(expertName(name), 40), make("small", {}, percent(share)));
    button.style.setProperty("--key", `rgb(var(--e${expertKind(name)}))`);
    button.addEventListener("click", () => {
      tokenView.alone = pressed ? null : name;
      paintTokens();
      byId("token-legend").children[e].focus();
    });
    return button;
  }));
}
