// The heat map of models and layers, and the same as a table.
import { $, categoryOf, choose, D, IS_ALONE, known, mean, N_LAYERS, shownTables, state } from "./data.js";
import {
  colorOf,
  draw,
  hover,
  LAYER_TICKS,
  layerAxis,
  readableOn,
  roomBelow,
  stageLines,
  ticks,
  visible,
  widest,
} from "./plots.js";
import { drawTable, escaped, percent, share, short, signed } from "./texts.js";

const ROW = 17; // pixels
// Plotly would take the room of few rows, and then of the labels, for the bar of colours above them.
const MARGIN = { autoexpand: false, r: 10, t: 40 };
const COLORBAR = {
  orientation: "h",
  y: 1,
  yanchor: "bottom",
  x: 0,
  xanchor: "left",
  lenmode: "pixels",
  len: 170,
  thickness: 9,
  tickangle: 0,
  tickformat: ".0%",
  outlinewidth: 0,
  ypad: 4,
};
// What all squares have in common.
const SQUARES = {
  type: "heatmap",
  showscale: false,
  xgap: 0.5,
  ygap: 0.5,
  hoverongaps: true,
  hoverinfo: "text",
};
const BELOW = "mean over models";
const BESIDE = "mean";

export function drawMap() {
  const { measure } = state;
  const rows = visible();
  $("map-none").textContent = rows.length
    ? ""
    : "No model is shown: none has such a name and one of the categories that are ticked.";
  $("map-plot").style.width = `max(100%, ${14 * N_LAYERS + 300}px)`;
  $("map-about").textContent =
    `${measure.about} The numbers in the right column, means over layers, are in percent: 62 stands for 0.62. Next ` +
    `to the names: ${D.accuracy} accuracy (%). ${IS_ALONE ? "" : "Bottom row: mean over the models shown. "}` +
    `${aboutLabels()} Click a square or a name to see its layer and model below.`;
  const drawn = draw("map-plot", mapTraces(measure, rows), mapLayout(rows), (point) =>
    choose({
      layer: point.data.xaxis === "x2" ? state.layer : point.x,
      model: point.data.yaxis === "y2" ? state.model : rows[point.y],
    }),
  );
  drawn.then(() => {
    chooseByLabel(".ytick text", (i) => ({ model: rows[i] }));
    chooseByLabel(".xtick text", (i) => ({ layer: i }));
  });
  shownTables.map = {
    rows,
    columns: [
      { name: "model", head: "model", of: (row) => D.models[row].name, shown: (row) => D.models[row].label },
      { name: "category", of: (row) => categoryOf(D.models[row]).name },
      { name: "accuracy", of: (row) => D.models[row].accuracy },
      ...D.layers.map(({ name, label }, i) => ({
        name,
        head: label,
        of: (row) => measure.values[row][i],
        written: share,
      })),
    ],
  };
  drawMapTable();
  return drawn;
}

function mapTraces(measure, rows) {
  const values = rows.map((row) => measure.values[row]);
  const largest = Math.max(0.01, ...measure.values.flat().filter(known).map(Math.abs));
  const [zmin, zmax] = { criticality: [0, 1], difference: [-largest, largest], spread: [0, largest] }[measure.scale];
  const written = (value) => {
    if (!known(value)) return "";
    return measure.scale === "difference" ? signed(100 * value, 0) : (100 * value).toFixed(0);
  };
  const modelMeans = values.map(mean);
  const layerMeans = D.layers.map((_, i) => mean(values.map((row) => row[i])));
  const [x, y] = [D.layers.map((_, i) => i), rows.map((_, i) => i)];
  const one = { ...SQUARES, zmin, zmax, colorscale: D.scales[measure.scale] };
  const cells = {
    z: values,
    x,
    y,
    text: rows.map((row) => D.layers.map((_, i) => hover(measure, row, i))),
    showscale: true,
    colorbar: COLORBAR,
  };
  const beside = {
    z: modelMeans.map((value) => [value]),
    x: [0],
    y,
    xaxis: "x2",
    text: rows.map((row, i) => [`<b>${escaped(D.models[row].label)}</b><br>mean over layers: ${share(modelMeans[i])}`]),
  };
  // Plotly's own choice of black or white is not the one of more contrast
  const numbers = {
    type: "scatter",
    mode: "text",
    x: rows.map(() => 0),
    y,
    xaxis: "x2",
    text: modelMeans.map(written),
    textfont: {
      size: 11,
      color: modelMeans.map((value) => readableOn(one.colorscale, (value - zmin) / (zmax - zmin))),
    },
    hoverinfo: "skip",
  };
  const below = {
    z: [layerMeans],
    x,
    y: [0],
    yaxis: "y2",
    text: [
      D.layers.map(({ name }, i) => `<b>${escaped(name)}</b><br>mean over the models shown: ${share(layerMeans[i])}`),
    ],
  };
  return [...(IS_ALONE ? [cells, beside] : [cells, beside, below]).map((trace) => ({ ...one, ...trace })), numbers];
}

