// Heat maps as tables, and line charts by depth. Both take plain functions, and know nothing about routing.

// rows, columns: {text, full} · value(r, c): number, or null where there is nothing · say(r, c): {head, rows}, its tip
function heatMap({label, corner = "", rows, columns, value, say, low = 0, high, numbers = null}) {
  const tall = columns.some(column => Array.from(column.text).length > 3);
  const table = make("table", {role: "grid", class: `map${tall ? " tall" : ""}${numbers ? " numbers" : ""}`,
    "aria-label": visible(label), "data-items": ""});
  const head = make("tr", {}, make("th", {scope: "col"}, corner), columns.map(({text, full}) =>
    make("th", {scope: "col", title: visible(full ?? text).slice(0, 300)}, make("span", {}, short(text, 24)))));
  const body = make("tbody", {}, rows.map(({text, full}, r) => make("tr", {},
    make("th", {scope: "row", title: visible(full ?? text).slice(0, 300)}, short(text, 28)),
    columns.map((_, c) => mapCell(value(r, c), sentence(say(r, c)), low, high, numbers)))));
  table.append(make("thead", {}, head), body);
  const first = table.querySelector("[data-item]");
  if (first) first.setAttribute("tabindex", "0");
  // Characters of a label: on paper, the columns share what is left.
  table.style.setProperty("--label", Math.min(28, largest(rows.map(({text}) => text.length), 4)));
  said.set(table, cell => say(cell.parentNode.rowIndex - 1, cell.cellIndex - 1));
  return scrolling(table);
}

// ---- tables that may be wider or higher than their place
const sizes = new ResizeObserver(entries => entries.forEach(({target}) => {
  const box = target.parentElement, label = target.querySelector("tbody th");
  if (box === null || label === null) return;
  // A cell that is gone to comes out from under the labels, which stay in place, and from the faded edges.
  box.style.scrollPadding = `${target.tHead.offsetHeight + 6}px 1.6rem 1.6rem ${label.offsetWidth + 12}px`;
  fade(box);
}));

// Edges fade where there is more to scroll to.
function fade(box) {
  box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 4);
  box.classList.toggle("below", box.scrollTop + box.clientHeight < box.scrollHeight - 4);
}

function scrolling(table, box = make("div", {class: "scroll"})) {
  box.replaceChildren(table);
  box.onscroll = () => fade(box);
  sizes.observe(table);
  return box;
}

function mapCell(value, words, low, high, numbers) {
  const known = isNumber(value);
  const cell = make("td", {tabindex: "-1", "data-item": "", "aria-label": visible(words), class: known ? null : "none"},
    known && numbers ? numbers(value) : null);
  if (known) {
    const level = step(value, low, high);
    cell.style.background = `var(--c${level})`;
    cell.style.color = `var(--t${level})`;
  }
  return cell;
}

// Puts the key to a map's colours above it. marks: [value, text], between the ends.
function showScale(section, low, high, format, marks = []) {
  const bar = make("div", {class: "ramp"}, marks.filter(([value]) => value > low && value < high).map(([value, text]) => {
    const mark = make("span", {class: "mark"}, make("span", {}, text));
    mark.style.left = `${(100 * (value - low) / (high - low)).toFixed(2)}%`;
    return mark;
  }));
  section.classList.toggle("marked", marks.length > 0);
  section.replaceChildren(make("span", {}, format(low)), bar, make("span", {}, format(high)));
}

// The largest number of a nested list; `least` where there is none.
const largest = (numbers, least = 0) => numbers.flat().reduce((a, b) => isNumber(b) && b > a ? b : a, least);

