// How names and numbers are written, tables, and files to download.
import { $, known, shownTables } from "./data.js";

const MINUS = "\u2212";
const NONE = "\u2013";

// Plotly reads some tags and formulas in texts; names from outside are shown as they are.
export const escaped = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
// Of characters, since halves of one make a picture that cannot be saved.
export const short = (text, length = 40) => {
  const all = [...text];
  if (all.length <= length) return text;
  return `${all.slice(0, length / 2 + 1).join("")}\u2026${all.slice(3 - length / 2).join("")}`;
};

export const signed = (value, digits) => {
  if (!known(value)) return NONE;
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? MINUS : "+") + text;
};
export const share = (value) => (known(value) ? value.toFixed(3).replace("-", MINUS) : NONE);
// 100 * 0.7615 is not 76.15
export const percent = (value) => (known(value) ? (Math.round(1e6 * value) / 1e4).toFixed(1) : NONE);
export const count = (value) => (known(value) ? String(value) : NONE);
export const interval = (low, high) => (known(low) && known(high) ? `${share(low)} to ${share(high)}` : "none");
export const pValue = (value) => {
  if (!known(value)) return NONE;
  return value < 0.0001 ? "< 0.0001" : value.toPrecision(2);
};

export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- tables ---------------------------------------------------------------------------------------------------------

// A table has rows, of any kind, and columns: `name` in the file, `of` a row its value there; and if the page shows it
// too, `head` there, `about` what it means, `shown` of a row where the page shows another value, and `written`, how its
// numbers are.

const onPage = ({ shown, of }, row) => (shown ?? of)(row);

// Draw a table into its element, sorted by a column if one is given.
export function drawTable(place, caption, { columns, rows }, sorted = null, ascending = true) {
  const heads = columns.filter((column) => column.head);
  const ordered = sorted ? [...rows].sort(byColumn(sorted, ascending)) : rows;
  const top = heads.map((column, i) => {
    const mark = ascending ? " \u25b2" : " \u25bc";
    const button = element("button", {
      type: "button",
      textContent: column.head + (column === sorted ? mark : ""),
      title: column.about ?? "",
      onclick: () => {
        drawTable(place, caption, { columns, rows: ordered }, column, !(column === sorted && ascending));
        place.querySelectorAll("th button")[i].focus();
      },
    });
    const isText = ordered.length && typeof onPage(column, ordered[0]) === "string";
    const cell = element("th", { scope: "col", className: isText ? "left" : "" }, button);
    if (column === sorted) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    return cell;
  });
  const lines = ordered.map((row) =>
    element(
      "tr",
      {},
      ...heads.map((column, i) => {
        const value = onPage(column, row);
        const isText = typeof value === "string";
        const text = { textContent: isText ? value : column.written(value), ...(isText && { className: "left" }) };
        return i ? element("td", text) : element("th", { scope: "row", ...text });
      }),
    ),
  );
  place.replaceChildren(
    element("caption", { textContent: caption }),
    element("thead", {}, element("tr", {}, ...top)),
    element("tbody", {}, ...lines),
  );
}

// Compare rows by a column; what is not known comes last either way.
function byColumn(column, ascending) {
  return (one, other) => {
    const [a, b] = [onPage(column, one), onPage(column, other)];
    if (!known(a) || !known(b)) return Number(known(b)) - Number(known(a));
    return (ascending ? 1 : -1) * (typeof a === "string" ? a.localeCompare(b) : a - b);
  };
}

// --- files ----------------------------------------------------------------------------------------------------------

function asCsv({ columns, rows }) {
  const field = (value) => {
    if (!known(value)) return "";
    if (typeof value !== "string") return String(value);
    // spreadsheets take a cell that begins so for a formula; numbers are not touched
    const safe = /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  const lines = [columns.map(({ name }) => name), ...rows.map((row) => columns.map(({ of }) => of(row)))];
  return lines.map((line) => `${line.map(field).join(",")}\r\n`).join("");
}

async function asSvg(plot) {
  const url = await Plotly.toImage(plot, { format: "svg", width: plot.clientWidth, height: plot.clientHeight });
  return decodeURIComponent(url.slice(url.indexOf(",") + 1));
}

export async function save(format, name) {
  const [content, type] =
    format === "csv" ? [asCsv(shownTables[name]), "text/csv"] : [await asSvg($(`${name}-plot`)), "image/svg+xml"];
  const link = element("a", {
    href: URL.createObjectURL(new Blob([content], { type })),
    download: `${name}.${format}`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
