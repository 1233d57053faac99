// The report's page: draws the tables that it carries with Plotly, and lets readers choose what to see.
"use strict";

const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
const N_LAYERS = D.layers.length;
const MINUS = "\u2212";
const state = { measure: 0, sort: "category", find: "", hidden: new Set(), layer: 0, model: 0, control: "holm" };
const shownRows = {}; // name of a picture -> the rows of its CSV file
let pairs = null; // what is known of differences, by kind, once it is read

// --- texts and numbers ----------------------------------------------------------------------------------------------

// Plotly reads some tags and formulas in texts; names from outside are shown as they are.
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
const short = (text, length = 40) => (text.length > length ? `${text.slice(0, length / 2 + 1)}\u2026${text.slice(3 - length / 2)}` : text);
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const signed = (value, digits) => {
  const text = Math.abs(value).toFixed(digits);
  return (Number(text) === 0 ? "" : value < 0 ? MINUS : "+") + text;
};
const share = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", MINUS) : "\u2013");
const percent = (value) => (known(value) ? (Math.round(1e6 * value) / 1e4).toFixed(1) : "\u2013"); // 100 * 0.7615 is not 76.15
const interval = (low, high) => (known(low) && known(high) ? `${share(low)} to ${share(high)}` : "none");
const pValue = (value) => (!known(value) ? "\u2013" : value < 0.0001 ? "< 0.0001" : value.toPrecision(2));
const mean = (values) => {
  const some = values.filter(known);
  return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
};
const categoryOf = (model) => D.categories[model.category];
const colorOf = (category) => (category.color === "#000000" ? style("--text") : category.color); // black is for light pages
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- controls -------------------------------------------------------------------------------------------------------

function fill(select, options, groups = null) {
  for (const [value, text, group] of options) {
    const option = new Option(text, value);
    if (!groups) select.add(option);
    else {
      groups[group] ??= select.appendChild(Object.assign(document.createElement("optgroup"), { label: group }));
      groups[group].append(option);
    }
  }
}

function prepareControls() {
  fill($("measure"), D.measures.map((measure, i) => [i, measure.label]));
  fill($("layer"), D.layers.map((layer, i) => [i, layer.label]));
  fill($("model"), D.models.map((model, i) => [i, model.label]));
  for (const id of ["first", "second"]) {
    const models = D.models.map((model, i) => [`models ${i}`, model.label, "Models"]);
    const categories = D.categories.map((category, i) => [`categories ${i}`, category.label, "Categories"]).filter((_, i) => D.categories[i].name);
    fill($(id), [...models, ...categories], {});
  }
  fill($("values"), D.differences.values.map((name) => [name, name === "matched" ? "temperature-matched" : name]));
  D.categories.forEach((category, i) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, value: i });
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.background = category.color === "#000000" ? "var(--text)" : category.color;
    label.append(box, swatch, category.label);
    $("categories").append(label);
    box.onchange = () => { state.hidden[box.checked ? "delete" : "add"](i); drawMap(); drawLayer(); drawAccuracy(); };
  });
  state.model = D.models.findIndex((_, i) => i !== D.baseline);
  if (state.model < 0) state.model = 0;
  state.layer = mostUnlike();
  $("model").value = state.model;
  $("layer").value = state.layer;
  $("first").value = `models ${state.model}`;
  $("second").value = `models ${D.baseline ?? Math.min(1, D.models.length - 1)}`;
  $("measure").onchange = (event) => { state.measure = Number(event.target.value); drawMap(); };
  $("sort").onchange = (event) => { state.sort = event.target.value; drawMap(); };
  $("find").oninput = (event) => { state.find = event.target.value.toLowerCase(); drawMap(); drawLayer(); };
  $("layer").onchange = (event) => choose({ layer: Number(event.target.value) });
  $("model").onchange = (event) => choose({ model: Number(event.target.value) });
  for (const id of ["first", "second", "values", "unit"]) $(id).onchange = drawCompare;
  $("control").onchange = (event) => { state.control = event.target.value; drawCompare(); };
  $("map-details").ontoggle = () => drawMapTable();
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const button of document.querySelectorAll("[data-save]")) button.onclick = () => save(button.dataset.save, button.dataset.of);
}

