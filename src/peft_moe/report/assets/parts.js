// What each part of the page shows of the layers that fit the filters.

const columnsOf = names => names.map(name => ({text: name, full: expertName(name)}));
const ofTask = () => ofOneTask() ? ` of ${short(filters.task, 40)}` : "";
const ofCell = (head, label, share) => ({head, rows: [[label, percent(share), share]]});  // a tip with one share
const scaleOf = (id, nth = 0) => byId(id).querySelectorAll(".scale")[nth];
const inPercent = names => names.length <= 16 ? value => (100 * value).toFixed(0) : null;  // written into the cells

// The layers that were chosen in a part of the page: kept when the filters change, as long as they fit them.
const chosen = {tasks: null, similarity: null};

const FAR = 0.2;  // tasks that part less than this are not drawn as if they parted much

// A map for each module: how `things` are in each of its layers, value(layer, index of the thing).
function mapsByModule(box, layers, label, things, high, value, say) {
  const modules = moduleNames.map(module => layers.filter(layer => layer.module === module)).filter(({length}) => length);
  const across = sideways(things), title = moduleNames.length > 1 || moduleNames[0] !== "";
  widen(box, across ? largest(modules.map(({length}) => length)) : things.length, across);
  box.replaceChildren(...modules.map(found => {
    const name = moduleName(found[0].module);
    return facet(title ? name : "", depthMap({label: `${label}, ${name}`, layers: found, things, high, value, say}));
  }));
}

function renderLayers(layers) {
  const high = largest(layers.map(partOf).filter(Boolean).map(({load}) => load)) || 1, names = namesIn(layers);
  const widths = new Set(layers.map(layer => layer.experts.length));  // an even share is not the same for all of several
  byId("layers-note").textContent = `Load: the share of a layer's weight${ofTask()} that goes to an expert. `
    + "The experts of a layer add up to 100%."
    + (haveOneGate(layers) ? " All layers share one gate, so that their loads are the same." : "");
  showScale(scaleOf("layers"), 0, high, percent, widths.size === 1 ? [[1 / [...widths][0], "even share"]] : []);
  mapsByModule(byId("layer-maps"), layers, "Load of experts by layer", columnsOf(names), high,
    (layer, e) => loadOf(layer, names[e]), (layer, e) => loadSays(layer, names[e]));
}

const haveOneGate = layers => routing.method === "MOELoRA" && layers.length > 1
  && new Set(layers.map(layer => JSON.stringify([layer.experts, layer.load.map(share => share.toFixed(4))]))).size === 1;

function loadSays(layer, name) {
  const e = layer.experts.indexOf(name), load = loadOf(layer, name), head = `${layer.name}, ${expertName(name)}`;
  if (e < 0) return {head, rows: [["", "no such expert in this layer"]]};
  if (load === null) return {head, rows: [["", `no token${ofTask()} came here`]]};
  const rows = [[`load${ofTask()}`, percent(load), load], ["times an even share", decimals(load * layer.experts.length)]];
  if (!ofOneTask()) {
    rows.push(["strongest expert of", `${percent(layer.top1[e])} of tokens`],
      ["has weight in", `${percent(layer.chosen[e])} of tokens`]);
  }
  return {head, rows: [...rows, ["rank", String(layer.ranks[e])]]};
}

function renderTasks(layers) {
  const tasks = routing.tasks.filter(task => !ofOneTask() || task === filters.task);
  byId("tasks").hidden = !routing.tasks.length;
  if (!routing.tasks.length) return;
  taskChooser(layers, tasks);
  byId("apart").hidden = routing.tasks.length < 2;
  const far = Math.max(FAR, largest(layers.map(layer => tasks.map(task => taskApart(layer, task)))));
  showScale(scaleOf("tasks", 1), 0, far, percent);
  mapsByModule(byId("apart-maps"), layers, "How far tasks part by layer", tasks.map(task => ({text: task})), far,
    (layer, t) => taskApart(layer, tasks[t]),
    (layer, t) => ofCell(`${layer.name}, ${tasks[t]}`, "apart from other tasks", taskApart(layer, tasks[t])));
}