// Things (experts, tasks, groups) by layer. Depth goes down; across, if the things' names need to be read along a row.
function depthMap({label, layers, things, high, value, say}) {
  const rows = layers.map(layer => ({text: layer.block === null ? layer.name : String(layer.block), full: layer.name}));
  const map = sideways(things) ? {rows: things, columns: rows, value: (r, c) => value(layers[c], r), say: (r, c) => say(layers[c], r)}
    : {rows, columns: things, value: (r, c) => value(layers[r], c), say: (r, c) => say(layers[r], c)};
  return heatMap({label, corner: layers.every(layer => layer.block !== null) ? "block" : "", high, ...map});
}

const sideways = things => things.some(({text}) => Array.from(text).length > 4);

// How wide a figure of facets should make its columns, for that many cells in a row.
function widen(box, cells, names) {
  box.style.setProperty("--columns", `${Math.min(70, Math.max(12, 1.7 * cells + (names ? 8 : 3))).toFixed(1)}rem`);
}

function facet(title, content) {
  const caption = title ? make("figcaption", {title: visible(title).slice(0, 300)}, short(title)) : null;
  return make("figure", {class: "facet"}, caption, content);
}

const CHART = {width: 360, height: 200, left: 44, right: 10, top: 10, bottom: 32};

// xs: names of places from left to right · series: {name, line, points: number or null for each place}
function lineChart({title, xs, xName, series, format, axis = format, high}) {
  const {width, height, left, right, top, bottom} = CHART;
  const x = i => left + (xs.length > 1 ? i / (xs.length - 1) : 0.5) * (width - left - right);
  const y = value => top + (1 - value / high) * (height - top - bottom);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "group", "data-items": "",
    "aria-label": visible(`${title}. Arrow keys go through the depth.`)});
  for (const part of [0, 0.5, 1]) {
    svg.append(draw("line", {class: "rule", x1: left, x2: width - right, y1: y(part * high), y2: y(part * high)}),
      draw("text", {x: left - 6, y: y(part * high) + 4, "text-anchor": "end"}, axis(part * high)));
  }
  svg.append(draw("text", {x: left, y: height - 8}, short(xs[0], 16)),
    draw("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle"}, xs.length > 1 ? xName : ""));
  if (xs.length > 1) svg.append(draw("text", {x: width - right, y: height - 8, "text-anchor": "end"}, short(xs[xs.length - 1], 16)));
  for (const {line, points} of series) svg.append(lineOf(points, line, x, y, xs.length <= 40));
  svg.append(...hitAreas(xs, x, say));
  said.set(svg, area => say(Number(area.getAttribute("data-item"))));
  return make("figure", {class: "card chart"}, make("figcaption", {}, title), svg);

  function say(i) {
    const known = series.filter(({points}) => isNumber(points[i]));
    const rows = known.map(({name, points}) => [name || title, format(points[i])]);
    return {head: `${xName} ${xs[i]}`, rows: rows.length ? rows : [[title, "–"]]};
  }
}

function lineOf(points, line, x, y, dots) {
  const parts = [];
  points.forEach((value, i) => {
    if (isNumber(value)) parts.push(`${isNumber(points[i - 1]) ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`);
  });
  // Dashes too, for those who do not see the hues.
  const shape = draw("g", {class: `line dash${line % 4}`}, draw("path", {d: parts.join("")}));
  // A point without a neighbour has no line.
  const alone = i => !isNumber(points[i - 1]) && !isNumber(points[i + 1]);
  points.forEach((value, i) => {
    if (isNumber(value) && (dots || alone(i))) shape.append(draw("circle", {cx: x(i), cy: y(value), r: 2.5}));
  });
  shape.style.setProperty("--line", `var(--l${line})`);
  return shape;
}

// An area over each place that can be pointed at and gone to.
function hitAreas(xs, x, say) {
  const half = xs.length > 1 ? (x(1) - x(0)) / 2 : 40;
  return xs.map((_, i) => draw("rect", {class: "hit", x: x(i) - half, y: CHART.top, width: 2 * half, role: "img",
    height: CHART.height - CHART.top - CHART.bottom, "data-item": i, tabindex: i ? "-1" : "0", "aria-label": visible(sentence(say(i)))}));
}