function choose({ layer = state.layer, model = state.model }) {
  const [newLayer, newModel] = [layer !== state.layer, model !== state.model];
  Object.assign(state, { layer, model });
  $("layer").value = layer;
  $("model").value = model;
  if (newLayer && state.sort === "layer") drawMap();
  if (newLayer) drawLayer();
  if (newModel) drawModel();
  const { values, low, high } = D.measures[0];
  const link = (section, text) => Object.assign(document.createElement("a"), { href: `#${section}`, textContent: text });
  $("map-said").replaceChildren(`Chosen: ${D.models[model].label}, ${D.layers[layer].label}, criticality ${share(values[model][layer])} ` +
    `(interval ${interval(low[model][layer], high[model][layer])}). See `, link("one-model", "this model"), ", ", link("one-layer", "this layer"), ".");
}

// The layer on which criticality varies most over the models.
function mostUnlike() {
  const spread = D.layers.map((_, i) => {
    const some = D.measures[0].values.map((row) => row[i]).filter(known), middle = mean(some);
    return some.reduce((sum, value) => sum + (value - middle) ** 2, 0);
  });
  return spread.indexOf(Math.max(...spread));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  if (window.Plotly) drawAll();
}

// --- pictures -------------------------------------------------------------------------------------------------------

function draw(id, traces, layout, onClick = null) {
  const base = {
    font: { family: "system-ui, sans-serif", size: 12, color: style("--text") },
    paper_bgcolor: style("--card"), plot_bgcolor: style("--card"), dragmode: false, hovermode: "closest", showlegend: false,
    margin: { l: 10, r: 10, t: 10, b: 10 }, hoverlabel: { align: "left" },
  };
  for (const [name, axis] of Object.entries(layout)) {
    if (/^[xy]axis/.test(name)) Object.assign(axis, { fixedrange: true, automargin: axis.automargin ?? true, gridcolor: style("--line"), zerolinecolor: style("--soft") });
  }
  const plot = $(id);
  const drawn = Plotly.react(plot, traces, { ...base, ...layout }, { displayModeBar: false, responsive: true });
  plot.removeAllListeners?.("plotly_click");
  if (onClick) plot.on("plotly_click", (event) => onClick(event.points[0]));
  return drawn;
}

// The widest of some texts, in pixels. Plotly's own margins would draw a picture several times.
function widest(texts, size) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `${size}px system-ui, sans-serif`;
  return Math.max(0, ...texts.map((text) => context.measureText(text).width));
}

const ticks = (labels) => ({ tickmode: "array", tickvals: labels.map((_, i) => i), ticktext: labels });
const bars = (values, low, high) => ({ // Plotly leaves out bars of length null
  type: "data", symmetric: false, thickness: 1, width: 0,
  array: values.map((value, i) => (known(high[i]) ? high[i] - value : null)),
  arrayminus: values.map((value, i) => (known(low[i]) ? value - low[i] : null)),
});
const layerAxis = () => ({ ...ticks(D.layers.map((layer) => escaped(short(layer.label)))), tickangle: -90, tickfont: { size: 10 },
  range: [-0.6, N_LAYERS - 0.4], showgrid: false, zeroline: false });
// Lines where a stage ends.
const stageLines = () => D.layers.flatMap((layer, i) => (i && layer.stage !== D.layers[i - 1].stage
  ? [{ type: "line", x0: i - 0.5, x1: i - 0.5, yref: "paper", y0: 0, y1: 1, layer: "above", line: { color: style("--soft"), width: 1, dash: "dot" } }] : []));

function visible() {
  const rows = D.models.map((_, i) => i).filter((i) =>
    !state.hidden.has(D.models[i].category) && `${D.models[i].label} ${D.models[i].name}`.toLowerCase().includes(state.find));
  const { values } = D.measures[state.measure];
  const keys = {
    name: (i) => D.models[i].label.toLowerCase(),
    mean: (i) => -(mean(values[i]) ?? -Infinity),
    accuracy: (i) => -(D.models[i].accuracy ?? -Infinity),
    layer: (i) => -(values[i][state.layer] ?? -Infinity),
  };
  const key = keys[state.sort];
  return key ? rows.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a - b)) : rows;
}

