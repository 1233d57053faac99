// For whom a model's layers matter: by class of images, by right and wrong predictions, and by image.
import { $, choose, D, IS_ALONE, known, N_LAYERS, shownTables, state } from "./data.js";
import { drawLayerMap } from "./heatmap.js";
import { bars, draw, layerAxis, layerSize, stageLines, style } from "./plots.js";
import { count, element, escaped, interval, percent, share, short, signed } from "./texts.js";

const chosenWhom = () => D.whom[$("whom-model").value];

// Show the section where criticality is known by class, and listen to its controls.
export function prepareWhom() {
  const some = D.whom.length > 0;
  $("whom").hidden = $("whom-link").hidden = !some;
  $("whom-model").append(...D.whom.map(({ model }, i) => new Option(D.models[model].label, i)));
  $("whom-model").onchange = drawWhom;
}

export function drawWhom() {
  if (!D.whom.length) return;
  drawClasses(chosenWhom());
  drawRight(chosenWhom());
  drawMoved();
}

function drawClasses({ model, of, classes, n_classes: all, criticality, low, high }) {
  const few =
    classes.length < all ? ` Of ${all} classes, the ${classes.length} least like the mean over classes are shown.` : "";
  $("whom-about").textContent =
    `Criticality of each layer of ${D.models[model].label} for the images of each class` +
    `${of === "label" ? "" : " that the trained network predicts"}. Classes with like rows are next to each other; ` +
    `in brackets: how many images the class has.${few} Each interval is for its square alone: of many, some miss. ` +
    (IS_ALONE ? "" : "Other models: layercrit report --model NAME.");
  const texts = classes.map(({ name, n_images: n }) => {
    const called = /^\d+$/.test(name) ? `class ${name}` : short(name, innerWidth < 600 ? 16 : 40);
    return `${called} (${n} ${n === 1 ? "image" : "images"})`;
  });
  const written = (row, i) =>
    `<b>${escaped(classes[row].name)}</b><br>${escaped(D.layers[i].name)}<br>criticality: ` +
    `${share(criticality[row][i])}<br>${100 * D.level}% interval: ${interval(low[row][i], high[row][i])}<br>` +
    `images: ${classes[row].n_images}` +
    (known(classes[row].accuracy) ? `, named right: ${percent(classes[row].accuracy)}%` : "");
  drawLayerMap("whom", texts, criticality, written, "Criticality by class (rows) and layer (columns)", [
    { name: "class", head: "class", of: (row) => classes[row].name },
    { name: "n_images", head: "images", of: (row) => classes[row].n_images, written: count },
    { name: "accuracy", head: "named right (%)", of: (row) => classes[row].accuracy, written: percent },
  ]);
}

function drawRight({ correctness: found }) {
  $("right").hidden = !found;
  if (!found) return;
  const { correct, wrong, difference, low, high } = found;
  $("right-about").textContent =
    `Criticality for the ${found.n_correct} images that the trained network names right minus that for the ` +
    `${found.n_wrong} that it names wrong: above 0, a layer matters more where the network is right.`;
  const color = style("--text");
  const points = {
    type: "scatter",
    mode: "markers",
    x: D.layers.map((_, i) => i),
    y: difference,
    error_y: { ...bars(difference, low, high), color },
    marker: { color, size: 6 },
    hoverinfo: "text",
    text: D.layers.map(
      ({ name }, i) =>
        `<b>${escaped(name)}</b><br>named right: ${share(correct[i])}<br>named wrong: ${share(wrong[i])}<br>` +
        `difference: ${signed(difference[i], 3)}<br>${100 * D.level}% interval: ${interval(low[i], high[i])}`,
    ),
  };
  $("right-plot").style.width = `max(100%, ${11 * N_LAYERS + 80}px)`;
  const layout = {
    ...layerSize(200),
    xaxis: layerAxis(),
    yaxis: { title: { text: "right minus wrong" }, zeroline: true },
    shapes: stageLines(),
  };
  draw("right-plot", [points], layout, (point) => choose({ layer: point.x }));
  shownTables.right = {
    rows: D.layers.map((_, i) => i),
    columns: [
      { name: "layer", of: (i) => D.layers[i].name },
      { name: "correct", of: (i) => correct[i] },
      { name: "wrong", of: (i) => wrong[i] },
      { name: "difference", of: (i) => difference[i] },
      { name: "low", of: (i) => low[i] },
      { name: "high", of: (i) => high[i] },
    ],
  };
}

// The images that the reset of the chosen layer moves most and least, where the page has pictures.
export function drawMoved() {
  const moved = D.whom.length ? chosenWhom().moved : null;
  $("moved").hidden = !moved;
  if (!moved) return;
  $("moved-title").textContent = `Images that a reset of ${D.layers[state.layer].label} moves`;
  for (const side of ["most", "least"]) {
    const images = moved[side][state.layer].map(([i, value]) => shownImage(moved.pictures[i], value));
    $(`moved-${side}`).replaceChildren(...images);
  }
}

function shownImage({ picture, label, prediction }, criticality) {
  const words = [label ? `label ${label}` : "", prediction ? `predicted ${prediction}` : ""].filter(Boolean).join(", ");
  return element(
    "figure",
    {},
    element("img", { src: picture, alt: words || "an image of the probe set" }),
    element("figcaption", {}, element("strong", { textContent: share(criticality) }), ` ${words}`),
  );
}
