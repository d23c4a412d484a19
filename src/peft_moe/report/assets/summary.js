// What is said of the report as a whole, the filters, and the table of all numbers.

function renderHeader() {
  const {adapter, method, base_model: base, rows, tokens, tasks, layers} = routing;
  document.title = `Routing of ${short(adapter, 80)}`;
  byId("adapter").append(make("bdi", {}, visible(adapter)));
  const widths = [...new Set(layers.map(layer => layer.experts.length))].sort((a, b) => a - b);
  const facts = [
    ["Method", method], ["Base model", base], ["Rows", count(rows, "row")], ["Tokens", count(tokens, "token")],
    ["Tasks", tasks.length ? count(tasks.length, "task") : "none"], ["Routed layers", count(layers.length, "layer")],
    ["Experts in a layer", widths.length > 1 ? `${widths[0]} to ${widths[widths.length - 1]}` : widths[0] ?? "none"],
  ];
  byId("facts").append(...facts.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, make("bdi", {}, String(value || "unknown"))))));
}

const LEVELS = {good: ["✓", "Good"], note: ["i", "Note"], bad: ["✕", "Bad"]};

function renderSummary() {
  const order = ["bad", "note", "good"];
  const found = [...(routing.findings ?? [])].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
  byId("findings").append(...found.map(({level: given, title, text, where}) => {
    const level = Object.hasOwn(LEVELS, given) ? given : "note", [sign, word] = LEVELS[level];
    const places = where && where.length ? make("details", {}, make("summary", {}, `Where: ${count(where.length, "layer")}`),
      make("ul", {}, where.map(name => make("li", {}, name)))) : null;
    return make("li", {class: `finding ${level}`},
      make("p", {class: "level"}, make("span", {"aria-hidden": "true"}, sign), word),
      make("div", {}, make("h3", {}, short(title, 200)), make("p", {}, short(text, 2000)), places));
  }));
  byId("figures").append(...keyFigures().filter(([, value]) => isNumber(value)).map(([name, value, format]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, format(value)))));
}

function keyFigures() {
  const {layers} = routing, pairs = layers.map(closest).filter(Boolean).map(([cosine]) => cosine);
  const experts = decimals(mean(layers.map(layer => layer.experts.length)), 1).replace(/\.0$/, "");
  return [
    ["Experts in use (effective), mean of layers", mean(layers.map(effective)), value => `${decimals(value, 1)} of ${experts}`],
    ["Experts per token", mean(layers.map(layer => layer.chosen_per_token)), value => decimals(value, 1)],
    ["Largest load of an expert", layers.length ? largest(layers.map(layer => layer.load)) : null, percent],
    ["Most alike pair, |cosine|", pairs.length ? largest(pairs) : null, value => decimals(value)],
  ];
}

function renderFilters() {
  const field = (name, label, all, values, text, fewest = 2) => values.length < fewest ? null
    : chooser(`filter-${name}`, label, [["", all], ...values.map((value, i) => [i, text(value)])], "", index => {
      filters[name] = index === "" ? null : values[index];
      render();
    });
  const fields = [
    field("task", "Task", "All tasks", routing.tasks, task => task, 1),
    field("module", "Module", "All modules", moduleNames, moduleName),
    field("block", "Block", "All blocks", blocks, block => `Block ${block}`),
  ].filter(Boolean);
  byId("filters").append(...fields, make("p", {id: "shown", role: "status"}));
  byId("filters").addEventListener("submit", event => event.preventDefault());
  byId("filters").hidden = !fields.length;
}

function renderTable() {
  if (!byId("table-box").open) return;
  // How many experts a token gets is only known of all tasks.
  const columns = ["Layer", "Experts", "Ranks", "Tokens", "In use (effective)", "Entropy, nats",
    ofOneTask() ? null : "Experts per token", "Load"];
  const cells = layer => {
    const {tokens, entropy, load} = partOf(layer) ?? {tokens: 0, load: []};
    return [layer.experts.length, short(layer.ranks.join(" "), 80), tokens, decimals(effective(layer), 1), decimals(entropy),
      ofOneTask() ? null : decimals(layer.chosen_per_token, 1), load.map(percent).join(" ")].filter(value => value !== null);
  };
  scrolling(make("table", {class: "plain"},
    make("caption", {}, ofOneTask() ? `Tokens${ofTask()}` : "All tokens"),
    make("thead", {}, make("tr", {}, columns.filter(Boolean).map(name => make("th", {scope: "col"}, name)))),
    make("tbody", {}, shownLayers().map(layer => make("tr", {}, make("th", {scope: "row"}, short(layer.name, 80)),
      cells(layer).map(value => make("td", {}, String(value))))))), byId("table"));
}