function hover(measure, model, layer) {
  const value = measure.values[model][layer];
  const lines = [`<b>${escaped(D.models[model].label)}</b>`, escaped(D.layers[layer].name),
    `${measure.label}: ${share(value)}`];
  if (measure.low) lines.push(`${100 * D.level}% interval: ${interval(measure.low[model][layer], measure.high[model][layer])}`);
  lines.push(`trials: ${D.trials[model][layer] ?? "none"}, status: ${escaped(D.statuses[model][layer] ?? "not measured")}`);
  return lines.join("<br>");
}

function drawMap() {
  const measure = D.measures[state.measure], rows = visible();
  const values = rows.map((row) => measure.values[row]);
  const largest = Math.max(0.01, ...measure.values.flat().filter(known).map(Math.abs));
  const [low, high] = { criticality: [0, 1], difference: [-largest, largest], spread: [0, largest] }[measure.scale];
  const colors = { zmin: low, zmax: high, colorscale: D.scales[measure.scale] };
  const written = (value) => (known(value) ? (measure.scale === "difference" ? signed(100 * value, 0) : (100 * value).toFixed(0)) : "");
  const modelMeans = values.map(mean), layerMeans = D.layers.map((_, i) => mean(values.map((row) => row[i])));
  const narrow = innerWidth < 600, below = "mean over models";
  const texts = rows.map((row) => `${short(D.models[row].label, narrow ? 16 : 40)}${narrow ? "" : `  ${percent(D.models[row].accuracy)}`}`);
  const names = rows.map((row, i) => `<span style="color:${colorOf(categoryOf(D.models[row]))}">\u25a0</span> ${escaped(texts[i])}`);
  const bottom = 20 + widest(D.layers.map((layer) => short(layer.label)), 10), left = 24 + widest([...texts, below], 11);
  const inner = 17 * (rows.length + 2), height = inner + bottom + 34, share1 = 17 / inner;
  const gap = { xgap: 0.5, ygap: 0.5, hoverongaps: true };
  const one = { ...colors, ...gap, type: "heatmap", showscale: false, hoverinfo: "text" };
  $("map-plot").style.width = `max(100%, ${14 * N_LAYERS + 300}px)`;
  $("map-about").textContent = `${measure.about} In percent; beside the names: ${D.accuracy} accuracy (%). At the right: mean over layers; ` +
    "below: mean over the models shown. Choose a cell, or a name, to see its layer and its model below.";
  const means = { texttemplate: "%{text}", textfont: { size: 10 } };
  const drawn = draw("map-plot", [
    { ...one, showscale: true, z: values, text: rows.map((row) => D.layers.map((_, i) => hover(measure, row, i))), x: D.layers.map((_, i) => i), y: rows.map((_, i) => i),
      colorbar: { orientation: "h", y: 1, yanchor: "bottom", x: 0, xanchor: "left", len: 0.4, thickness: 9, tickformat: ".0%", outlinewidth: 0, ypad: 4 } },
    { ...one, ...means, z: modelMeans.map((value) => [value]), x: [0], y: rows.map((_, i) => i), xaxis: "x2", text: modelMeans.map((value) => [written(value)]),
      hovertext: rows.map((row, i) => [`<b>${escaped(D.models[row].label)}</b><br>mean over layers: ${share(modelMeans[i])}`]) },
    { ...one, z: [layerMeans], x: D.layers.map((_, i) => i), y: [0], yaxis: "y2",
      text: [D.layers.map((layer, i) => `<b>${escaped(layer.name)}</b><br>mean over the models shown: ${share(layerMeans[i])}`)] },
  ], {
    height, margin: { l: left, r: 10, t: 34, b: bottom },
    xaxis: { ...layerAxis(), domain: [0, 0.955], range: [-0.5, N_LAYERS - 0.5], anchor: "y2", automargin: false },
    xaxis2: { ...ticks(["mean"]), domain: [0.962, 1], tickangle: -90, anchor: "y2", automargin: false },
    yaxis: { ...ticks(names), domain: [2 * share1, 1], range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false, tickfont: { size: 11 },
      automargin: false },
    yaxis2: { ...ticks([below]), domain: [0, share1], tickfont: { size: 11 }, automargin: false },
    shapes: stageLines(),
  }, (point) => choose({
    layer: point.data.xaxis === "x2" ? state.layer : point.x,
    model: point.data.yaxis === "y2" ? state.model : rows[point.y],
  }));
  drawn.then(() => {
    const clickable = (selector, chosen) => $("map-plot").querySelectorAll(selector).forEach((text, i) => {
      text.style.pointerEvents = "all";
      text.style.cursor = "pointer";
      text.onclick = () => chosen(i);
    });
    clickable(".ytick text", (i) => choose({ model: rows[i] }));
    clickable(".xtick text", (i) => choose({ layer: i }));
  });
  shownRows.map = [["model", "category", "accuracy", ...D.layers.map((layer) => layer.name)],
    ...rows.map((row) => [D.models[row].name, categoryOf(D.models[row]).name, D.models[row].accuracy, ...measure.values[row]])];
  drawMapTable();
  return drawn;
}