// Experts of one number in two layers have nothing to do with each other, so a mean of layers would hide what a single
// layer does: the map starts with the layer where tasks part most. AT-MoE's experts are the same in all layers.
function taskChooser(layers, tasks) {
  const most = layers.reduce((best, layer) => best === null || shownApart(layer) > shownApart(best) ? layer : best, null);
  const remark = ofOneTask() ? `${short(filters.task, 24)} parts most: ` : "Tasks part most: ";
  const options = layers.map((layer, i) => [i, (layer === most && layers.length > 1 ? remark : "") + layer.name]);
  const show = value => {
    const found = value === "" ? layers : [layers[value]];
    byId("tasks-note").textContent = "The share of a task's weight that goes to an expert, in percent. A task adds up to 100."
      + (found.length > 1 && !routing.groups
        ? " Experts of one number in two layers are different experts, so that a mean of layers says little." : "");
    showTaskMap(found, tasks);
  };
  let start = routing.groups || layers.length < 2 ? "" : layers.indexOf(most);
  if (chosen.tasks === "mean" || layers.length < 2) start = "";
  else if (layers.includes(chosen.tasks)) start = layers.indexOf(chosen.tasks);
  const choose = value => { chosen.tasks = value === "" ? "mean" : layers[value]; show(value); };
  byId("task-controls").replaceChildren(...(layers.length < 2 ? [] : [
    chooser("task-layer", "Layer", [["", `Mean of ${count(layers.length, "layer")}`], ...options], start, choose)]));
  show(start);
}

function showTaskMap(layers, tasks) {
  const names = namesIn(layers), loads = tasks.map(task => names.map(name => meanLoad(layers, name, layer => taskOf(layer, task))));
  const high = largest(loads) || 1;
  showScale(scaleOf("tasks"), 0, high, percent);
  byId("task-map").replaceChildren(heatMap({
    label: "Load of experts by task", rows: tasks.map(task => ({text: task})), columns: columnsOf(names), high,
    numbers: inPercent(names), value: (r, c) => loads[r][c],
    say: (r, c) => ofCell(`${tasks[r]}, ${expertName(names[c])}`, "load", loads[r][c])}));
}

function renderGroups(layers) {
  const grouped = layers.filter(layer => layer.group_of), names = namesIn(grouped);
  byId("groups").hidden = !routing.groups;
  if (!routing.groups) return;
  // The general expert is in no group, and has a row of its own.
  const general = grouped.some(layer => layer.group_of.includes(-1));
  const groups = [...routing.groups.map((name, g) => [g, name]), ...(general ? [[-1, "no group"]] : [])];
  const things = groups.map(([, name]) => ({text: name}));
  const inGroup = (name, g) => grouped.some(layer => layer.group_of[layer.experts.indexOf(name)] === g);
  const loads = groups.map(([g]) => names.map(name => inGroup(name, g) ? meanLoad(grouped, name, partOf) : null));
  const high = largest(loads) || 1;
  byId("groups-note").textContent = `The share of all weight${ofTask()} that goes to each expert of a group, in percent: `
    + `the mean of ${count(grouped.length, "layer")}.`;
  showScale(scaleOf("groups"), 0, high, percent);
  byId("group-map").replaceChildren(heatMap({
    label: "Load of experts by group", rows: things, columns: columnsOf(names), high, numbers: inPercent(names),
    value: (r, c) => loads[r][c],
    say: (r, c) => {
      const head = `${groups[r][1]}, ${expertName(names[c])}`;
      return loads[r][c] === null ? {head, rows: [["", "not in this group"]]} : ofCell(head, "load", loads[r][c]);
    }}));
  const named = routing.groups, most = largest(grouped.map(layer => named.map((_, g) => groupLoad(layer, g)))) || 1;
  showScale(scaleOf("groups", 1), 0, most, percent);
  mapsByModule(byId("group-depth"), grouped, "Weight of groups by layer", named.map(name => ({text: name})), most, groupLoad,
    (layer, g) => ofCell(`${layer.name}, ${named[g]}`, `weight${ofTask()}`, groupLoad(layer, g)));
}

// How many experts a token gets at most, which limits the entropy of its weights.
const mostOfToken = layers => Math.max(2, Math.round(largest(layers.map(layer => layer.chosen_per_token ?? layer.experts.length))));

// What is drawn by depth: {title, value(layer), format, axis, high}; no `high` is the largest value, or `least`.
function depthFigures(layers) {
  const most = largest(layers.map(layer => layer.experts.length), 2), one = value => decimals(value, 1), two = value => decimals(value);
  const of = ofOneTask() ? ` (task ${short(filters.task, 40)})` : "";
  const figures = [
    {title: `Experts in use (effective)${of}`, value: effective, format: one, high: most},
    {title: `Entropy of a token's weights, nats${of}`, value: layer => partOf(layer)?.entropy, format: two, high: Math.log(mostOfToken(layers))},
    {title: `Largest load of an expert${of}`, value: layer => partOf(layer) ? largest(partOf(layer).load) : null,
      format: percent, axis: wholePercent, high: 1},
  ];
  if (routing.tasks.length > 1) {
    const title = ofOneTask() ? `How far ${short(filters.task, 40)} parts from other tasks` : "How far tasks part, mean";
    figures.push({title, value: shownApart, format: percent, axis: wholePercent, least: FAR});
  }
  if (layers.some(closest)) {
    figures.push({title: "Most alike pair of experts, |cosine|", value: layer => closest(layer)?.[0], format: two, high: 1});
  }
  return layers.length ? figures : [];
}

