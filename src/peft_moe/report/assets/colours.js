"use strict";
// Colours, computed in OKLCH (lightness, chroma, hue), where equal steps look equally large. They are set as CSS
// variables, so that a change of theme repaints the page without building it again:
//   --c0 ... --c63  the ramp for amounts, --t0 ... --t63 black or white text on it
//   --e0 ...        experts, as the "r g b" of a token's background;  --l0 ... the same hues as lines

const STEPS = 64;
// Hue and change of lightness: neighbours differ in both, so that they can be told apart without seeing hue.
const KINDS = [[255, 0], [65, 0.03], [150, 0.02], [345, 0.01], [205, 0.04], [100, 0.07], [300, -0.03], [25, -0.04]];

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

// Hue and lightness of the nth thing of a kind. Beyond those chosen by hand, hues go on by the golden angle.
function kind(n) {
  return n < KINDS.length ? KINDS[n] : [(n * 137.508) % 360, ((n * 5) % 7 - 3) * 0.02];
}

function setColours(dark, kinds) {
  const style = document.documentElement.style;
  for (let i = 0; i < STEPS; i++) {
    const linear = ramp(i / (STEPS - 1), dark), y = luminance(linear);
    style.setProperty(`--c${i}`, `rgb(${bytes(linear).join(" ")})`);
    style.setProperty(`--t${i}`, 1.05 / (y + 0.05) > (y + 0.05) / 0.05 ? "#fff" : "#000");  // the higher contrast
  }
  for (let n = 0; n < kinds; n++) {
    const [hue, lighter] = kind(n);
    style.setProperty(`--e${n}`, bytes(oklch((dark ? 0.47 : 0.82) + lighter * (dark ? 0.5 : 1), 0.12, hue)).join(" "));
    style.setProperty(`--l${n}`, `rgb(${bytes(oklch((dark ? 0.76 : 0.5) + lighter, 0.15, hue)).join(" ")})`);
  }
}

// The ramp's variable for a value between two ends.
function step(value, low, high) {
  const t = high > low ? (value - low) / (high - low) : 0;
  return Math.round((STEPS - 1) * Math.min(1, Math.max(0, t)));
}
