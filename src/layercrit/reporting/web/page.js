// The report's page: what readers choose with, the table of models, and the start.
import {
  $,
  bytes,
  CONDITION,
  CRITICALITY,
  categoryOf,
  choose,
  D,
  IS_ALONE,
  known,
  mean,
  shownTables,
  state,
  unzipped,
} from "./data.js";
import { drawCompare, readDifferences } from "./differences.js";
import { drawEpochs, prepareEpochs } from "./epochs.js";
import { drawMap, drawMapTable } from "./heatmap.js";
import { drawAccuracy, drawLayer, drawModel } from "./plots.js";
import { drawProxies, prepareProxies } from "./proxies.js";
import { count, drawTable, element, interval, percent, save, share, signed } from "./texts.js";
import { drawMoved, drawWhom, prepareWhom } from "./whom.js";

// --- controls -------------------------------------------------------------------------------------------------------

const options = (rows) => rows.map(({ label }, i) => new Option(label, i));

function prepareControls() {
  $("measure").append(...options(D.measures));
  $("layer").append(...options(D.layers));
  $("model").append(...options(D.models));
  for (const id of ["first", "second"]) {
    const group = (label, kind) => {
      const named = D[kind].map((row, i) => [row, new Option(row.label, `${kind} ${i}`)]).filter(([row]) => row.name);
      return element("optgroup", { label }, ...named.map(([, option]) => option));
    };
    $(id).append(group("Models", "models"), group("Categories", "categories"));
  }
  const values = D.differences.values;
  $("values").append(...values.map((name) => new Option(name === "matched" ? "temperature-matched" : name, name)));
  $("categories").append(...D.categories.map(categoryBox));
  $("action-label").hidden = !D.advice.length;
  $("action").append(...D.advice.map(({ done }, i) => new Option(done, i)));
  const isTrained = (i) => D.categories[D.models[i].category].name !== "untrained";
  const others = [...D.models.keys()].filter((i) => i !== D.baseline).sort((i, j) => isTrained(j) - isTrained(i));
  const model = others[0] ?? 0;
  startWith({ layer: mostUnlike(), model, second: D.baseline ?? others[1] ?? model });
  listen();
}

// A box to hide the models of one category and show them again.
function categoryBox(category, i) {
  const box = element("input", { type: "checkbox", checked: true, value: i });
  box.onchange = () => {
    state.hidden[box.checked ? "delete" : "add"](i);
    drawMap();
    drawLayer();
    drawAccuracy();
  };
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = category.color === "#000000" ? "var(--text)" : category.color;
  return element("label", {}, box, swatch, category.label);
}

function startWith({ layer, model, second }) {
  Object.assign(state, { layer, model });
  $("layer").value = layer;
  $("model").value = model;
  $("first").value = `models ${model}`;
  $("second").value = `models ${second}`;
}

// What the page says of each condition: show that of the chosen one.
function showCondition() {
  for (const text of document.querySelectorAll("[data-condition]")) {
    text.hidden = Number(text.dataset.condition) !== CONDITION;
  }
  if (!$("condition")) return;
  $("condition").selectedIndex = CONDITION;
  $("condition").onchange = (event) => {
    location.search = `?condition=${event.target.selectedIndex}`;
  };
}

// Leave out what compares models, where there is only one.
function showWhatThereIs() {
  if (!IS_ALONE) return;
  $("map-title").textContent = "All layers";
  for (const part of document.querySelectorAll("[data-several]")) part.hidden = true;
}

function listen() {
  const onChoice = (id, act) => {
    $(id).onchange = (event) => act(event.target.value);
  };
  onChoice("measure", (value) => {
    state.measure = D.measures[value];
    drawMap();
  });
  onChoice("sort", (value) => {
    state.sort = value;
    drawMap();
  });
  document.addEventListener("choose", (event) => show(event.detail));
  onChoice("layer", (value) => choose({ layer: Number(value) }));
  onChoice("model", (value) => choose({ model: Number(value) }));
  onChoice("action", (value) => {
    const models = value ? D.advice[value].models.map((one) => one.model) : [];
    if (models.length && !models.includes(state.model)) choose({ model: models[0] });
    drawModel();
  });
  onChoice("control", (value) => {
    state.control = value;
    drawCompare();
  });
  for (const id of ["first", "second", "values", "unit"]) onChoice(id, drawCompare);
  $("find").oninput = (event) => {
    state.find = event.target.value.trim().toLowerCase();
    drawMap();
    drawLayer();
  };
  $("map-details").ontoggle = drawMapTable;
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const button of document.querySelectorAll("[data-save]")) {
    button.onclick = () => save(button.dataset.save, button.dataset.of);
  }
}

