// The data, what is chosen of it, and numbers of a layer. `routing` is routing.json, `samples` are rows token by token.

const routing = JSON.parse(byId("routing-data").textContent);
const samples = JSON.parse(byId("sample-data").textContent);

// Two stacks of blocks, an encoder and a decoder, have modules of the same names: what comes before the number of the
// block tells them apart.
const stackOf = ({name, block}) => block === null ? "" : name.slice(0, Math.max(0, `${name}.`.indexOf(`.${block}.`)));
if (new Set(routing.layers.filter(({block}) => block !== null).map(stackOf)).size > 1) {
  for (const layer of routing.layers) layer.module = [stackOf(layer), layer.module].filter(Boolean).join(": ");
}

const filters = {task: null, module: null, block: null};  // null is all

// Experts by name, in the order of the layer that has most of them: the same name has the same colour everywhere.
const expertNames = [...new Set(
  [...routing.layers].sort((a, b) => b.experts.length - a.experts.length).flatMap(layer => layer.experts))];
const expertKind = name => expertNames.indexOf(name);
const expertName = name => /^\d+$/.test(name) ? `expert ${name}` : name;
const moduleNames = [...new Set(routing.layers.map(layer => layer.module))];
const moduleName = name => name === "" ? "whole block" : name;
const blocksOf = layers => [...new Set(layers.map(({block}) => block))].sort((a, b) => a - b);
const blocks = blocksOf(routing.layers.filter(({block}) => block !== null));

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
const effective = layer => {
  if (!ofOneTask()) return layer.effective_experts;
  return partOf(layer) ? Math.exp(entropyOf(partOf(layer).load)) : null;
};
// The share of weight that would have to move for one load to become the other: total variation.
const apart = (a, b) => sum(a.map((share, e) => Math.abs(share - b[e]))) / 2;
// From a task's load to the mean of the other tasks', each task counting the same, so that a task that shares no expert
// with them is at 1. A mean that contains the task itself would be nearer, the more so the larger the task is.
const taskApart = (layer, task) => {
  const own = taskOf(layer, task);
  const others = routing.tasks.filter(other => other !== task).map(other => taskOf(layer, other)).filter(Boolean);
  return own && others.length ? apart(own.load, own.load.map((_, e) => mean(others.map(({load}) => load[e])))) : null;
};
// The weight of a group among the groups, without the general expert, which is in none.
const groupLoad = (layer, g) => {
  const part = partOf(layer);
  if (!part || !layer.group_of) return null;
  if (!ofOneTask() && layer.group_load) return layer.group_load[g];
  const of = group => sum(part.load.filter((_, e) => group(layer.group_of[e])));
  const all = of(group => group >= 0);
  return all > 0 ? of(group => group === g) / all : null;
};
const meanApart = layer => mean(routing.tasks.map(task => taskApart(layer, task)).filter(isNumber));
// Of the task that is chosen, or of all.
const shownApart = layer => ofOneTask() ? taskApart(layer, filters.task) : meanApart(layer);
// The mean load of an expert in the layers that have it; part(layer) is where a layer's load is.
const meanLoad = (layers, name, part) => mean(layers.filter(layer => layer.experts.includes(name) && part(layer))
  .map(layer => part(layer).load[layer.experts.indexOf(name)]));
// The experts that tokens are given between: not a general one, which would have the largest part of every token.
function competing({experts, group_of: groups}) {
  const all = experts.map((_, e) => e), grouped = groups ? all.filter(e => groups[e] >= 0) : [];
  return grouped.length ? grouped : all;
}

// An expert that every token has is no choice, and has no colour of its own.
const general = new Set(routing.layers.flatMap(layer => {
  const between = competing(layer);
  return layer.experts.filter((_, e) => !between.includes(e));
}));
const colourOf = name => general.has(name) ? "none" : expertKind(name);
const namesIn = layers => expertNames.filter(name => layers.some(layer => layer.experts.includes(name)));
// Of all pairs of experts the one most alike, copy or mirror image: [size of the cosine, expert, expert]; null where
// nothing is known.
function closest(layer) {
  let best = null;
  (layer.similarity ?? []).forEach((row, a) => row.slice(0, a).forEach((cosine, b) => {
    if (isNumber(cosine) && (best === null || Math.abs(cosine) > best[0])) best = [Math.abs(cosine), b, a];
  }));
  return best;
}

function shownLayers() {
  return routing.layers.filter(layer => (filters.module === null || layer.module === filters.module)
    && (filters.block === null || layer.block === filters.block));
}
