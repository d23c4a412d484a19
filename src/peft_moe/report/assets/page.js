// What the parts of the page show. `routing` is routing.json, `samples` are rows with the weights of their tokens.

const routing = JSON.parse(byId("routing-data").textContent);
const samples = JSON.parse(byId("sample-data").textContent);
const filters = {task: null, module: null, block: null};  // null is all

// Experts by name, in the order of the layer that has most of them: the same name has the same colour everywhere.
const expertNames = [...new Set([...routing.layers].sort((a, b) => b.experts.length - a.experts.length).flatMap(layer => layer.experts))];
const expertKind = name => expertNames.indexOf(name);
const expertName = name => /^\d+$/.test(name) ? `expert ${name}` : name;
const moduleNames = [...new Set(routing.layers.map(layer => layer.module))];
const moduleName = name => name === "" ? "whole block" : name;
const blocks = [...new Set(routing.layers.map(layer => layer.block).filter(block => block !== null))].sort((a, b) => a - b);

// ---- numbers of a layer, of all rows or of the task that is chosen
const ofOneTask = () => filters.task !== null;
// A task may have any name, that of a property of all objects too.
const taskOf = (layer, task) => layer.tasks && Object.hasOwn(layer.tasks, task) ? layer.tasks[task] : null;
const partOf = layer => ofOneTask() ? taskOf(layer, filters.task) : layer;
const loadOf = (layer, name) => {
  const part = partOf(layer), e = layer.experts.indexOf(name);
  return part && e >= 0 ? part.load[e] : null;
};
const entropyOf = load => -sum(load.filter(share => share > 0).map(share => share * Math.log(share)));
const effective = layer => !ofOneTask() ? layer.effective_experts : partOf(layer) ? Math.exp(entropyOf(partOf(layer).load)) : null;
// The share of weight that would have to move for one load to become the other.
const apart = (a, b) => sum(a.map((share, e) => Math.abs(share - b[e]))) / 2;
const taskApart = (layer, task) => taskOf(layer, task) ? apart(taskOf(layer, task).load, layer.load) : null;
const groupLoad = (layer, g) => {
  const part = partOf(layer);
  if (!part || !layer.group_of) return null;
  return g >= 0 && !ofOneTask() && layer.group_load ? layer.group_load[g] : sum(part.load.filter((_, e) => layer.group_of[e] === g));
};
// Of all pairs of experts the one with the largest cosine: [cosine, expert, expert]; null where nothing is known.
function closest(layer) {
  let best = null;
  (layer.similarity ?? []).forEach((row, a) => row.slice(0, a).forEach((cosine, b) => {
    if (isNumber(cosine) && (best === null || cosine > best[0])) best = [cosine, b, a];
  }));
  return best;
}

function shownLayers() {
  return routing.layers.filter(layer => (filters.module === null || layer.module === filters.module)
    && (filters.block === null || layer.block === filters.block));
}

const columnsOf = names => names.map(name => ({text: name, full: expertName(name)}));
const ofTask = () => ofOneTask() ? ` of ${short(filters.task, 40)}` : "";

// A map for each module: how `things` are in each of its layers, value(layer, index of the thing).
function mapsByModule(box, layers, label, things, high, value, say) {
  const figures = moduleNames.map(module => layers.filter(layer => layer.module === module)).filter(found => found.length)
    .map(found => facet(moduleNames.length > 1 || found[0].module ? moduleName(found[0].module) : "",
      depthMap({label: `${label}, ${moduleName(found[0].module)}`, layers: found, things, high, value, say})));
  const across = sideways(things);
  widen(box, across ? largest(moduleNames.map(name => layers.filter(({module}) => module === name).length)) : things.length, across);
  box.replaceChildren(...figures);
}

