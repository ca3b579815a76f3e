"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["solid", "dash", "dot", "dashdot"];
const COLOURS = 7;
const byId = (id) => document.getElementById(id);
const variable = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (condition) => variable(`--c${condition % COLOURS}`);
const dash = (condition) => DASHES[Math.floor(condition / COLOURS) % DASHES.length];
const touch = () => matchMedia("(pointer: coarse)").matches;
const faint = (hex, alpha) =>
  `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
// Plotly reads a little HTML in names; what users wrote is text.
const plain = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const wrapped = (text, width) => {
  const lines = [""];
  for (const word of text.split(" ")) {
    const line = lines[lines.length - 1];
    if (line && line.length + word.length >= width) lines.push(word);
    else lines[lines.length - 1] = line ? `${line} ${word}` : word;
  }
  return lines.map(plain).join("<br>");
};

const shown = () =>
  new Set(
    [...document.querySelectorAll("#toggles input:checked")].map((box) =>
      Number(box.dataset.condition)),
  );
const task = () => data.tasks[byId("task") ? Number(byId("task").value) : 0];
const narrow = () => byId("chart-curves").clientWidth < 560;
const metric = () => byId("metric").value;
const metricName = () => metric().replaceAll("_", " ");
const band = () => document.querySelector("input[name=band]:checked").value;
const cells = () => {
  const on = shown();
  return task().cells.filter((cell) => on.has(cell.condition));
};
const name = (cell) => data.conditions[cell.condition];

const columns = (rows) => rows[0].map((_, t) => rows.map((row) => row[t]));
const summary = (rows) => {
  const at = columns(rows);
  return [
    at.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length),
    at.map((values) => Math.min(...values)),
    at.map((values) => Math.max(...values)),
  ];
};
// [middle, low, high] of what is drawn.
const series = (cell) => {
  if (metric() !== "return") return cell.metrics[metric()];
  return band() === "iqm" ? cell.iqm : summary(cell.filled || cell.returns);
};

const bandTrace = (x, low, high, condition, legend) => {
  const known = x.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
  const back = [...known].reverse();
  return {
    x: [...known, ...back].map((i) => x[i]),
    y: [...known.map((i) => high[i]), ...back.map((i) => low[i])],
    fill: "toself",
    // Many bands on each other would hide the lines.
    fillcolor: faint(colour(condition), shown().size > 8 ? 0.07 : 0.16),
    mode: "lines",
    line: { width: 0 },
    hoverinfo: "skip",
    showlegend: false,
    legendgroup: legend,
    name: "band",
  };
};
const lineTrace = (x, y, condition, hover, customdata) => ({
  x,
  y,
  customdata,
  mode: x.length === 1 ? "markers" : "lines",
  name: plain(data.conditions[condition]),
  legendgroup: data.conditions[condition],
  line: { color: colour(condition), dash: dash(condition), width: 2.4 },
  marker: { color: colour(condition), size: 8 },
  hovertemplate: `<b>${wrapped(data.conditions[condition], 40)}</b><br>${hover}<extra></extra>`,
});

const layout = (xTitle, yTitle, height) => ({
  height,
  margin: { l: 72, r: 20, t: 34, b: 56 },
  modebar: {
    bgcolor: "rgba(0,0,0,0)", color: variable("--quiet"), activecolor: variable("--link"),
  },
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: 'system-ui, "Segoe UI", Roboto, sans-serif', size: 14, color: variable("--ink") },
  showlegend: false,
  hovermode: "closest",
  hoverlabel: { bgcolor: variable("--card"), font: { color: variable("--ink") }, align: "left" },
  // A finger that scrolls the page must not zoom the figure.
  dragmode: touch() ? false : "zoom",
  xaxis: {
    title: { text: xTitle },
    gridcolor: variable("--line"),
    zerolinecolor: variable("--line"),
  },
  yaxis: {
    title: { text: yTitle },
    gridcolor: variable("--line"),
    zerolinecolor: variable("--line"),
  },
});

const figures = {
  curves() {
    const traces = [];
    const isReturn = metric() === "return";
    const every = isReturn && band() === "seeds";
    for (const cell of cells()) {
      if (!isReturn && !cell.metrics[metric()]) continue;
      const [middle, low, high] = series(cell);
      const legend = name(cell);
      if (every) {
        cell.returns.forEach((row, i) =>
          traces.push({
            ...lineTrace(cell.steps, row, cell.condition,
              `seed ${cell.seeds[i]}<br>step %{x:,}<br>return %{y:.4~g}`),
            line: { color: faint(colour(cell.condition), 0.4), width: 1 },
            showlegend: false,
          }));
      } else if (cell.seeds.length > 1) {
        traces.push(bandTrace(cell.steps, low, high, cell.condition, legend));
      }
      const what = isReturn && band() === "iqm" ? "interquartile mean" : "mean";
      traces.push(lineTrace(
        cell.steps, middle, cell.condition,
        `step %{x:,}<br>${what} %{y:.4~g}<br>%{customdata[0]:.4~g} to %{customdata[1]:.4~g}`,
        columns([low, high]),
      ));
    }
    const drawn = layout("environment steps", plain(metricName()), 460);
    drawn.xaxis.tickformat = "~s";
    return { data: traces, layout: drawn };
  },
  final() {
    const list = cells();
    const small = narrow();
    const labels = list.map((cell) => wrapped(name(cell), small ? 16 : 34));
    const most = Math.max(1, ...labels.map((label) => label.split("<br>").length));
    const seeds = { x: [], y: [], text: [], color: [] };
    list.forEach((cell, row) => cell.final.forEach((value, i) => {
      seeds.x.push(value);
      seeds.y.push(list.length - 1 - row);
      seeds.text.push(`${wrapped(name(cell), 40)}<br>seed ${cell.seeds[i]}`);
      seeds.color.push(colour(cell.condition));
    }));
    const y = list.map((_, row) => list.length - 1 - row);
    const [middle, low, high] = [0, 1, 2].map((k) => list.map((cell) => cell.interval[k]));
    const tinted = list.map((cell) => colour(cell.condition));
    const traces = [
      {
        x: seeds.x, y: seeds.y, text: seeds.text, mode: "markers", name: "seed",
        marker: { size: 9, color: seeds.color, opacity: 0.4 },
        hovertemplate: "%{text}<br>final return %{x:.5~g}<extra></extra>",
      },
      {
        x: middle, y: y.map((at) => at - 0.24), mode: "markers", name: "interquartile mean",
        text: list.map((cell) => wrapped(name(cell), 40)),
        customdata: columns([low, high]),
        marker: { symbol: "diamond", size: 10, color: tinted },
        error_x: {
          type: "data", symmetric: false, thickness: 2, width: 5, color: variable("--ink"),
          array: list.map((_, i) => (high[i] === null ? 0 : high[i] - middle[i])),
          arrayminus: list.map((_, i) => (low[i] === null ? 0 : middle[i] - low[i])),
        },
        hovertemplate: "%{text}<br>interquartile mean %{x:.5~g}"
          + "<br>%{customdata[0]:.5~g} to %{customdata[1]:.5~g}<extra></extra>",
      },
    ];
    const drawn = layout("final return", "", 120 + list.length * Math.max(40, 16 * most + 8));
    drawn.yaxis = {
      ...drawn.yaxis,
      automargin: true,
      tickvals: y,
      ticktext: labels,
      range: [-0.7, list.length - 0.3],
      zeroline: false,
      tickfont: { size: small ? 11 : 13 },
    };
    return { data: traces, layout: drawn };
  },
  profile: () => profile(task().profile, "final return", "share of seeds above"),
  across: () => profile(data.across, "score", "share of runs above"),
};

const profile = (found, xTitle, yTitle) => {
  const on = shown();
  const traces = [];
  for (const { condition, share } of found.conditions.filter((one) => on.has(one.condition))) {
    const [middle, low, high] = share;
    traces.push(bandTrace(found.thresholds, low, high, condition, data.conditions[condition]));
    traces.push(lineTrace(
      found.thresholds, middle, condition,
      "above %{x:.4~g}: %{y:.0%}<br>%{customdata[0]:.0%} to %{customdata[1]:.0%}",
      columns([low, high]),
    ));
  }
  const drawn = layout(xTitle, yTitle, 400);
  drawn.yaxis.tickformat = ".0%";
  drawn.yaxis.range = [-0.03, 1.03];
  return { data: traces, layout: drawn };
};

const tables = {
  curves() {
    if (metric() !== "return") {
      const rows = [["task", "condition", "step", "mean", "lowest", "highest"]];
      for (const cell of cells()) {
        const found = cell.metrics[metric()];
        if (found) {
          cell.steps.forEach((step, t) =>
            rows.push([task().name, name(cell), step, ...found.map((row) => row[t])]));
        }
      }
      return rows;
    }
    const rows = [["task", "condition", "seed", "step", "return"]];
    for (const cell of cells()) {
      cell.returns.forEach((row, i) => row.forEach((value, t) =>
        rows.push([task().name, name(cell), cell.seeds[i], cell.steps[t], value])));
    }
    return rows;
  },
  final() {
    const rows = [["task", "condition", "seed", "final return"]];
    for (const cell of cells()) {
      cell.final.forEach((value, i) =>
        rows.push([task().name, name(cell), cell.seeds[i], value]));
    }
    return rows;
  },
  profile: () => profileRows(task().profile),
  across: () => profileRows(data.across),
};
const profileRows = (found) => {
  const on = shown();
  const rows = [["condition", "above", "share", "lower", "upper"]];
  for (const one of found.conditions.filter((each) => on.has(each.condition))) {
    found.thresholds.forEach((above, t) =>
      rows.push([data.conditions[one.condition], above, ...one.share.map((row) => row[t])]));
  }
  return rows;
};
const csv = (rows) =>
  rows.map((row) => row.map((value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\r\n") + "\r\n";

const draw = (figure) => {
  const { data: traces, layout: drawn } = figures[figure]();
  return Plotly.react(byId(`chart-${figure}`), traces, drawn, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch() ? false : undefined,
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d"],
  });
};
const present = () => Object.keys(figures).filter((figure) => byId(`chart-${figure}`));
const describe = () => {
  const fallback = metric() !== "return" && band() !== "range";
  const caption = metric() === "return"
    ? {
      range: "Line: mean over seeds. Band: lowest to highest seed.",
      iqm: "Line: interquartile mean over seeds. Band: its 95% bootstrap interval at each evaluation.",
      seeds: "Thin lines: each seed. Thick line: their mean.",
    }[band()]
    : `Line: mean of ${metricName()} over seeds. Band: lowest to highest seed`
      + (fallback ? " (other bands are for the return)." : ".");
  byId("caption-curves").textContent = caption;
  if (data.tasks.length > 1) {
    for (const figure of ["final", "profile"]) byId(`on-${figure}`).textContent = ` On ${task().name}.`;
  }
  byId("chart-curves").setAttribute("aria-label",
    `${metricName()} over environment steps on ${task().name}, ${cells().length} conditions. `
    + caption);
};
const redraw = () => {
  describe();
  return Promise.all(present().map(draw));
};

const download = (href, file) => {
  const link = document.createElement("a");
  link.href = href;
  link.download = file;
  document.body.append(link);
  link.click();
  link.remove();
};
const save = async (figure, format) => {
  const file = `${figure}.${format}`;
  if (format === "csv") {
    const url = URL.createObjectURL(new Blob([csv(tables[figure]())], { type: "text/csv" }));
    download(url, file);
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    return;
  }
  const { data: traces, layout: drawn } = figures[figure]();
  // A picture stands alone: it needs its own ground, legend and title.
  Object.assign(drawn, {
    paper_bgcolor: variable("--page"),
    showlegend: figure !== "final",
    legend: { orientation: "h", y: -0.2 },
    title: { text: plain(figure === "across" ? "Across tasks" : task().name), font: { size: 18 } },
    margin: { ...drawn.margin, t: 60 },
  });
  const height = figure === "final" ? drawn.height + 40 : 640 + 14 * cells().length;
  Object.assign(drawn, { width: 1100, height });
  const href = await Plotly.toImage({ data: traces, layout: drawn },
    { format, width: 1100, height, scale: format === "png" ? 2 : 1 });
  download(href, file);
};

for (const control of document.querySelectorAll("#task, #metric, input[name=band], #toggles input")) {
  control.addEventListener("change", redraw);
}
for (const [id, on] of [["all", true], ["none", false]]) {
  byId(id).addEventListener("click", () => {
    for (const box of document.querySelectorAll("#toggles input")) box.checked = on;
    redraw();
  });
}
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => save(button.dataset.figure, button.dataset.format));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
// The curves first: the page can be read while the figures further down are drawn. Milliseconds
// from opening the file are noted for the benchmark.
const note = (what) => { document.documentElement.dataset[what] = performance.now().toFixed(0); };
describe();
draw("curves").then(() => {
  requestAnimationFrame(() => {
    note("opened");
    setTimeout(() => redraw().then(() => note("drawn")));
  });
});
})();
