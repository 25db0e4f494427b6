"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 100;
const DARK = matchMedia("(prefers-color-scheme: dark)");

/* Plots */
const LIGHTER = { "#0072b2": "#4aa3df", "#7f7f7f": "#a8a8a8", "#8c564b": "#c49c94" };

function colours() {
  // On paper the page is light: its style changes only after the plots have been drawn for it.
  if (printing) return { text: "#000000", line: "#bbbbbb", panel: "#f5f6f8", quiet: "#444444" };
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { text: of("--text"), line: of("--line"), panel: of("--panel"), quiet: of("--quiet") };
}

let printing = false;
const isDark = () => DARK.matches && !printing;

function coloured(traces, dark) {
  const text = JSON.stringify(traces);
  return JSON.parse(dark ? text.replace(/"#[0-9a-f]{6}"/g, (found) => `"${LIGHTER[found.slice(1, -1)] || found.slice(1, -1)}"`) : text);
}

function themed(layout, narrow, traces) {
  const { text, line, panel, quiet } = colours();
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line };
  return {
    ...layout,
    // A narrow legend has a line for each entry: the plot keeps its own height below it.
    height: layout.height + (narrow && traces > 2 ? 19 * traces : 0),
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, size: narrow ? 11 : 13, family: "system-ui, sans-serif" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet },
    hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: text }, align: "left" },
  };
}

function draw(within = document) {
  for (const place of within.querySelectorAll("[data-figure]")) {
    // A folded plot is drawn when its section opens.
    if (place.closest("details:not([open])")) continue;
    const figure = data.figures[Number(place.dataset.figure)];
    const narrow = place.clientWidth < 500;
    const named = figure.data.filter((trace) => trace.showlegend !== false).length;
    const layout = themed(coloured(figure.layout, isDark()), narrow, named);
    Plotly.react(place, coloured(figure.data, isDark()), layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: narrow ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
    });
    if (!place.dataset.clickable) {
      place.dataset.clickable = "yes";
      place.on("plotly_click", (event) => {
        const run = event.points[0].customdata;
        if (run) showRun(run);
      });
    }
  }
}

/* Figures as a person reads them */
function shown(value, kind) {
  if (value === null) return "–";
  if (typeof value === "string") return value;
  const short = (number, digits) => Number(number.toPrecision(digits)).toString();
  if (kind === "integer") return Math.round(value).toLocaleString("en");
  if (kind === "bytes") {
    for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (Math.abs(value) >= factor) return `${short(value / factor, 3)} ${unit}`;
    }
    return `${value} B`;
  }
  if (kind === "seconds") return `${value.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} s`;
  if (kind === "usd") return `$${value.toFixed(2)}`;
  return Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en") : short(value, 4);
}

function compare(a, b, direction) {
  if (a === b) return 0;
  if (a === null) return 1;
  if (b === null) return -1;
  if (typeof a === "number" && typeof b === "number") return (a - b) * direction;
  return String(a).localeCompare(String(b), "en", { numeric: true }) * direction;
}

function mark(heads, chosen) {
  const direction = chosen.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  chosen.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  return direction;
}

/* Small tables: their rows are in the page */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const direction = mark(heads, head);
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent === "–" ? null : cell.textContent;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b), direction));
    table.tBodies[0].append(...rows);
  }));
}

/* Every run: unpacked column by column, shown a page of rows at a time, so that thousands open at once */
async function readRuns() {
  const bytes = Uint8Array.from(atob(data.runs), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const byColumn = JSON.parse(await new Response(stream).text());
  return byColumn[0].map((_, row) => byColumn.map((column) => column[row]));
}

function runTable(allRuns) {
  const used = data.columns.map((_, column) => allRuns.some((row) => row[column] !== null));
  const columns = data.columns.map((_, column) => column).filter((column) => used[column]);
  const table = document.getElementById("run-table");
  const filter = document.getElementById("filter");
  const previous = document.getElementById("previous");
  const next = document.getElementById("next");
  let rows = allRuns;
  let page = 0;
  let chosen = null;

  function cellOf(value, kind, column) {
    const cell = document.createElement("td");
    cell.className = kind;
    if (column === 0 && data.runsAt !== null) {
      const link = document.createElement("a");
      link.href = `${data.runsAt}/${encodeURIComponent(value)}/record.json`;
      link.textContent = value;
      cell.append(link);
    } else {
      cell.textContent = shown(value, kind);
    }
    return cell;
  }

  function fill() {
    const start = page * PAGE;
    table.tBodies[0].replaceChildren(...rows.slice(start, start + PAGE).map((row) => {
      const line = document.createElement("tr");
      if (row[0] === chosen) line.className = "chosen";
      line.append(...columns.map((column) => cellOf(row[column], data.columns[column][1], column)));
      return line;
    }));
    const last = Math.min(start + PAGE, rows.length);
    document.getElementById("count").textContent =
      rows.length ? `${start + 1}–${last} of ${rows.length.toLocaleString("en")} runs` : "no run has all of these";
    previous.disabled = page === 0;
    next.disabled = last >= rows.length;
  }

  const heads = columns.map((column) => {
    const [name, kind] = data.columns[column];
    const head = document.createElement("th");
    head.scope = "col";
    head.className = kind;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    head.append(button);
    head.addEventListener("click", () => {
      const direction = mark(heads, head);
      rows = [...rows].sort((a, b) => compare(a[column], b[column], direction));
      page = 0;
      fill();
    });
    return head;
  });

  function keep(kept, first) {
    rows = kept;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    page = Math.floor(first / PAGE);
    fill();
  }

  const line = document.createElement("tr");
  line.append(...heads);
  table.tHead.append(line);
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    const has = (row, word) => row.some((value) => value !== null && String(value).toLowerCase().includes(word));
    keep(allRuns.filter((row) => words.every((word) => has(row, word))), 0);
  });
  previous.addEventListener("click", () => { page -= 1; fill(); });
  next.addEventListener("click", () => { page += 1; fill(); });
  fill();
  return (run) => {
    chosen = run;
    filter.value = "";
    keep(allRuns, Math.max(0, allRuns.findIndex((row) => row[0] === run)));
    document.getElementById("runs").open = true;
    const line = table.querySelector("tr.chosen");
    if (line) line.scrollIntoView({ block: "center" });
  };
}

/* Folded sections */
function unfold(target) {
  const section = target && target.closest("details.section");
  if (section) section.open = true;
}

for (const section of document.querySelectorAll("details.section")) {
  section.addEventListener("toggle", () => section.open && data.figures.length && draw(section));
}
for (const link of document.querySelectorAll('a[href^="#"]')) {
  link.addEventListener("click", () => unfold(document.getElementById(decodeURIComponent(link.hash.slice(1)))));
}
unfold(location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))));

let foldedBefore = [];
addEventListener("beforeprint", () => {
  printing = true;
  foldedBefore = [...document.querySelectorAll("details:not([open])")].filter((one) => one.id !== "runs");
  foldedBefore.forEach((one) => { one.open = true; });
  if (data.figures.length) draw();
});
addEventListener("afterprint", () => {
  printing = false;
  foldedBefore.forEach((one) => { one.open = false; });
  if (data.figures.length) draw();
});

/* Commands to copy */
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(`command-${button.dataset.copies}`);
    const label = button.textContent;
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      // A page from a file may have no clipboard: the text is selected instead.
      unfold(source);
      getSelection().selectAllChildren(source);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}

let showRun = () => {};
readRuns().then((runs) => { showRun = runTable(runs); });
if (data.figures.length) draw();
DARK.addEventListener("change", () => data.figures.length && draw());