// ---- the parts
function renderHeader() {
  const {adapter, method, base_model: base, rows, tokens, tasks, layers} = routing;
  document.title = `Routing of ${short(adapter, 80)}`;
  byId("adapter").append(make("bdi", {}, visible(adapter)));
  const widths = [...new Set(layers.map(layer => layer.experts.length))].sort((a, b) => a - b);
  const facts = [["Method", method], ["Base model", base], ["Rows", count(rows, "row")], ["Tokens", count(tokens, "token")],
    ["Tasks", tasks.length ? count(tasks.length, "task") : "none"], ["Routed layers", count(layers.length, "layer")],
    ["Experts in a layer", widths.length > 1 ? `${widths[0]} to ${widths[widths.length - 1]}` : widths.length ? widths[0] : "none"]];
  byId("facts").append(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, make("bdi", {}, String(value ?? "unknown"))))));
}

const LEVELS = {good: ["✓", "Good"], note: ["i", "Note"], bad: ["✕", "Bad"]};

function renderSummary() {
  const order = ["bad", "note", "good"], {layers} = routing;
  const found = [...(routing.findings ?? [])].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
  byId("findings").append(...found.map(finding => {
    const level = Object.hasOwn(LEVELS, finding.level) ? finding.level : "note", [sign, word] = LEVELS[level], where = finding.where ?? [];
    return make("li", {class: `finding ${level}`},
      make("p", {class: "level"}, make("span", {"aria-hidden": "true"}, sign), word),
      make("div", {}, make("h3", {}, short(finding.title, 200)), make("p", {}, short(finding.text, 2000)),
        where.length ? make("details", {}, make("summary", {}, `Where: ${count(where.length, "layer")}`),
          make("ul", {}, where.map(name => make("li", {}, visible(name))))) : null));
  }));
  const pairs = layers.map(closest).filter(Boolean).map(([cosine]) => cosine);
  const figures = [["Experts in use, mean of layers", mean(layers.map(layer => layer.effective_experts)), value =>
    `${decimals(value, 1)} of ${decimals(mean(layers.map(layer => layer.experts.length)), 1).replace(/\.0$/, "")}`],
  ["Experts per token", mean(layers.map(layer => layer.chosen_per_token)), value => decimals(value, 1)],
  ["Largest load of an expert", layers.length ? largest(layers.map(layer => layer.load)) : null, percent],
  ["Most alike pair, cosine", pairs.length ? largest(pairs, -1) : null, value => decimals(value)]];
  byId("figures").append(...figures.filter(([, value]) => isNumber(value))
    .map(([name, value, format]) => make("div", {}, make("dt", {}, name), make("dd", {}, format(value)))));
}

function renderFilters() {
  const field = (name, label, all, values, text) => values.length < 2 && name !== "task" || !values.length ? null
    : chooser(`filter-${name}`, label, [["", all], ...values.map((value, i) => [i, text(value)])], "", chosen => {
      filters[name] = chosen === "" ? null : values[chosen];
      render();
    });
  const fields = [field("task", "Task", "All tasks", routing.tasks, task => task),
    field("module", "Module", "All modules", moduleNames, moduleName),
    field("block", "Block", "All blocks", blocks, block => `Block ${block}`)].filter(Boolean);
  byId("filters").append(...fields, make("p", {id: "shown", role: "status"}));
  byId("filters").addEventListener("submit", event => event.preventDefault());
  byId("filters").hidden = !fields.length;
}

function renderLayers(layers) {
  const part = layers.map(partOf).filter(Boolean), high = largest(part.map(({load}) => load)) || 1;
  byId("layers-note").textContent = `Load: the share of a layer's weight${ofTask()} that goes to an expert. `
    + "The experts of a layer add up to 100%.";
  const even = 1 / largest(layers.map(layer => layer.experts.length), 1);
  showScale(byId("layers").querySelector(".scale"), 0, high, percent, [[even, "even share"]]);
  const names = expertNames.filter(name => layers.some(layer => layer.experts.includes(name)));
  mapsByModule(byId("layer-maps"), layers, "Load of experts by layer", columnsOf(names), high,
    (layer, e) => loadOf(layer, names[e]), (layer, e) => loadSays(layer, names[e]));
}