function drawMapTable() {
  if (!$("map-details").open) return;
  const rows = visible(), { values, label } = D.measures[state.measure];
  table($("map-table"), `${label} of each model (rows) on each layer (columns)`, ["model", ...D.layers.map((layer) => layer.label)],
    rows.map((row) => [D.models[row].label, ...values[row]]), (value) => share(value));
}

function drawLayer() {
  const { values, low, high } = D.measures[0], at = state.layer;
  const rows = visible().filter((row) => known(values[row][at])).sort((a, b) => values[a][at] - values[b][at]);
  const x = rows.map((row) => values[row][at]);
  const colors = rows.map((row) => colorOf(categoryOf(D.models[row])));
  draw("layer-plot", rows.map((row, i) => ({
    type: "scatter", mode: "markers", x: [x[i]], y: [i], hoverinfo: "text", text: [hover(D.measures[0], row, at)],
    marker: { color: colors[i], size: 9, symbol: categoryOf(D.models[row]).symbol, line: { color: style("--text"), width: row === D.baseline ? 2 : 0.5 } },
    error_x: { ...bars([x[i]], [low[row][at]], [high[row][at]]), color: colors[i] },
  })), {
    height: Math.max(300, 15 * rows.length + 80), margin: { l: 10, r: 10, t: 10, b: 40 },
    xaxis: { title: { text: `criticality of ${escaped(D.layers[at].label)}` }, range: [-0.02, 1.02], zeroline: false },
    yaxis: { ...ticks(rows.map((row) => escaped(short(D.models[row].label)))), range: [-0.7, rows.length - 0.3], tickfont: { size: 10 }, zeroline: false },
  }, (point) => choose({ model: rows[point.y] }));
  shownRows.layer = [["layer", "model", "category", "criticality", "low", "high", "trials"],
    ...rows.map((row) => [D.layers[at].name, D.models[row].name, categoryOf(D.models[row]).name, values[row][at], low[row][at], high[row][at], D.trials[row][at]])];
}

function drawModel() {
  const { values, low, high } = D.measures[0];
  const line = (row, color, shift, dash) => ({
    type: "scatter", mode: "lines+markers", name: escaped(D.models[row].label), x: D.layers.map((_, i) => i + shift), y: values[row],
    error_y: { ...bars(values[row], low[row], high[row]), color }, line: { color, width: 1.5, dash }, marker: { color, size: 6 },
    hoverinfo: "text", text: D.layers.map((_, i) => hover(D.measures[0], row, i)),
  });
  const both = known(D.baseline) && state.model !== D.baseline;
  const color = colorOf(categoryOf(D.models[state.model]));
  const traces = [...(both ? [line(D.baseline, style("--soft"), 0.15, "dot")] : []), line(state.model, color, both ? -0.15 : 0, "solid")];
  const { unrelated } = D.models[state.model];
  const level = { type: "line", xref: "paper", x0: 0, x1: 1, y0: unrelated, y1: unrelated, line: { color: style("--soft"), width: 1, dash: "dash" } };
  const note = { xref: "paper", x: 1, y: unrelated, xanchor: "right", yanchor: "bottom", showarrow: false, text: "unrelated prediction", font: { size: 11 } };
  $("model-plot").style.width = `max(100%, ${11 * N_LAYERS + 80}px)`;
  draw("model-plot", traces, {
    height: 430, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 10, r: 10, t: 40, b: 10 },
    xaxis: layerAxis(), yaxis: { title: { text: "criticality" }, range: [-0.02, 1.05], zeroline: false },
    shapes: [...stageLines(), ...(known(unrelated) ? [level] : [])], annotations: known(unrelated) ? [note] : [],
  }, (point) => choose({ layer: Math.round(point.x) }));
  shownRows.model = [["model", "layer", "stage", "criticality", "low", "high", "trials", "status"],
    ...[state.model, ...(both ? [D.baseline] : [])].flatMap((row) => D.layers.map((layer, i) =>
      [D.models[row].name, layer.name, layer.stage, values[row][i], low[row][i], high[row][i], D.trials[row][i], D.statuses[row][i]]))];
}

