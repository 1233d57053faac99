// Proxies against criticality: a point for each layer, and how well each proxy ranks layers over the models.
import { $, choose, D, known, shownTables } from "./data.js";
import { draw, style } from "./plots.js";
import { drawTable, escaped, interval, share, signed } from "./texts.js";

const FACTOR = 30; // span from which on an axis is logarithmic

const chosenProxy = () => D.proxies.proxies[$("proxy").value];

// Show the section where there are proxies, and listen to its controls.
export function prepareProxies() {
  $("proxies").hidden = $("proxies-link").hidden = !D.proxies;
  if (!D.proxies) return;
  $("proxy").append(
    ...D.proxies.proxies.map(({ label, null: none }, i) => new Option(none ? `${label} (null)` : label, i)),
  );
  $("proxies-model").append(...D.proxies.models.map((model, i) => new Option(D.models[model].label, i)));
  $("proxy").onchange = drawProxies;
  $("proxies-model").onchange = drawProxies;
  $("proxies-said").textContent = D.proxies.sentence;
  drawRanks();
}

export function drawProxies() {
  if (!D.proxies) return;
  const { label, values } = chosenProxy();
  const place = Number($("proxies-model").value);
  const exact = D.proxies.exact[place];
  const layers = D.layers.map((_, i) => i).filter((i) => known(values[place][i]) && known(exact[i]));
  const x = layers.map((i) => values[place][i]);
  const spans = x.length > 0 && Math.min(...x) > 0 && Math.max(...x) > FACTOR * Math.min(...x);
  const points = {
    type: "scatter",
    mode: "markers",
    x,
    y: layers.map((i) => exact[i]),
    customdata: layers,
    hoverinfo: "text",
    text: layers.map(
      (i) =>
        `<b>${escaped(D.layers[i].name)}</b><br>${escaped(label)}: ${values[place][i].toPrecision(3)}<br>` +
        `criticality: ${share(exact[i])}`,
    ),
    marker: { color: style("--text"), size: 8 },
  };
  const layout = {
    height: 380,
    margin: { l: 10, r: 10, t: 10, b: 40 },
    xaxis: { title: { text: escaped(label) }, type: spans ? "log" : "linear", zeroline: false },
    yaxis: { title: { text: "criticality" }, range: [-0.02, 1.02], zeroline: false },
  };
  draw("proxies-plot", [points], layout, (point) => choose({ layer: point.customdata }));
  shownTables.proxies = {
    rows: layers,
    columns: [
      { name: "layer", of: (i) => D.layers[i].name },
      { name: label, of: (i) => values[place][i] },
      { name: "criticality", of: (i) => exact[i] },
    ],
  };
}

function drawRanks() {
  const columns = [
    { name: "proxy", head: "proxy", of: ({ label, null: none }) => (none ? `${label} (null)` : label) },
    { name: "spearman", head: "Spearman's rho", of: (row) => row.spearman, written: (value) => signed(value, 2) },
    { name: "interval", head: "interval", of: (row) => interval(row.spearman_low, row.spearman_high) },
  ];
  drawTable($("proxies-table"), "Rank correlation with criticality, means over models", {
    rows: D.proxies.proxies,
    columns,
  });
}