function loadSays(layer, name) {
  const e = layer.experts.indexOf(name), load = loadOf(layer, name), head = `${layer.name}, ${expertName(name)}`;
  if (e < 0) return {head, rows: [["", "no such expert in this layer"]]};
  if (load === null) return {head, rows: [["", `no token${ofTask()} came here`]]};
  const rows = [[`load${ofTask()}`, percent(load), load], ["times an even share", decimals(load * layer.experts.length)]];
  if (!ofOneTask()) rows.push(["weighed most by", `${percent(layer.top1[e])} of tokens`], ["given weight by", `${percent(layer.chosen[e])} of tokens`]);
  return {head, rows: layer.ranks ? [...rows, ["rank", String(layer.ranks[e])]] : rows};
}

const meanLoad = (layers, name, load) => mean(layers.map(layer => {
  const e = layer.experts.indexOf(name), part = load(layer);
  return e >= 0 && part ? part[e] : null;
}).filter(isNumber));

function renderTasks(layers) {
  const tasks = routing.tasks.filter(task => !ofOneTask() || task === filters.task), section = byId("tasks");
  section.hidden = !routing.tasks.length;
  if (section.hidden) return;
  taskChooser(layers, tasks);
  const far = largest(layers.map(layer => tasks.map(task => taskApart(layer, task)))) || 1;
  showScale(section.querySelectorAll(".scale")[1], 0, far, percent);
  mapsByModule(byId("apart-maps"), layers, "How far tasks part by layer", tasks.map(task => ({text: task})), far,
    (layer, t) => taskApart(layer, tasks[t]),
    (layer, t) => ({head: `${layer.name}, ${tasks[t]}`, rows: [["apart from all tasks", percent(taskApart(layer, tasks[t])), taskApart(layer, tasks[t])]]}));
}

const meanApart = layer => mean(routing.tasks.map(task => taskApart(layer, task)).filter(isNumber));

// Experts of one number in two layers have nothing to do with each other, so a mean of layers would hide what a single
// layer does: the map starts with the layer where tasks part most. AT-MoE's experts are the same in all layers.
function taskChooser(layers, tasks) {
  const most = layers.reduce((best, layer) => best === null || meanApart(layer) > meanApart(best) ? layer : best, null);
  const start = routing.groups || !layers.length ? "" : layers.indexOf(most);
  const options = [["", `Mean of ${count(layers.length, "layer")}`], ...layers.map((layer, i) => [i, layer.name + (layer === most ? " (tasks part most)" : "")])];
  const show = value => {
    const chosen = value === "" ? layers : [layers[value]];
    byId("tasks-note").textContent = `The share of a task's weight that goes to an expert, in percent. A task adds up to 100.${
      chosen.length > 1 && !routing.groups ? " Experts of one number in two layers are different experts, so that a mean of layers says little." : ""}`;
    showTaskMap(chosen, tasks);
  };
  byId("task-controls").replaceChildren(layers.length > 1 ? chooser("task-layer", "Layer", options, start, show) : "");
  show(layers.length > 1 ? start : "");
}

function showTaskMap(layers, tasks) {
  const names = expertNames.filter(name => layers.some(layer => layer.experts.includes(name)));
  const loads = tasks.map(task => names.map(name => meanLoad(layers, name, layer => taskOf(layer, task)?.load)));
  const high = largest(loads) || 1;
  showScale(byId("tasks").querySelector(".scale"), 0, high, percent);
  byId("task-map").replaceChildren(heatMap({label: "Load of experts by task", rows: tasks.map(task => ({text: task})), columns: columnsOf(names), high,
    numbers: names.length <= 16 ? value => (100 * value).toFixed(0) : null, value: (r, c) => loads[r][c],
    say: (r, c) => ({head: `${tasks[r]}, ${expertName(names[c])}`, rows: [["load", percent(loads[r][c]), loads[r][c]]]})}));
}