function mapLayout(rows) {
  const narrow = innerWidth < 600;
  const texts = rows.map((row) => {
    const { label, accuracy } = D.models[row];
    return narrow ? short(label, 16) : `${short(label)}  ${percent(accuracy)}`;
  });
  const names = rows.map(
    (row, i) => `<span style="color:${colorOf(categoryOf(D.models[row]))}">\u25a0</span> ${escaped(texts[i])}`,
  );
  const under = IS_ALONE ? 0 : 2; // rows
  const inner = ROW * (rows.length + under);
  const lowest = IS_ALONE ? "y" : "y2";
  const margin = { ...MARGIN, l: 24 + widest(IS_ALONE ? texts : [...texts, BELOW], 11), b: roomBelow(BESIDE) };
  const name = { tickfont: { size: 11 }, automargin: false };
  return {
    height: margin.t + inner + margin.b,
    margin,
    xaxis: { ...layerAxis(), domain: [0, 0.955], range: [-0.5, N_LAYERS - 0.5], anchor: lowest },
    xaxis2: {
      ...ticks([BESIDE]),
      ...LAYER_TICKS,
      domain: [0.962, 1],
      range: [-0.5, 0.5],
      anchor: lowest,
      showgrid: false,
      zeroline: false,
    },
    yaxis: {
      ...ticks(names),
      ...name,
      domain: [(under * ROW) / inner, 1],
      range: [rows.length - 0.5, -0.5],
      showgrid: false,
      zeroline: false,
    },
    ...(IS_ALONE ? {} : { yaxis2: { ...ticks([BELOW]), ...name, domain: [0, ROW / inner] } }),
    shapes: stageLines(),
  };
}

// What the short names of layers mean, by the first that differs from the whole name.
function aboutLabels() {
  const short = D.layers.filter(({ name, label }) => name !== label);
  const one = short.find(({ label }) => label.startsWith("[")) ?? short[0];
  return one ? `Layer names are short: ${one.label} is ${one.name}.` : "";
}

// Let a click on a name beside or below the heat map choose what it names.
function chooseByLabel(selector, chosen) {
  $("map-plot")
    .querySelectorAll(selector)
    .forEach((text, i) => {
      text.style.pointerEvents = "all";
      text.style.cursor = "pointer";
      text.onclick = () => choose(chosen(i));
    });
}

export function drawMapTable() {
  if (!$("map-details").open) return;
  const caption = `${state.measure.label} of each model (rows) and layer (columns)`;
  drawTable($("map-table"), caption, shownTables.map);
}

// Draw a heat map of criticality with the layers as columns, and fill the table below it. `id` is that of the section,
// `texts` name its rows, `hoverOf` a row and a layer says what is written over a square; the table has `columns` of
// each row, given its number, before those of the layers.
export function drawLayerMap(id, texts, criticality, hoverOf, caption, columns) {
  const { traces, layout } = layerMap(texts, criticality, hoverOf);
  $(`${id}-plot`).style.width = `max(100%, ${14 * N_LAYERS + 300}px)`;
  draw(`${id}-plot`, traces, layout, (point) => choose({ layer: point.x }));
  const ofLayers = D.layers.map(({ name, label }, i) => ({
    name,
    head: label,
    of: (row) => criticality[row][i],
    written: share,
  }));
  const ofMean = { name: "mean", head: "mean over layers", of: (row) => mean(criticality[row]), written: share };
  shownTables[id] = { rows: texts.map((_, i) => i), columns: [...columns, ofMean, ...ofLayers] };
  const table = () => $(`${id}-details`).open && drawTable($(`${id}-table`), caption, shownTables[id]);
  $(`${id}-details`).ontoggle = table;
  table();
}

function layerMap(texts, criticality, hoverOf) {
  const margin = { ...MARGIN, l: 24 + widest(texts, 11), b: roomBelow() };
  const cells = {
    ...SQUARES,
    z: criticality,
    x: D.layers.map((_, i) => i),
    y: texts.map((_, i) => i),
    zmin: 0,
    zmax: 1,
    colorscale: D.scales.criticality,
    text: texts.map((_, row) => D.layers.map((_, i) => hoverOf(row, i))),
    showscale: true,
    colorbar: COLORBAR,
  };
  const layout = {
    height: margin.t + ROW * texts.length + margin.b,
    margin,
    xaxis: { ...layerAxis(), range: [-0.5, N_LAYERS - 0.5] },
    yaxis: {
      ...ticks(texts.map(escaped)),
      tickfont: { size: 11 },
      automargin: false,
      range: [texts.length - 0.5, -0.5],
      showgrid: false,
      zeroline: false,
    },
    shapes: stageLines(),
  };
  return { traces: [cells], layout };
}
