"use strict";
// Tables sort by the buttons in their headings.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const row = heading.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = Array.prototype.indexOf.call(row.children, heading);
    const numeric = heading.classList.contains("number");
    const rising = heading.getAttribute("aria-sort") === (numeric ? "descending" : "none") ||
      !heading.hasAttribute("aria-sort") && !numeric;
    for (const other of row.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (line) => line.children[column].dataset.sort;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return rising ? order : -order;
    };
    body.append(...Array.from(body.rows).sort(compare));
  });
}

// Figures are drawn by plotly from the JSON beside them, in the colours of the reader's theme.
const LIGHTER = new Map([["#0072b2", "#56b4e9"], ["#d55e00", "#f08a3c"], ["#007a59", "#2fc79c"],
  ["#a8558a", "#dd92bb"], ["#b37a00", "#f0c24f"], ["#4a5560", "#b4bec8"]]);
const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll("figure .plot")];
const toggles = [...document.querySelectorAll("input[data-run]")];

function draw(plot) {
  const inTheme = (_, value) => dark.matches && LIGHTER.get(value) || value;
  const {data, layout} = JSON.parse(plot.parentElement.querySelector("script").textContent, inTheme);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const narrow = plot.clientWidth < 560;
  for (const name of Object.keys(layout).filter((name) => /^[xy]axis/.test(name)))
    layout[name] = {gridcolor: colour("line"), zerolinecolor: colour("faint"), linecolor: colour("line"),
      ...layout[name]};
  if (plot.closest(".square")) layout.height = Math.min(layout.height, plot.clientWidth - 30);
  const hidden = toggles.filter((box) => !box.checked).map((box) => Number(box.dataset.run));
  for (const trace of data) trace.visible = !hidden.includes(trace.meta?.run);
  Object.assign(layout, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: colour("ink"), family: "system-ui, sans-serif", size: 12},
    hoverlabel: {bgcolor: colour("box"), font: {color: colour("ink"), size: narrow ? 11 : 12}, namelength: 40},
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom"}); // a finger scrolls the page
  return Plotly.react(plot, data, layout, {displayModeBar: false, responsive: true});
}

// The arrow keys move the crosshair from step to step, Escape takes it away.
function crosshair(plot, event) {
  if (!plot.layout.hoversubplots) return;
  const steps = [...new Set(plot.data.flatMap((trace) => trace.hoverinfo === "skip" ? [] : trace.x))]
    .filter(Number.isFinite).sort((a, b) => a - b);
  const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (event.key === "Escape") Plotly.Fx.unhover(plot);
  if (!move) return;
  event.preventDefault();
  plot.at = Math.min(Math.max((plot.at ?? (move > 0 ? -1 : steps.length)) + move, 0), steps.length - 1);
  Plotly.Fx.hover(plot, {xval: steps[plot.at]}, "xy");
}

async function drawAll() {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const script = document.createElement("script");
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
  for (const plot of plots) {
    plot.textContent = "";
    await draw(plot);
    plot.tabIndex = 0;
    plot.addEventListener("keydown", (event) => crosshair(plot, event));
  }
  dark.addEventListener("change", () => plots.forEach(draw));
  for (const box of toggles) box.addEventListener("change", () => plots.forEach(draw));
  document.documentElement.dataset.drawn = plots.length;
}
if (plots.length) drawAll();