function renderGroups(layers) {
  const grouped = layers.filter(layer => layer.group_of);
  byId("groups").hidden = !routing.groups;
  if (!routing.groups) return;
  // The general expert is in no group, and has a row and a column of its own.
  const general = grouped.some(layer => layer.group_of.includes(-1));
  const groups = [...routing.groups.map((name, g) => [g, name]), ...(general ? [[-1, "no group"]] : [])];
  const names = expertNames.filter(name => grouped.some(layer => layer.experts.includes(name)));
  const inGroup = (name, g) => grouped.some(layer => layer.group_of[layer.experts.indexOf(name)] === g);
  const loads = groups.map(([g]) => names.map(name => inGroup(name, g) ? meanLoad(grouped, name, layer => partOf(layer)?.load) : null));
  const columns = groups.map(([, name]) => ({text: name})), high = largest(loads) || 1;
  byId("groups-note").textContent = `The share of all weight${ofTask()} that goes to each expert of a group, in percent: the mean of ${count(grouped.length, "layer")}.`;
  showScale(byId("groups").querySelectorAll(".scale")[0], 0, high, percent);
  byId("group-map").replaceChildren(heatMap({label: "Load of experts by group", rows: columns, columns: columnsOf(names), high,
    numbers: names.length <= 16 ? value => (100 * value).toFixed(0) : null, value: (r, c) => loads[r][c],
    say: (r, c) => ({head: `${groups[r][1]}, ${expertName(names[c])}`, rows: loads[r][c] === null ? [["", "not in this group"]] : [["load", percent(loads[r][c]), loads[r][c]]]})}));
  const most = largest(grouped.map(layer => groups.map(([g]) => groupLoad(layer, g)))) || 1;
  showScale(byId("groups").querySelectorAll(".scale")[1], 0, most, percent);
  mapsByModule(byId("group-depth"), grouped, "Load of groups by layer", columns, most,
    (layer, g) => groupLoad(layer, groups[g][0]),
    (layer, g) => ({head: `${layer.name}, ${groups[g][1]}`, rows: [[`load${ofTask()}`, percent(groupLoad(layer, groups[g][0])), groupLoad(layer, groups[g][0])]]}));
}

function renderDepth(layers) {
  // Lines need a place on the axis: the block, or, if a name has none, the layer.
  const numbered = layers.every(layer => layer.block !== null);
  const places = numbered ? [...new Set(layers.map(layer => layer.block))].sort((a, b) => a - b) : layers;
  const modules = numbered ? moduleNames.filter(name => layers.some(layer => layer.module === name)) : [""];
  const at = new Map(layers.map(layer => [numbered ? `${layer.block} ${layer.module}` : layer, layer]));
  const charts = [["Experts in use", effective, value => decimals(value, 1), largest(layers.map(layer => layer.experts.length), 1)],
    ["Entropy of a token's weights, nats", layer => partOf(layer)?.entropy ?? null, decimals, Math.log(largest(layers.map(layer => layer.experts.length), 2))],
    ["Largest load of an expert", layer => partOf(layer) ? largest(partOf(layer).load) : null, percent, 1]];
  if (routing.tasks.length > 1) charts.push(["How far tasks part, mean", meanApart, percent, null]);
  if (layers.some(closest)) charts.push(["Most alike pair of experts, cosine", layer => closest(layer)?.[0] ?? null, decimals, 1]);
  byId("depth").hidden = routing.layers.length < 2;
  byId("depth-charts").replaceChildren(...(layers.length ? charts : []).map(([title, value, format, top]) => {
    const series = modules.map(module => ({name: modules.length > 1 ? moduleName(module) : "", line: Math.max(0, moduleNames.indexOf(module)), points: places.map(place => {
      const layer = at.get(numbered ? `${place} ${module}` : place);
      const number = layer ? value(layer) : null;
      return isNumber(number) ? Math.max(0, number) : null;
    })}));
    return lineChart({title, xs: places.map(place => numbered ? String(place) : place.name), xName: numbered ? "Block" : "Layer", series,
      format: number => format(number), axis: format === percent ? wholePercent : number => format(number), high: top ?? (largest(series.map(({points}) => points)) || 1)});
  }));
  byId("depth-legend").replaceChildren(...(modules.length > 1 ? modules : []).map(module => {
    const line = moduleNames.indexOf(module), sample = draw("svg", {viewBox: "0 0 28 10", class: `line dash${line % 4}`, "aria-hidden": "true"}, draw("path", {d: "M1 5H27"}));
    sample.style.setProperty("--line", `var(--l${line})`);
    return make("span", {class: "key"}, sample, short(moduleName(module)));
  }));
}