// Show a layer, a model or both, once the reader has chosen them.
function show({ layer = state.layer, model = state.model }) {
  const [newLayer, newModel] = [layer !== state.layer, model !== state.model];
  Object.assign(state, { layer, model });
  $("layer").value = layer;
  $("model").value = model;
  if (newLayer && state.sort === "layer") drawMap();
  if (newLayer) drawLayer();
  if (newLayer) drawMoved();
  if (newModel) drawModel();
  const { values, low, high } = CRITICALITY;
  const link = (section, text) => element("a", { href: `#${section}`, textContent: text });
  $("map-said").replaceChildren(
    `Selected: ${D.models[model].label}, ${D.layers[layer].label}, criticality ${share(values[model][layer])} ` +
      `(interval ${interval(low[model][layer], high[model][layer])}). See `,
    link("one-model", "this model"),
    ...(IS_ALONE ? [] : [", ", link("one-layer", "this layer")]),
    ".",
  );
}

// The layer on which criticality varies most over the models.
function mostUnlike() {
  const spread = D.layers.map((_, i) => {
    const some = CRITICALITY.values.map((row) => row[i]).filter(known);
    const middle = mean(some);
    return some.reduce((sum, value) => sum + (value - middle) ** 2, 0);
  });
  return spread.indexOf(Math.max(...spread));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  if (window.Plotly) drawAll();
}

// --- table of models ------------------------------------------------------------------------------------------------

function drawModels() {
  const number = (name, head, about, written = share) => ({ name, head, about, of: (model) => model[name], written });
  const limit = `Limit of the ${100 * D.level}% interval of mean criticality.`;
  const columns = [
    { name: "model", of: (model) => model.name },
    { name: "label", head: "model", of: (model) => model.label },
    {
      name: "category",
      head: "category",
      of: (model) => categoryOf(model).name,
      shown: (model) => categoryOf(model).label,
    },
    number("accuracy", `${D.accuracy} accuracy (%)`, "Images named right, of 100, before any reset.", percent),
    number("criticality", "mean criticality", "Mean over the layers that are compared: 0 to 1."),
    number("low", "low", limit),
    number("high", "high", limit),
    number("criticality_matched", "temperature-matched", "Mean criticality where all models are equally confident."),
    number("difference", "difference to the baseline", "Mean criticality minus the baseline's.", (value) =>
      signed(value, 3),
    ),
    number(
      "layers_that_differ",
      "layers significantly different from it (Holm, per model)",
      "Layers whose adjusted p-value is at most the level of the tests.",
      count,
    ),
    number(
      "top1_agreement",
      "top-1 agreement (%)",
      "Images, of 100, whose top-1 class a reset does not change.",
      percent,
    ),
    number("centre_of_mass", "centre of mass", "Where criticality lies: 0 is the first layer, 1 the last."),
  ];
  shownTables.models = { rows: D.models, columns };
  const kept = columns.filter(({ of, shown }) => D.models.some((model) => known((shown ?? of)(model))));
  const caption = `Models; intervals at ${100 * D.level}%. Click a heading to sort.`;
  drawTable($("models-table"), caption, { rows: D.models, columns: kept });
}

// --- start ----------------------------------------------------------------------------------------------------------

function drawAll() {
  drawMap();
  drawOthers();
}

function drawOthers() {
  drawLayer();
  drawModel();
  drawAccuracy();
  drawCompare();
  drawWhom();
  drawEpochs();
  drawProxies();
}

async function start() {
  showCondition();
  showWhatThereIs();
  prepareControls();
  prepareWhom();
  prepareEpochs();
  prepareProxies();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  drawModels();
  document.head.append(element("script", { textContent: await unzipped(bytes("plotly")).text() }));
  await drawMap();
  performance.mark("first figure");
  await readDifferences();
  drawOthers();
  performance.mark("ready");
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  $("map-about").textContent =
    `The figures cannot be plotted in this browser (${error.message}). The tables below remain.`;
  throw error;
});
