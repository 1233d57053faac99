// What the page carries of the study, what the reader has chosen, and the tables that are shown.

export const $ = (id) => document.getElementById(id);
// A study may have several conditions; readers switch between them, and the address says which one is shown.
const asked = Number(new URLSearchParams(location.search).get("condition"));
export const CONDITION = $("condition")?.options[asked] ? asked : 0;
export const idOf = (name) => (CONDITION ? `${name}-${CONDITION}` : name);
export const D = JSON.parse($(idOf("data")).textContent);
export const N_LAYERS = D.layers.length;
export const IS_ALONE = D.models.length === 1; // there is nothing to compare the model with
export const CRITICALITY = D.measures.find((measure) => measure.label === "criticality");
export const state = {
  measure: CRITICALITY,
  sort: "category",
  find: "",
  hidden: new Set(), // categories
  layer: 0,
  model: 0,
  control: "holm",
};
export const shownTables = {}; // name of a figure -> its rows and columns, see texts.js

export const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
export const mean = (values) => {
  const some = values.filter(known);
  return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
};
export const categoryOf = (model) => D.categories[model.category];

// Tell the page which layer, model or both the reader has chosen.
export const choose = (choice) => document.dispatchEvent(new CustomEvent("choose", { detail: choice }));

export function bytes(id) {
  const text = atob($(id).textContent);
  const found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) found[i] = text.charCodeAt(i); // Uint8Array.from takes ten times as long
  return found;
}

export const unzipped = (data) => new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip")));
