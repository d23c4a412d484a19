"use strict";
// Colours, computed in OKLCH (lightness, chroma, hue), where equal steps look equally large. They are set as CSS
// variables, so that a change of theme repaints the page without building it again:
//   --c0 ... --c63  the ramp for amounts, --t0 ... --t63 black or white text on it
//   --e0 ...        experts, as the "r g b" of a token's background;  --l0 ... the same hues as lines

const STEPS = 64;
// Hue, place in the range of lightness, and chroma. Found by a search for the largest smallest difference between two, in
// both themes: of the first eight, 18 (CIEDE2000) for full sight and 10 for each of the three kinds of colour blindness,
// of all sixteen 9 and 5. That holds for full strength; pale ones are nearer, which is why a token says its expert, and
// why names are written into the text where there are more than eight.
const KINDS = [
  [136, 0.99, 0.08], [300, 0.01, 0.16], [57, 0, 0.15], [166, 0, 0.12], [189, 1, 0.11], [255, 0.63, 0.08], [359, 0.66, 0.16],
  [97, 0.63, 0.13], [281, 0.36, 0.14], [13, 0.24, 0.15], [341, 0, 0.13], [300, 0.29, 0.08], [115, 0.97, 0.17],
  [275, 0.97, 0.17], [12, 0.96, 0.08], [156, 0.61, 0.17],
];
const LIGHTNESS = {light: [0.69, 0.9], dark: [0.35, 0.52]};  // of the background of a text with a contrast of 4.5 or more
const LINES = {light: [0.4, 0.6], dark: [0.68, 0.86]};

// sRGB components from 0 to 1, linear light first; null outside of what a screen shows.
function inGamut(lightness, chroma, hue) {
  const a = chroma * Math.cos(hue * Math.PI / 180), b = chroma * Math.sin(hue * Math.PI / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
  ];
  return linear.every(x => x >= -1e-4 && x <= 1.0001) ? linear.map(x => Math.min(1, Math.max(0, x))) : null;
}

// The nearest colour of that lightness and hue that a screen can show, in linear light.
function oklch(lightness, chroma, hue) {
  let linear = inGamut(lightness, chroma, hue);
  for (; linear === null; linear = inGamut(lightness, chroma, hue)) chroma -= 0.005;
  return linear;
}

const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
const bytes = linear => linear.map(x => Math.round(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055)));

// From the page's own lightness to its opposite, yellow to violet or back: little recedes, much stands out.
function ramp(t, dark) {
  return dark ? oklch(0.27 + 0.66 * t, 0.05 + 0.11 * Math.min(1, 2 * t), 295 - 190 * t)
    : oklch(0.97 - 0.67 * t, 0.035 + 0.115 * Math.min(1, 1.5 * t), 105 + 190 * t);
}

// Hue, place in the range of lightness and chroma of the nth thing of a kind. Beyond those that were searched for they go
// on by the golden angle, and are not all told apart.
function kind(n) {
  return n < KINDS.length ? KINDS[n] : [(n * 137.508) % 360, (n * 0.618) % 1, 0.12];
}

const along = ([low, high], t) => low + (high - low) * t;

function setColours(dark, kinds) {
  const style = document.documentElement.style;
  for (let i = 0; i < STEPS; i++) {
    const linear = ramp(i / (STEPS - 1), dark), y = luminance(linear);
    style.setProperty(`--c${i}`, `rgb(${bytes(linear).join(" ")})`);
    style.setProperty(`--t${i}`, 1.05 / (y + 0.05) > (y + 0.05) / 0.05 ? "#fff" : "#000");  // the higher contrast
  }
  const theme = dark ? "dark" : "light";
  for (let n = 0; n < kinds; n++) {
    const [hue, t, chroma] = kind(n);
    style.setProperty(`--e${n}`, bytes(oklch(along(LIGHTNESS[theme], t), chroma, hue)).join(" "));
    style.setProperty(`--l${n}`, `rgb(${bytes(oklch(along(LINES[theme], t), 0.15, hue)).join(" ")})`);
  }
  style.setProperty("--enone", bytes(oklch(along(LIGHTNESS[theme], 0.5), 0, 0)).join(" "));
}

// The ramp's variable for a value between two ends.
function step(value, low, high) {
  const t = high > low ? (value - low) / (high - low) : 0;
  return Math.round((STEPS - 1) * Math.min(1, Math.max(0, t)));
}