function renderSimilarity(layers) {
  const known = layers.filter(layer => layer.similarity), section = byId("similarity");
  section.hidden = !routing.layers.some(layer => layer.similarity);
  if (section.hidden) return;
  byId("similarity-controls").replaceChildren();
  byId("similarity-map").replaceChildren();
  section.querySelector(".scale").hidden = !known.length;
  byId("similarity-note").textContent = known.length ? "" : "No layer fits the filters.";
  if (!known.length) return;
  const show = index => {
    const {name, experts, similarity} = known[index], pair = closest(known[index]), columns = columnsOf(experts);
    byId("similarity-note").textContent = pair ? `Most alike here: ${expertName(experts[pair[1]])} and ${expertName(experts[pair[2]])}, cosine ${decimals(pair[0])}.` : "There is nothing to compare here.";
    byId("similarity-map").replaceChildren(heatMap({label: `Cosine of experts in ${name}`, rows: columns, columns, high: 1,
      numbers: experts.length <= 12 ? decimals : null, value: (r, c) => similarity[r][c],
      say: (r, c) => ({head: `${expertName(experts[r])} and ${expertName(experts[c])}`, rows: [["cosine", decimals(similarity[r][c])]]})}));
  };
  const most = known.map(closest).reduce((best, pair, i, pairs) => pair && (best < 0 || pair[0] > pairs[best][0]) ? i : best, -1);
  byId("similarity-controls").append(chooser("similarity-layer", "Layer", known.map((layer, i) => [i, layer.name + (i === most ? " (most alike)" : "")]), Math.max(0, most), value => show(Number(value))));
  showScale(section.querySelector(".scale"), 0, 1, decimals);
  show(Math.max(0, most));
}

function renderTable() {
  if (!byId("table-box").open) return;
  const columns = ["Layer", "Experts", "Ranks", "Tokens", "In use", "Entropy, nats", "Per token", "Load"];
  byId("table").replaceChildren(make("table", {class: "plain"}, make("thead", {}, make("tr", {}, columns.map(name => make("th", {scope: "col"}, name)))),
    make("tbody", {}, shownLayers().map(layer => make("tr", {}, make("th", {scope: "row"}, short(layer.name, 80)),
      [layer.experts.length, short((layer.ranks ?? []).join(" "), 80), layer.tokens, decimals(layer.effective_experts, 1), decimals(layer.entropy),
        decimals(layer.chosen_per_token, 1), layer.load.map(percent).join(" ")].map(value => make("td", {}, String(value))))))));
}

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
  addEventListener("beforeprint", () => setTheme(false));
  addEventListener("afterprint", theme);
  theme();
  renderHeader();
  renderSummary();
  renderFilters();
  byId("table-box").addEventListener("toggle", renderTable);
  render();
  byId("parts").append(...Array.from(document.querySelectorAll("main > section:not([hidden])"), section =>
    make("li", {}, make("a", {href: `#${section.id}`}, section.querySelector("h2").textContent))));
  listenForTips();
  listenForTokens();
}

start();
