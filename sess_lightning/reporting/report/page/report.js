"use strict";
// Text from data sets only ever becomes textContent or an attribute that holds text, never markup.
const { runs, pictures, styles, plot } = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("run");
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function table({ caption, columns, rows }) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([first, ...rest]) =>
    make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell))));
  const whole = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole);
}

function figure(sample, column, when) {
  const [height, width] = sample.size;
  const what = column === "image" ? "Picture" : `Map of ${column} over the picture`;
  const picture = make("img", {
    src: `data:image/jpeg;base64,${pictures[sample.pictures[column]]}`, width, height,
    alt: `${what}, ${sample.title}, label ${sample.label}, after ${when}`,
    ...(Math.min(width, height) < 80 ? { class: "coarse" } : {}),
  });
  const boxes = draw("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const css of ["under", "over"])
    for (const [x0, y0, x1, y1] of sample.boxes)
      boxes.append(draw("rect", { class: css, x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
  return make("figure", {}, make("div", { class: "picture" }, picture, boxes), make("figcaption", {}, column));
}

function card(sample, when) {
  const lines = sample.caption.split("\n").map((line) => make("li", {}, line));
  const columns = Object.keys(sample.pictures).map((column) => figure(sample, column, when));
  return make("article", { class: "sample" },
    make("h4", {}, sample.title), make("div", { class: "columns" }, ...columns), make("ul", {}, ...lines));
}

function curves(frame, row, methods) {
  const lines = [], legend = [];
  for (const { name, method, lines: both } of methods) {
    const values = both[row], last = values.length - 1;
    if (values.includes(null)) continue;
    const css = `${styles[method] ?? "own"} line`;
    const points = values.map((value, i) => `${(i / last).toFixed(4)},${(1 - value).toFixed(4)}`);
    lines.unshift(draw("polyline", { class: css, points: points.join(" ") }));
    const area = values.slice(1).reduce((sum, value, i) => sum + (value + values[i]) / 2, 0) / last;
    const swatch = draw("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" });
    swatch.append(draw("line", { class: css, x1: 0, x2: 28, y1: 4, y2: 4 }));
    legend.push(make("li", {}, swatch, `${name}: area ${area.toFixed(3)}`));
  }
  frame.querySelector(".lines").replaceChildren(...lines);
  frame.querySelector(".legend").replaceChildren(...legend);
}

function show() {
  const index = Number(slider.value), run = runs[index];
  const text = `${run.when} (${index + 1} of ${runs.length})`;
  document.getElementById("when").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  document.getElementById("panel").hidden = !run.panel.length;
  document.querySelector(".samples").replaceChildren(...run.panel.map((sample) => card(sample, run.when)));
  curves(document.querySelector(".chart.insertion"), 0, run.curves);
  curves(document.querySelector(".chart.deletion"), 1, run.curves);
  document.getElementById("tables").replaceChildren(...run.tables.map(table));
  document.getElementById("counts").textContent = run.counts && `Samples: ${run.counts}.`;
  const x = plot.left + run.at * plot.width;
  for (const line of document.querySelectorAll("line.now")) {
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  }
}

function choose(index) {
  slider.value = index;
  show();
}

let timer = null;
const play = document.getElementById("play");

function stop() {
  clearInterval(timer);
  timer = null;
  play.setAttribute("aria-pressed", "false");
  play.textContent = "Play";
}

play.addEventListener("click", () => {
  if (timer !== null) return stop();
  if (Number(slider.value) === runs.length - 1) choose(0);
  play.setAttribute("aria-pressed", "true");
  play.textContent = "Pause";
  timer = setInterval(() => {
    choose(Number(slider.value) + 1);
    if (Number(slider.value) === runs.length - 1) stop();
  }, 800);
});
slider.addEventListener("input", () => { stop(); show(); });
document.getElementById("boxes").addEventListener("change", (event) => {
  document.getElementById("panel").classList.toggle("bare", !event.target.checked);
});
for (const svg of document.querySelectorAll("svg:has(> .now)"))
  svg.addEventListener("click", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const at = (x - plot.left) / plot.width;
    const far = runs.map((run) => Math.abs(run.at - at));
    stop();
    choose(far.indexOf(Math.min(...far)));
  });
show();
