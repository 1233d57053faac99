// What all figures share, which Plotly plots; and those of one layer, of one model, and of accuracy.
import { $, CRITICALITY, categoryOf, choose, D, IS_ALONE, known, mean, N_LAYERS, shownTables, state } from "./data.js";
import { escaped, interval, percent, share, short } from "./texts.js";

// --- what all figures share -----------------------------------------------------------------------------------------

export const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// black is for light pages
export const colorOf = (category) => (category.color === "#000000" ? style("--text") : category.color);

export function draw(id, traces, layout, onClick = null) {
  const base = {
    font: { family: "system-ui, sans-serif", size: 12, color: style("--text") },
    paper_bgcolor: style("--card"),
    plot_bgcolor: style("--card"),
    dragmode: false,
    hovermode: "closest",
    showlegend: false,
    margin: { l: 10, r: 10, t: 10, b: 10 },
    hoverlabel: { align: "left" },
  };
  for (const [name, axis] of Object.entries(layout)) {
    if (!/^[xy]axis/.test(name)) continue;
    const common = { fixedrange: true, gridcolor: style("--line"), zerolinecolor: style("--soft") };
    Object.assign(axis, common, { automargin: axis.automargin ?? true });
  }
  const plot = $(id);
  const drawn = Plotly.react(plot, traces, { ...base, ...layout }, { displayModeBar: false, responsive: true });
  plot.removeAllListeners?.("plotly_click");
  if (onClick) plot.on("plotly_click", (event) => onClick(event.points[0]));
  return drawn;
}

// The widest of some texts, in pixels. Plotly's own margins would plot a figure several times.
export function widest(texts, size) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `${size}px system-ui, sans-serif`;
  return Math.max(0, ...texts.map((text) => context.measureText(text).width));
}

export const ticks = (labels) => ({ tickmode: "array", tickvals: labels.map((_, i) => i), ticktext: labels });
export const bars = (values, low, high) => ({
  type: "data",
  symmetric: false,
  thickness: 1,
  width: 0,
  // Plotly leaves out bars of length null
  array: values.map((value, i) => (known(high[i]) ? high[i] - value : null)),
  arrayminus: values.map((value, i) => (known(low[i]) ? value - low[i] : null)),
});

export const LAYER_TICKS = { tickangle: -90, tickfont: { size: 10 }, automargin: false };
const layerLabels = () => D.layers.map((layer) => short(layer.label));
export const layerAxis = () => ({
  ...ticks(layerLabels().map(escaped)),
  ...LAYER_TICKS,
  range: [-0.6, N_LAYERS - 0.4],
  showgrid: false,
  zeroline: false,
});
// The room that the labels of the layers need below a figure, and others that are written as they are.
export const roomBelow = (...others) =>
  Math.ceil(20 + widest([...layerLabels(), ...others], LAYER_TICKS.tickfont.size));
// The size of a figure over layers: so high that this many pixels are left to it, whatever its layers are called.
export const layerSize = (inner) => ({
  height: 40 + inner + roomBelow(),
  margin: { l: 10, r: 10, t: 40, b: roomBelow() },
});
export const LEGEND_ABOVE = { showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } };

// Lines where a stage ends.
export const stageLines = () =>
  D.layers.flatMap((layer, i) => {
    if (!i || layer.stage === D.layers[i - 1].stage) return [];
    const line = { color: style("--soft"), width: 1, dash: "dot" };
    return [{ type: "line", x0: i - 0.5, x1: i - 0.5, yref: "paper", y0: 0, y1: 1, layer: "above", line }];
  });

