// Puts the page together.

function render() {
  const layers = shownLayers();
  hideTip();
  byId("shown").textContent = `${layers.length} of ${count(routing.layers.length, "layer")}`;
  byId("tokens").hidden = !samples.length;
  if (samples.length) renderTokens();
  for (const part of [renderLayers, renderTasks, renderGroups, renderDepth, renderSimilarity]) part(layers);
  renderTable();
}

// ---- light and dark: as the system has it, until the button is pressed
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  setColours(dark, Math.max(expertNames.length, moduleNames.length));
}

function start() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const theme = () => setTheme(chosen ?? system.matches);
  system.addEventListener("change", theme);
  byId("theme").addEventListener("click", () => { chosen = !(chosen ?? system.matches); theme(); });
  let closed = [];  // what is only unrolled for the paper
  addEventListener("beforeprint", () => {
    setTheme(false);
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    renderTable();
  });
  addEventListener("afterprint", () => {
    theme();
    for (const details of closed) details.open = false;
  });
  theme();
  renderHeader();
  renderSummary();
  renderFilters();
  byId("token-text").classList.toggle("named", largest(routing.layers.map(layer => layer.experts.length)) > MANY);
  byId("table-box").addEventListener("toggle", renderTable);
  render();
  byId("parts").append(...Array.from(document.querySelectorAll("main > section:not([hidden])"), section =>
    make("li", {}, make("a", {href: `#${section.id}`}, section.querySelector("h2").textContent))));
  listenForTips();
  listenForTokens();
}

start();