function drawAccuracy() {
  const rows = D.models.map((_, i) => i).filter((i) => known(D.models[i].accuracy) && known(D.models[i].mean) && !state.hidden.has(D.models[i].category));
  const groups = [...new Set(rows.map((row) => D.models[row].category))].sort((a, b) => a - b);
  draw("accuracy-plot", groups.map((group) => {
    const some = rows.filter((row) => D.models[row].category === group), category = D.categories[group];
    return {
      type: "scatter", mode: "markers", name: escaped(category.label), customdata: some,
      x: some.map((row) => 100 * D.models[row].accuracy), y: some.map((row) => 100 * D.models[row].mean), hoverinfo: "text",
      text: some.map((row) => `<b>${escaped(D.models[row].label)}</b><br>accuracy ${percent(D.models[row].accuracy)}%, mean criticality ${percent(D.models[row].mean)}%` +
        `<br>${100 * D.level}% interval: ${interval(D.models[row].low, D.models[row].high)}`),
      marker: { color: colorOf(category), size: 10, symbol: category.symbol, line: { color: style("--card"), width: 0.5 } },
    };
  }), {
    height: Math.min(700, Math.max(420, $("layer-plot").clientHeight - 60)), showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 10, r: 10, t: 40, b: 40 },
    xaxis: { title: { text: `${D.accuracy} accuracy (%)` }, zeroline: false }, yaxis: { title: { text: "mean criticality (%)" }, zeroline: false },
  }, (point) => choose({ model: point.customdata }));
  shownRows.accuracy = [["model", "category", "accuracy", "criticality", "low", "high"],
    ...rows.map((row) => D.models[row]).map((model) => [model.name, categoryOf(model).name, model.accuracy, model.mean, model.low, model.high])];
}

// --- differences ----------------------------------------------------------------------------------------------------

function bytes(id) {
  const text = atob($(id).textContent), found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) found[i] = text.charCodeAt(i); // Uint8Array.from takes ten times as long
  return found;
}
const unzipped = (data) => new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip")));

// Numbers are kept in 16 bits: differences in units of 1e-4, p-values as -1000 lg p; the last value stands for none. A byte
// says what the interval holds for, and whether the difference stands.
async function readDifferences() {
  pairs = {};
  const buffer = await unzipped(bytes("differences")).arrayBuffer();
  let offset = 0;
  for (const { key, notes, pairs: listed } of D.differences.blocks) {
    const length = listed.length * N_LAYERS;
    const column = (type, decode, none) => {
      const raw = new type(buffer, offset, length);
      offset += 2 * length;
      return (i) => (raw[i] === none ? null : decode(raw[i]));
    };
    const small = () => column(Int16Array, (value) => value / 1e4, -32768);
    const chance = () => column(Uint16Array, (value) => 10 ** (-value / 1000), 65535);
    const block = { difference: small(), low: small(), high: small(), p: chance(), holm: chance(), bh: chance() };
    const flags = new Uint8Array(buffer, offset, length);
    offset += length + (length % 2);
    pairs[key] = { ...block, flags, notes, places: new Map(listed.map(([first, second], k) => [`${first} ${second}`, k])) };
  }
}

function differences(kind, first, second, unit, values) {
  const block = pairs[`${kind} ${unit} ${values}`];
  const forward = block?.places.get(`${first} ${second}`), place = forward ?? block?.places.get(`${second} ${first}`);
  if (place === undefined) return null;
  const sign = forward === undefined ? -1 : 1;
  const turned = (value) => (known(value) ? sign * value + 0 : null);
  return D.layers.map((layer, i) => {
    const at = place * N_LAYERS + i;
    const limits = [turned(block.low(at)), turned(block.high(at))];
    const [low, high] = sign > 0 ? limits : limits.reverse();
    return { layer, difference: turned(block.difference(at)), low, high, p: block.p(at), holm: block.holm(at), bh: block.bh(at),
      covers: D.differences.covers[block.flags[at] & 7], stands: { holm: Boolean(block.flags[at] & 8), bh: Boolean(block.flags[at] & 16) } };
  });
}

