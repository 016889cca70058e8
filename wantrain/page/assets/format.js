"use strict";
// Numbers and elements. Text is always written as text, never as markup.
const Format = {
  loss: (value) =>
    value == null
      ? "–"
      : Math.abs(value) >= 100
        ? value.toPrecision(4)
        : value.toFixed(Math.abs(value) < 0.01 && value !== 0 ? 5 : 4),
  signed: (value) => (value == null ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "±") + Format.loss(Math.abs(value))),
  plain: (value) =>
    value == null
      ? "–"
      : value === 0
        ? "0"
        : Math.abs(value) < 0.001 || Math.abs(value) >= 1e6
          ? value.toExponential(2).replace("e-", "e−").replace("e+", "e")
          : Number(value.toPrecision(4)).toLocaleString("en"),
  rate: (value) =>
    value == null ? "–" : value === 0 ? "0" : value.toExponential(2).replace("e-", "e−").replace("e+", "e"),
  count: (value) => (value == null ? "–" : Math.round(value).toLocaleString("en")),
  times: (value) =>
    value == null ? "–" : `${value >= 100 ? Math.round(value) : value.toPrecision(value >= 10 ? 3 : 2)}×`,
  gigabytes: (value) => (value == null ? "–" : `${value < 10 ? value.toFixed(2) : value.toFixed(1)} GB`),
  percent: (value) =>
    value == null
      ? "–"
      : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %`,
  seconds: (value) =>
    value == null
      ? "–"
      : value < 1
        ? `${Math.round(1000 * value)} ms`
        : value < 100
          ? `${value.toPrecision(3)} s`
          : Format.duration(value),
  duration: (value) => {
    const seconds = Math.max(0, Math.round(value));
    if (seconds < 60) return `${seconds} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
    if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
    return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
  },
  name: (value) => String(value).replaceAll("_", " "),
};

// element("p", {class: "quiet", onclick: f}, "text", other, ...)
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(made.style, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

const byId = (id) => document.getElementById(id);
const colourOf = (name, place = 0) =>
  name === "high_noise"
    ? "--amber"
    : name === "low_noise"
      ? "--blue"
      : ["--blue", "--amber", "--teal", "--violet", "--rose", "--grey"][place % 6];

// A page's choices, kept over a reload of the tab.
const Kept = {
  key: `wantrain:${location.pathname}`,
  all() {
    try {
      return JSON.parse(sessionStorage.getItem(this.key)) || {};
    } catch {
      return {};
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(this.key, JSON.stringify({ ...this.all(), [name]: value }));
    } catch {
      /* storage is off */
    }
  },
};

function keepControl(id, changed) {
  const control = byId(id),
    property = control.type === "checkbox" ? "checked" : "value",
    kept = Kept.all()[id];
  if (kept !== undefined) control[property] = kept;
  control.addEventListener("input", () => {
    Kept.set(id, control[property]);
    changed();
  });
  return control;
}
