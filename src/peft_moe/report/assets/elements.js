// Elements, the tooltip, and moving with the arrow keys. All text is set as text: nothing is ever parsed as HTML.

// Characters that would reorder or hide the text around them, or be nothing to see, are shown by their number instead.
const UNSEEN = new RegExp("[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u180e\\u200b\\u200e\\u200f"
  + "\\u202a-\\u202e\\u2060-\\u2064\\u2066-\\u2069\\u3164\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]", "gu");
const byNumber = character => `[U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
const visible = text => String(text).replace(UNSEEN, byNumber);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : visible(child));
  }
  return element;
}

const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const byId = id => document.getElementById(id);

const SHORT = 60;  // characters of a name where there is little room
const short = (text, most = SHORT) => {
  const characters = Array.from(visible(text).slice(0, 4 * most + 4));
  return characters.length > most ? characters.slice(0, most - 1).join("") + "…" : characters.join("");
};

const isNumber = value => typeof value === "number" && Number.isFinite(value);
const wholePercent = value => isNumber(value) ? `${Math.round(100 * value)}%` : "–";
const percent = value => isNumber(value) ? `${(100 * value).toFixed(1)}%` : "–";
const decimals = (value, digits = 2) => isNumber(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "–";
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const mean = numbers => numbers.length ? sum(numbers) / numbers.length : null;

// A labelled <select>. `options` are [value, text] pairs; what tells them apart should come first, as lists are narrow.
function chooser(id, label, options, chosen, onChange) {
  const select = make("select", {id}, options.map(([value, text]) => make("option", {value}, short(text, 2 * SHORT))));
  select.value = String(chosen);
  select.addEventListener("change", () => onChange(select.value));
  return make("div", {class: "field"}, make("label", {for: id}, label), select);
}

// ---- the tooltip: one element for the whole page. What has something to say is registered here by its element.
let tipOf = null;  // the item that the tip is about
const said = new WeakMap();  // a container -> function(its item) -> {head, rows: [[label, value, share or null]]}

const sentence = ({head, rows}) => `${head}: ${rows.map(([label, value]) => `${label} ${value}`).join(", ")}`;

function itemAt(node) {
  const item = node instanceof Element ? node.closest("[data-item]") : null;
  const container = item && item.closest("[data-items]");
  return container && said.has(container) ? {item, container} : null;
}

function showTip(item, container) {
  tipOf = item;
  const tip = byId("tip"), {head, rows} = said.get(container)(item);
  tip.replaceChildren(make("strong", {}, short(head, 160)), make("dl", {}, rows.map(([label, value, share]) => {
    const bar = make("dd", {}, value);
    if (isNumber(share)) {
      bar.classList.add("bar");
      bar.style.setProperty("--share", Math.min(1, Math.max(0, share)).toFixed(3));
    }
    return [make("dt", {}, short(label, 40)), bar];
  }).flat()));
  tip.hidden = false;
  // Beside the item, inside the window.
  const at = item.getBoundingClientRect(), size = tip.getBoundingClientRect(), edge = 8;
  const left = Math.min(Math.max(edge, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - edge);
  const above = at.top - size.height - edge;
  tip.style.left = `${Math.max(edge, left)}px`;
  tip.style.top = `${above >= edge ? above : Math.max(edge, Math.min(at.bottom + edge, innerHeight - size.height - edge))}px`;
}

function hideTip() {
  tipOf = null;
  byId("tip").hidden = true;
}

// An item that was reached with a key keeps its tip when the page scrolls away under a mouse that nobody moves.
const keepsTip = () => tipOf !== null && tipOf === document.activeElement && tipOf.matches(":focus-visible");

function listenForTips() {
  for (const type of ["pointerover", "focusin", "click"]) {
    document.addEventListener(type, event => {
      const found = itemAt(event.target);
      if (found) showTip(found.item, found.container);
      else if (!keepsTip()) hideTip();
    });
  }
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", () => {
    // A cell that is reached with a key scrolls into view: its tip moves along.
    if (tipOf !== null && (keepsTip() || tipOf.matches(":hover"))) showTip(tipOf, tipOf.closest("[data-items]"));
    else hideTip();
  }, {capture: true, passive: true});
  document.addEventListener("keydown", event => event.key === "Escape" ? hideTip() : moveBy(event));
}

// ---- arrow keys: Tab goes to a map, a chart or a text once, and the arrows go on inside of it.
function moveBy(event) {
  const found = itemAt(event.target);
  if (!found || event.ctrlKey || event.metaKey || event.altKey) return;
  const {item, container} = found;
  const next = container.tagName === "TABLE" ? nextCell(container, item, event.key) : nextInList(container, item, event.key);
  if (!next) return;
  event.preventDefault();
  rove(container, next);
  next.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest", inline: "nearest"});  // which keeps clear of sticky labels; focus() does not always
}

function nextInList(container, item, key) {
  const items = Array.from(container.querySelectorAll("[data-item]")), at = items.indexOf(item);
  const moves = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: items.length - 1};
  return key in moves ? items[Math.min(items.length - 1, Math.max(0, moves[key]))] : null;
}

// Cells start after the row and column of labels, which are not gone to.
function nextCell(table, cell, key) {
  const row = cell.parentNode.rowIndex, column = cell.cellIndex, last = table.rows.length - 1;
  const width = table.rows[row].cells.length - 1;
  const moves = {
    ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1], ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
    Home: [row, 1], End: [row, width], PageUp: [1, column], PageDown: [last, column],
  };
  if (!(key in moves)) return null;
  const [r, c] = moves[key];
  return table.rows[Math.min(last, Math.max(1, r))].cells[Math.min(width, Math.max(1, c))];
}

function rove(container, item) {
  for (const other of container.querySelectorAll('[data-item][tabindex="0"]')) other.setAttribute("tabindex", "-1");
  item.setAttribute("tabindex", "0");
}

document.addEventListener("click", event => {
  const found = itemAt(event.target);
  if (found) rove(found.container, found.item);
});