function drawCompare() {
  const [[kind, first], [otherKind, second]] = ["first", "second"].map((id) => $(id).value.split(" "));
  $("unit").disabled = kind !== "categories";
  const unit = kind === "categories" ? $("unit").value : "trials";
  const names = kind === "models" ? D.models : D.categories;
  let problem = "";
  if (kind !== otherKind) problem = "Choose two models or two categories.";
  else if (first === second) problem = "Choose two that differ.";
  const rows = problem ? null : differences(kind, first, second, unit, $("values").value);
  if (!rows) {
    $("compare-said").textContent = problem || "This pair is not in the page; `layercrit.differences` computes it.";
    $("compare-plot").hidden = $("compare-details").hidden = $("compare-notes").hidden = true;
    return;
  }
  $("compare-plot").hidden = $("compare-details").hidden = $("compare-notes").hidden = false;
  const { control } = state, stands = rows.map((row) => row.stands[control]);
  const tested = rows.filter((row) => known(row.p)).length, label = { holm: "Holm", bh: "Benjamini-Hochberg" }[control];
  const middle = mean(rows.map((row) => row.difference));
  $("compare-said").textContent = `${names[first].label} minus ${names[second].label}: of ${tested} tested layers ${stands.filter(Boolean).length} are found to differ ` +
    `(${label}, level ${D.differences.alpha}, over the layers of this pair). Mean difference ${known(middle) ? signed(middle, 3) : "not known"}.`;
  const unadjusted = `The intervals drawn are at ${100 * D.level}% for each layer by itself: one may leave out 0 and its difference not stand.`;
  $("compare-notes").replaceChildren(...[unadjusted, ...pairs[`${kind} ${unit} ${$("values").value}`].notes].map((text) =>
    Object.assign(document.createElement("li"), { textContent: text })));
  const y = rows.map((row) => row.difference), soft = style("--soft"), strong = style("--link");
  $("compare-plot").style.width = `max(100%, ${14 * N_LAYERS + 80}px)`;
  draw("compare-plot", [true, false].map((stand) => {
    const at = rows.map((_, i) => i).filter((i) => stands[i] === stand), color = stand ? strong : soft;
    return {
      type: "scatter", mode: "markers", name: stand ? "stands" : "does not stand", x: at, y: at.map((i) => y[i]),
      error_y: { ...bars(at.map((i) => y[i]), at.map((i) => rows[i].low), at.map((i) => rows[i].high)), color },
      marker: { color, size: 8, symbol: stand ? "circle" : "circle-open" }, hoverinfo: "text",
      text: at.map((i) => `<b>${escaped(rows[i].layer.name)}</b><br>difference ${share(y[i])}<br>${100 * D.level}% interval: ${interval(rows[i].low, rows[i].high)}` +
        `, for new ${rows[i].covers}<br>p ${pValue(rows[i].p)}; Holm ${pValue(rows[i].holm)}; Benjamini-Hochberg ${pValue(rows[i].bh)}`),
    };
  }), {
    height: 460, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 10, r: 10, t: 40, b: 10 },
    xaxis: layerAxis(), yaxis: { title: { text: "difference of criticality" }, zeroline: true }, shapes: stageLines(),
  }, (point) => choose({ layer: point.x }));
  const head = ["layer", "difference", "low", "high", "p", "p (Holm)", "p (Benjamini-Hochberg)", "stands", "holds for new"];
  const cells = rows.map((row, i) =>
    [row.layer.label, row.difference, row.low, row.high, row.p, row.holm, row.bh, stands[i] ? "yes" : "no", row.covers]);
  table($("compare-table"), `${names[first].label} minus ${names[second].label}`, head, cells, (value, column) => (column > 3 ? pValue(value) : share(value)));
  shownRows.compare = [["first", "second", "layer", "difference", "low", "high", "p_value", "p_holm", "p_bh", "stands", "covers"],
    ...rows.map((row, i) => [names[first].name, names[second].name, row.layer.name, row.difference, row.low, row.high, row.p, row.holm, row.bh, stands[i], row.covers])];
}

// --- tables and files -----------------------------------------------------------------------------------------------

