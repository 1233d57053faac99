// Maps over epochs: layers that go back to an epoch, and fresh draws in the network after each.
import { $, D, known } from "./data.js";
import { drawLayerMap } from "./heatmap.js";
import { escaped, interval, percent, share } from "./texts.js";

const ABOUT = {
  rewound:
    "One layer of the final network goes back to its values after an epoch, the rest stays trained; epoch 0 is " +
    "before training. First row: fresh draws, which differ from epoch 0 only in which random values the layer gets.",
  trained: "Fresh draws in the network as it was after each epoch. First row: the final network.",
};
const TITLES = { rewound: "set back to an epoch", trained: "fresh draws after each epoch" };

const chosenMap = () => D.epochs[$("epochs-map").value];

// Show the section where there is a map, and listen to its controls.
export function prepareEpochs() {
  $("epochs").hidden = $("epochs-link").hidden = !D.epochs.length;
  $("epochs-map").append(...D.epochs.map(({ label, kind }, i) => new Option(`${label}: ${TITLES[kind]}`, i)));
  $("epochs-map").onchange = drawEpochs;
}

export function drawEpochs() {
  if (!D.epochs.length) return;
  const { kind, rows, criticality, low, high } = chosenMap();
  $("epochs-about").textContent =
    `${ABOUT[kind]}${rows.some((row) => known(row.accuracy)) ? " Next to the rows: top-1 accuracy (%)." : ""}`;
  const texts = rows.map(({ name, accuracy }) => (known(accuracy) ? `${name}  ${percent(accuracy)}` : name));
  const written = (row, i) =>
    `<b>${escaped(rows[row].name)}</b><br>${escaped(D.layers[i].name)}<br>criticality: ` +
    `${share(criticality[row][i])}<br>${100 * D.level}% interval: ${interval(low[row][i], high[row][i])}`;
  drawLayerMap("epochs", texts, criticality, written, "Criticality by epoch (rows) and layer (columns)", [
    { name: "row", head: "row", of: (row) => rows[row].name },
    { name: "accuracy", head: "accuracy (%)", of: (row) => rows[row].accuracy, written: percent },
  ]);
}