// Black or white, whichever has more contrast to the colour at a share of a scale, by WCAG 2.2.
export function readableOn(scale, share) {
  const [, color] = scale[Math.round(Math.min(1, Math.max(0, share || 0)) * (scale.length - 1))];
  const [red, green, blue] = [1, 3, 5].map((at) => {
    const part = Number.parseInt(color.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000000" : "#ffffff";
}

export function hover(measure, model, layer) {
  const lines = [
    `<b>${escaped(D.models[model].label)}</b>`,
    escaped(D.layers[layer].name),
    `${measure.label}: ${share(measure.values[model][layer])}`,
  ];
  if (measure.low) {
    lines.push(`${100 * D.level}% interval: ${interval(measure.low[model][layer], measure.high[model][layer])}`);
  }
  const status = escaped(D.statuses[model][layer] ?? "not measured");
  lines.push(`trials: ${D.trials[model][layer] ?? "none"}, status: ${status}`);
  return lines.join("<br>");
}

// The models that the reader wants to see, in the order of the heat map.
export function visible() {
  const rows = D.models
    .map((_, i) => i)
    .filter((i) => {
      const { category, label, name } = D.models[i];
      return !state.hidden.has(category) && `${label} ${name}`.toLowerCase().includes(state.find);
    });
  const { values } = state.measure;
  const keys = {
    name: (i) => D.models[i].label.toLowerCase(),
    mean: (i) => -(mean(values[i]) ?? -Infinity),
    accuracy: (i) => -(D.models[i].accuracy ?? -Infinity),
    layer: (i) => -(values[i][state.layer] ?? -Infinity),
  };
  const key = keys[state.sort];
  if (!key) return rows;
  return rows.sort((a, b) => {
    if (key(a) === key(b)) return a - b;
    return key(a) < key(b) ? -1 : 1;
  });
}

// --- one layer, one model, accuracy ---------------------------------------------------------------------------------

export function drawLayer() {
  if (IS_ALONE) return;
  const { values, low, high } = CRITICALITY;
  const at = state.layer;
  const rows = visible()
    .filter((row) => known(values[row][at]))
    .sort((a, b) => values[a][at] - values[b][at]);
  const traces = rows.map((row, i) => {
    const color = colorOf(categoryOf(D.models[row]));
    return {
      type: "scatter",
      mode: "markers",
      x: [values[row][at]],
      y: [i],
      hoverinfo: "text",
      text: [hover(CRITICALITY, row, at)],
      marker: {
        color,
        size: 9,
        symbol: categoryOf(D.models[row]).symbol,
        line: { color: style("--text"), width: row === D.baseline ? 2 : 0.5 },
      },
      error_x: { ...bars([values[row][at]], [low[row][at]], [high[row][at]]), color },
    };
  });
  const layout = {
    height: Math.max(300, 15 * rows.length + 80),
    margin: { l: 10, r: 10, t: 10, b: 40 },
    xaxis: {
      title: { text: `criticality of ${escaped(D.layers[at].label)}` },
      range: [-0.02, 1.02],
      zeroline: false,
    },
    yaxis: {
      ...ticks(rows.map((row) => escaped(short(D.models[row].label)))),
      range: [-0.7, rows.length - 0.3],
      tickfont: { size: 10 },
      zeroline: false,
    },
  };
  draw("layer-plot", traces, layout, (point) => choose({ model: rows[point.y] }));
  shownTables.layer = {
    rows,
    columns: [
      { name: "layer", of: () => D.layers[at].name },
      { name: "model", of: (row) => D.models[row].name },
      { name: "category", of: (row) => categoryOf(D.models[row]).name },
      { name: "criticality", of: (row) => values[row][at] },
      { name: "low", of: (row) => low[row][at] },
      { name: "high", of: (row) => high[row][at] },
      { name: "trials", of: (row) => D.trials[row][at] },
    ],
  };
}

export function drawModel() {
  const { values, low, high } = CRITICALITY;
  const line = (row, color, shift, dash) => ({
    type: "scatter",
    mode: "lines+markers",
    name: escaped(D.models[row].label),
    x: D.layers.map((_, i) => i + shift),
    y: values[row],
    error_y: { ...bars(values[row], low[row], high[row]), color },
    line: { color, width: 1.5, dash },
    marker: { color, size: 6 },
    hoverinfo: "text",
    text: D.layers.map((_, i) => hover(CRITICALITY, row, i)),
  });
  const { model } = state;
  const both = known(D.baseline) && model !== D.baseline;
  const traces = both ? [line(D.baseline, style("--soft"), 0.15, "dot")] : [];
  traces.push(line(model, colorOf(categoryOf(D.models[model])), both ? -0.15 : 0, "solid"));
  traces.push(...advised(model));
  $("model-plot").style.width = `max(100%, ${11 * N_LAYERS + 80}px)`;
  const layout = {
    ...layerSize(260),
    ...LEGEND_ABOVE,
    xaxis: layerAxis(),
    yaxis: { title: { text: "criticality" }, range: [-0.02, 1.1], zeroline: false },
    ...stagesAndLevel(D.models[model].unrelated),
  };
  draw("model-plot", traces, layout, (point) => choose({ layer: Math.round(point.x) }));
  const models = both ? [model, D.baseline] : [model];
  shownTables.model = {
    rows: models.flatMap((row) => D.layers.map((layer, i) => ({ row, layer, i }))),
    columns: [
      { name: "model", of: ({ row }) => D.models[row].name },
      { name: "layer", of: ({ layer }) => layer.name },
      { name: "stage", of: ({ layer }) => layer.stage },
      { name: "criticality", of: ({ row, i }) => values[row][i] },
      { name: "low", of: ({ row, i }) => low[row][i] },
      { name: "high", of: ({ row, i }) => high[row][i] },
      { name: "trials", of: ({ row, i }) => D.trials[row][i] },
      { name: "status", of: ({ row, i }) => D.statuses[row][i] },
    ],
  };
}

// Marks of the layers to which the chosen action is done; says below what that rests on.
function advised(model) {
  const action = D.advice[$("action").value];
  const found = action?.models.find((one) => one.model === model);
  const others = action?.models.map((one) => D.models[one.model].label).join(", ");
  const missing = action ? `Advice is here for ${others}. Other models: layercrit report --model NAME.` : "";
  $("advice-said").textContent = found?.said ?? missing;
  if (!found) return [];
  const tie = new Set(found.tie);
  const chosen = new Set(found.chosen);
  const mark = (name, symbol, layers) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: layers,
    y: layers.map(() => 1.06),
    hoverinfo: "text",
    text: layers.map((i) => `<b>${escaped(D.layers[i].name)}</b><br>${name}`),
    marker: { color: style("--text"), size: 9, symbol },
  });
  return [
    mark(
      `to be ${action.done}`,
      "triangle-down",
      found.chosen.filter((i) => !tie.has(i)),
    ),
    mark(
      `to be ${action.done}, a tie`,
      "triangle-down-open",
      found.chosen.filter((i) => tie.has(i)),
    ),
    mark(
      `not to be ${action.done}, a tie`,
      "circle-open",
      found.tie.filter((i) => !chosen.has(i)),
    ),
  ].filter(({ x }) => x.length);
}

// Where stages end, and the level of an unrelated prediction if it is known.
function stagesAndLevel(unrelated) {
  if (!known(unrelated)) return { shapes: stageLines(), annotations: [] };
  const line = { color: style("--soft"), width: 1, dash: "dash" };
  const level = { type: "line", xref: "paper", x0: 0, x1: 1, y0: unrelated, y1: unrelated, line };
  const note = {
    xref: "paper",
    x: 1,
    y: unrelated,
    xanchor: "right",
    yanchor: "bottom",
    showarrow: false,
    text: "unrelated prediction",
    font: { size: 11 },
  };
  return { shapes: [...stageLines(), level], annotations: [note] };
}

export function drawAccuracy() {
  if (IS_ALONE) return;
  const models = D.models.filter(
    ({ accuracy, criticality, category }) => known(accuracy) && known(criticality) && !state.hidden.has(category),
  );
  const groups = D.categories.map((category, i) => ({ category, some: models.filter((m) => m.category === i) }));
  const traces = groups
    .filter(({ some }) => some.length)
    .map(({ category, some }) => ({
      type: "scatter",
      mode: "markers",
      name: escaped(category.label),
      customdata: some.map((model) => D.models.indexOf(model)),
      x: some.map((model) => 100 * model.accuracy),
      y: some.map((model) => 100 * model.criticality),
      hoverinfo: "text",
      text: some.map(
        (model) =>
          `<b>${escaped(model.label)}</b><br>accuracy ${percent(model.accuracy)}%, ` +
          `mean criticality ${percent(model.criticality)}%<br>` +
          `${100 * D.level}% interval: ${interval(model.low, model.high)}`,
      ),
      marker: {
        color: colorOf(category),
        size: 10,
        symbol: category.symbol,
        line: { color: style("--card"), width: 0.5 },
      },
    }));
  const layout = {
    ...LEGEND_ABOVE,
    height: Math.min(700, Math.max(420, $("layer-plot").clientHeight - 60)),
    margin: { l: 10, r: 10, t: 40, b: 40 },
    xaxis: { title: { text: `${D.accuracy} accuracy (%)` }, zeroline: false },
    yaxis: { title: { text: "mean criticality (%)" }, zeroline: false },
  };
  draw("accuracy-plot", traces, layout, (point) => choose({ model: point.customdata }));
  shownTables.accuracy = {
    rows: models,
    columns: [
      { name: "model", of: (model) => model.name },
      { name: "category", of: (model) => categoryOf(model).name },
      { name: "accuracy", of: (model) => model.accuracy },
      { name: "criticality", of: (model) => model.criticality },
      { name: "low", of: (model) => model.low },
      { name: "high", of: (model) => model.high },
    ],
  };
}