function table(element, caption, head, rows, written, sorted = null) {
  const column = sorted && Math.abs(sorted) - 1;
  if (sorted) {
    const compared = (a, b) => (!known(a) ? 1 : !known(b) ? -1 : typeof a === "string" ? a.localeCompare(b) : a - b);
    rows = [...rows].sort((a, b) => (known(a[column]) && known(b[column]) ? Math.sign(sorted) : 1) * compared(a[column], b[column]));
  }
  const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  const top = document.createElement("tr");
  head.forEach((name, i) => {
    const th = Object.assign(document.createElement("th"), { scope: "col", className: typeof rows[0]?.[i] === "string" ? "left" : "" });
    const down = sorted === i + 1;
    if (column === i && sorted) th.setAttribute("aria-sort", down ? "ascending" : "descending");
    const button = cell("button", name + (column === i && sorted ? (down ? " \u25b2" : " \u25bc") : ""));
    button.type = "button";
    button.onclick = () => {
      table(element, caption, head, rows, written, down ? -(i + 1) : i + 1);
      element.querySelectorAll("th button")[i].focus();
    };
    th.append(button);
    top.append(th);
  });
  const body = document.createElement("tbody");
  for (const row of rows) {
    const line = document.createElement("tr");
    row.forEach((value, i) => {
      const text = typeof value === "string" ? value : written(value, i);
      const one = i ? cell("td", text) : Object.assign(cell("th", text), { scope: "row" });
      if (typeof value === "string") one.className = "left";
      line.append(one);
    });
    body.append(line);
  }
  const above = document.createElement("thead");
  above.append(top);
  element.replaceChildren(cell("caption", caption), above, body);
}

function drawModels() {
  const head = ["model", "category", `${D.accuracy} accuracy (%)`, "mean criticality", "low", "high", "temperature-matched", "difference to the baseline",
    "layers found to differ from it (Holm, each model by itself)", "top-1 agreement (%)", "centre of mass"];
  const rows = D.models.map((model) => [model.label, categoryOf(model).label, model.accuracy, model.mean, model.low, model.high, model.matched,
    model.difference, model.stand, model.agreement, model.centre]);
  const written = (value, i) => ([2, 9].includes(i) ? percent(value) : i === 8 ? (known(value) ? String(value) : "\u2013") : i === 7 && known(value) ? signed(value, 3) : share(value));
  const used = head.map((_, i) => i < 2 || rows.some((row) => known(row[i])));
  const kept = head.map((_, i) => i).filter((i) => used[i]);
  table($("models-table"), `Models; intervals at ${100 * D.level}%. Choose a heading to sort.`, kept.map((i) => head[i]),
    rows.map((row) => kept.map((i) => row[i])), (value, i) => written(value, kept[i]));
  shownRows.models = [["model", "label", "category", "accuracy", "criticality", "low", "high", "criticality_matched", "difference", "layers_that_differ", "top1_agreement", "centre_of_mass"],
    ...D.models.map((model) => [model.name, model.label, categoryOf(model).name, model.accuracy, model.mean, model.low, model.high, model.matched, model.difference, model.stand, model.agreement, model.centre])];
}

async function save(format, name) {
  let content = "", type = "text/csv";
  if (format === "csv") {
    const field = (value) => (!known(value) ? "" : /[",\r\n]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
    content = shownRows[name].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  } else {
    const plot = $(`${name}-plot`);
    const url = await Plotly.toImage(plot, { format: "svg", width: plot.clientWidth, height: plot.clientHeight });
    content = decodeURIComponent(url.slice(url.indexOf(",") + 1));
    type = "image/svg+xml";
  }
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([content], { type })), download: `${name}.${format}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- start ----------------------------------------------------------------------------------------------------------

function drawAll() {
  const drawn = drawMap();
  drawLayer();
  drawModel();
  drawAccuracy();
  if (pairs) drawCompare();
  return drawn;
}

async function start() {
  prepareControls();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  drawModels();
  const plotly = document.createElement("script");
  plotly.textContent = await unzipped(bytes("plotly")).text();
  document.head.append(plotly);
  await drawMap();
  performance.mark("first picture");
  await readDifferences();
  drawAll();
  performance.mark("ready");
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  $("map-about").textContent = `The pictures cannot be drawn in this browser (${error.message}). The tables below remain.`;
  throw error;
});