function renderDepth(layers) {
  byId("depth").hidden = routing.layers.length < 2;
  const most = mostOfToken(layers);
  byId("entropy-note").textContent = `ln ${most} = ${decimals(Math.log(most))} if the ${most} experts that a token gets weigh the same`;
  // Lines need a place on the axis: the block, or, if a name has none, the layer.
  const numbered = layers.every(({block}) => block !== null), xName = numbered ? "Block" : "Layer";
  const places = numbered ? blocksOf(layers) : layers, xs = places.map(place => numbered ? String(place) : place.name);
  const modules = numbered ? moduleNames.filter(name => layers.some(({module}) => module === name)) : [""];
  const layerAt = (place, module) => numbered ? layers.find(layer => layer.block === place && layer.module === module) : place;
  const lines = modules.map(module => ({
    name: modules.length > 1 ? moduleName(module) : "", line: Math.max(0, moduleNames.indexOf(module)),
    layers: places.map(place => layerAt(place, module))}));
  byId("depth-charts").replaceChildren(...depthFigures(layers).map(({title, value, format, axis, high, least = 0}) => {
    const series = lines.map(line => ({...line, points: line.layers.map(layer => layer ? value(layer) ?? null : null)}));
    const top = high ?? (Math.max(least, largest(series.map(({points}) => points))) || 1);
    return lineChart({title, xs, xName, series, format, axis, high: top});
  }));
  byId("depth-legend").replaceChildren(...(modules.length > 1 ? lines : []).map(({name, line}) => {
    const stroke = draw("svg", {viewBox: "0 0 28 10", class: `line dash${line % 4}`, "aria-hidden": "true"}, draw("path", {d: "M1 5H27"}));
    stroke.style.setProperty("--line", `var(--l${line})`);
    return make("span", {class: "key"}, stroke, short(name));
  }));
}

function renderSimilarity(layers) {
  const known = layers.filter(layer => layer.similarity), pairs = known.map(closest);
  byId("similarity").hidden = !routing.layers.some(layer => layer.similarity);
  for (const id of ["similarity-controls", "similarity-map"]) byId(id).replaceChildren();
  scaleOf("similarity").hidden = !known.length;
  byId("similarity-note").textContent = "No layer fits the filters.";
  if (!known.length) return;
  const most = pairs.reduce((best, pair, i) => pair && (!pairs[best] || pair[0] > pairs[best][0]) ? i : best, 0);
  const options = known.map((layer, i) => [i, (i === most && known.length > 1 ? "Most alike: " : "") + layer.name]);
  const show = i => showSimilarity(known[i], pairs[i]);
  const start = known.includes(chosen.similarity) ? known.indexOf(chosen.similarity) : most;
  const choose = i => { chosen.similarity = known[i]; show(i); };
  byId("similarity-controls").append(chooser("similarity-layer", "Layer", options, start, choose));
  showScale(scaleOf("similarity"), 0, 1, value => decimals(value));
  show(start);
}

function showSimilarity({name, experts, similarity}, pair) {
  const columns = columnsOf(experts), size = (r, c) => isNumber(similarity[r][c]) ? Math.abs(similarity[r][c]) : null;
  const mirrored = pair !== null && similarity[pair[1]][pair[2]] < 0;
  byId("similarity-note").textContent = pair === null ? "There is nothing to compare here."
    : `Most alike here: ${pair.slice(1).map(e => expertName(experts[e])).join(" and ")}, `
      + `cosine ${decimals(similarity[pair[1]][pair[2]])}${mirrored ? ", as a mirror image" : ""}.`;
  byId("similarity-map").replaceChildren(heatMap({
    label: `Size of the cosine of experts in ${name}`, rows: columns, columns, high: 1,
    numbers: experts.length <= 12 ? value => decimals(value) : null, value: size,
    say: (r, c) => ({head: `${expertName(experts[r])} and ${expertName(experts[c])}`, rows: [["cosine", decimals(similarity[r][c])]]})}));
}
