// Differences between two models or two categories: read from the page, plotted, and put into words.
import { $, bytes, choose, D, IS_ALONE, idOf, known, mean, N_LAYERS, shownTables, state, unzipped } from "./data.js";
import { bars, draw, LEGEND_ABOVE, layerAxis, layerSize, stageLines, style } from "./plots.js";
import { drawTable, element, escaped, interval, pValue, share, signed } from "./texts.js";

let blocks = null; // way to look at pairs -> its columns, notes, and the places of its pairs; once it is read

// Ways to store a column.
const STORED = {
  difference: { type: Int16Array, read: (stored) => (stored === -32768 ? null : stored / 1e4) },
  p_value: { type: Uint16Array, read: (stored) => (stored === 65535 ? null : 10 ** (-stored / 1000)) },
  place: { type: Uint8Array, read: (stored) => stored },
  truth: { type: Uint8Array, read: Boolean },
};
const CONTROLS = {
  holm: { label: "Holm", column: "significant" },
  bh: { label: "Benjamini-Hochberg", column: "significant_bh" },
};

export async function readDifferences() {
  const buffer = await unzipped(bytes(idOf("differences"))).arrayBuffer();
  let offset = 0;
  blocks = {};
  for (const { key, notes, pairs } of D.differences.blocks) {
    const columns = {};
    for (const [name, stored] of Object.entries(D.differences.columns)) {
      const { type, read } = STORED[stored];
      const end = offset + pairs.length * N_LAYERS * type.BYTES_PER_ELEMENT;
      const values = new type(buffer.slice(offset, end));
      columns[name] = (i) => read(values[i]);
      offset = end;
    }
    blocks[key] = { columns, notes, places: new Map(pairs.map(([first, second], i) => [`${first} ${second}`, i])) };
  }
}

// Return of each layer the difference of a pair by name of column, or null if the page does not have the pair.
function differences(block, first, second) {
  const forward = block?.places.get(`${first} ${second}`);
  const place = forward ?? block?.places.get(`${second} ${first}`);
  if (place === undefined) return null;
  return D.layers.map((layer, i) => {
    const at = place * N_LAYERS + i;
    const row = Object.fromEntries(Object.entries(block.columns).map(([name, column]) => [name, column(at)]));
    row.covers = D.differences.covers[row.covers];
    if (forward !== undefined) return { ...row, layer };
    const turned = (value) => (known(value) ? 0 - value : null);
    return { ...row, layer, difference: turned(row.difference), low: turned(row.high), high: turned(row.low) };
  });
}

export function drawCompare() {
  if (!blocks || IS_ALONE) return;
  const [[kind, first], [otherKind, second]] = ["first", "second"].map((id) => $(id).value.split(" "));
  $("unit").disabled = kind !== "categories";
  const unit = kind === "categories" ? $("unit").value : "trials";
  const block = blocks[`${kind} ${unit} ${$("values").value}`];
  let problem = "";
  if (kind !== otherKind) problem = "Choose two models or two categories.";
  else if (first === second) problem = "Choose two different ones.";
  const rows = problem ? null : differences(block, first, second);
  for (const part of ["plot", "details", "notes"]) $(`compare-${part}`).hidden = !rows;
  for (const button of document.querySelectorAll('[data-of="compare"]')) button.disabled = !rows;
  if (!rows) {
    $("compare-said").textContent = problem || "This pair is not in the page: compute it with `layercrit.differences`.";
    return;
  }
  const control = CONTROLS[state.control];
  const pair = { first: D[kind][first], second: D[kind][second] };
  tellDifferences(rows, control, pair, unit, block.notes);
  drawDifferences(rows, control);
  tabulateDifferences(rows, control, pair);
}

function tellDifferences(rows, control, { first, second }, unit, notes) {
  const tested = rows.filter((row) => known(row.p_value)).length;
  const found = rows.filter((row) => row[control.column]).length;
  const middle = mean(rows.map((row) => row.difference));
  const outcome = tested
    ? `${found} of ${tested} tested layers differ significantly ` +
      `(${control.label}, level ${D.differences.alpha}, over the layers of this pair)`
    : `no layer can be tested, nor has it an interval: that takes at least two ${unit} on each side`;
  $("compare-said").textContent =
    `${first.label} minus ${second.label}: ${outcome}. ` +
    `Mean difference ${known(middle) ? signed(middle, 3) : "not known"}.`;
  const unadjusted =
    `The plotted ${100 * D.level}% intervals are not adjusted for multiple testing: ` +
    "one may exclude 0 although its difference is not significant.";
  const said = tested ? [unadjusted, ...notes] : [];
  $("compare-notes").replaceChildren(...said.map((text) => element("li", { textContent: text })));
}

function drawDifferences(rows, control) {
  const hover = (row) =>
    `<b>${escaped(row.layer.name)}</b><br>difference ${share(row.difference)}<br>` +
    `${100 * D.level}% interval: ${interval(row.low, row.high)}, for new ${row.covers}<br>` +
    `p ${pValue(row.p_value)}; Holm ${pValue(row.p_holm)}; Benjamini-Hochberg ${pValue(row.p_bh)}`;
  const traces = [true, false].map((significant) => {
    const at = rows.map((_, i) => i).filter((i) => rows[i][control.column] === significant);
    const some = at.map((i) => rows[i]);
    const of = (name) => some.map((row) => row[name]);
    const color = style(significant ? "--link" : "--soft");
    return {
      type: "scatter",
      mode: "markers",
      name: significant ? "significant" : "not significant",
      x: at,
      y: of("difference"),
      error_y: { ...bars(of("difference"), of("low"), of("high")), color },
      marker: { color, size: 8, symbol: significant ? "circle" : "circle-open" },
      hoverinfo: "text",
      text: some.map(hover),
    };
  });
  $("compare-plot").style.width = `max(100%, ${14 * N_LAYERS + 80}px)`;
  const layout = {
    ...layerSize(290),
    ...LEGEND_ABOVE,
    xaxis: layerAxis(),
    yaxis: { title: { text: "difference in criticality" }, zeroline: true },
    shapes: stageLines(),
  };
  draw("compare-plot", traces, layout, (point) => choose({ layer: point.x }));
}

function tabulateDifferences(rows, control, { first, second }) {
  const number = (name, head, written) => ({ name, head, written, of: (row) => row[name] });
  const significant = (row) => row[control.column];
  shownTables.compare = {
    rows,
    columns: [
      { name: "first", of: () => first.name },
      { name: "second", of: () => second.name },
      { name: "layer", head: "layer", of: (row) => row.layer.name, shown: (row) => row.layer.label },
      number("difference", "difference", share),
      number("low", "low", share),
      number("high", "high", share),
      number("p_value", "p", pValue),
      number("p_holm", "p (Holm)", pValue),
      number("p_bh", "p (Benjamini-Hochberg)", pValue),
      { name: "significant", head: "significant", of: significant, shown: (row) => (significant(row) ? "yes" : "no") },
      { name: "covers", head: "holds for new", of: (row) => row.covers },
    ],
  };
  drawTable($("compare-table"), `${first.label} minus ${second.label}`, shownTables.compare);
}
