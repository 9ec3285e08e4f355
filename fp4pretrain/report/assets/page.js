// Draws the figures that the page holds as JSON, in the reader's colours, and the heat map of observations.
(function () {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const paper = { "--text": "#000000", "--line": "#bbbbbb", "--quiet": "#444444" };
  const paperWidth = 1000;  // of a landscape sheet, CSS pixels
  let printing = false;
  const colour = (name) => printing ? paper[name]
    : getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const options = { responsive: true, displaylogo: false };
  const narrow = () => !printing && window.innerWidth < 600;

  function dressed(layout) {
    const text = colour("--text"), line = colour("--line");
    const found = Object.assign({}, layout, {
      font: { color: text, size: narrow() ? 10 : 12 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: text },
    }, printing ? { width: paperWidth } : {});
    for (const key of Object.keys(found)) {
      if (/^[xy]axis/.test(key)) {
        found[key] = Object.assign({}, found[key], { gridcolor: line, zerolinecolor: line, automargin: true });
      }
    }
    if (narrow()) {
      found.legend = Object.assign({}, found.legend, { orientation: "h", y: -0.25 });
    }
    return found;
  }

  function draw() {
    for (const place of document.querySelectorAll(".chart[data-figure]")) {
      const figure = read(place.dataset.figure);
      Plotly.react(place, figure.data, dressed(figure.layout), options);
    }
    heat();
  }

  const observations = document.getElementById("observations") ? read("observations") : [];
  const field = (id) => document.getElementById(id);

  function fill(select, names) {
    select.replaceChildren(...names.map((name, at) => new Option(name, String(at))));
  }

  function heat() {
    if (!observations.length) return;
    const run = observations[Number(field("heat-run").value)];
    const names = Object.keys(run.statistics);
    const name = names[Number(field("heat-statistic").value)];
    const slider = field("heat-time");
    slider.max = String(run.tokens.length - 1);
    const at = Math.min(Number(slider.value), run.tokens.length - 1);
    field("heat-when").textContent = Number(run.tokens[at]).toLocaleString() + " tokens";
    const layers = [], columns = [];
    const cells = run.sites.map((site) => {
      const parts = site.split("."), layer = parts[0];
      const column = parts.slice(1).join(" ");
      if (!layers.includes(layer)) layers.push(layer);
      if (!columns.includes(column)) columns.push(column);
      return [layer, column];
    });
    const z = layers.map(() => columns.map(() => null));
    cells.forEach(([layer, column], index) => {
      z[layers.indexOf(layer)][columns.indexOf(column)] = run.statistics[name][at][index];
    });
    // one scale over all times, so that a change is a change of colour
    const all = run.statistics[name].flat().filter((value) => value !== null);
    Plotly.react(
      field("heat"),
      [{ type: "heatmap", z: z, x: columns, y: layers, zmin: Math.min(...all), zmax: Math.max(...all),
         colorscale: "Cividis", hoverongaps: false,
         hovertemplate: "layer %{y}<br>%{x}<br>" + name + " %{z:.4g}<extra></extra>" }],
      dressed({ margin: { l: 50, r: 10, t: 40, b: 110 }, paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)", xaxis: { type: "category", tickangle: -60 },
        yaxis: { type: "category", title: { text: "layer" }, autorange: "reversed" } }),
      options);
  }

  function listen() {
    if (!observations.length) return;
    fill(field("heat-run"), observations.map((run) => run.name));
    const statistics = () => {
      fill(field("heat-statistic"), Object.keys(observations[Number(field("heat-run").value)].statistics));
      field("heat-time").value = "1000000";
    };
    field("heat-run").addEventListener("change", () => { statistics(); heat(); });
    field("heat-statistic").addEventListener("change", heat);
    field("heat-time").addEventListener("input", heat);
    statistics();
    field("heat-time").max = String(observations[0].tokens.length - 1);
    field("heat-time").value = field("heat-time").max;
  }

  // Served by --watch: loads itself again where the runs went on.
  function watch(stamp) {
    setInterval(async () => {
      try {
        const now = await (await fetch("stamp", { cache: "no-store" })).text();
        if (now !== stamp) location.reload();
      } catch (error) { /* the server is gone: the page stays as it is */ }
    }, 5000);
  }

  // Paper has its own width and colours, and cannot unfold what is folded.
  function print(begins) {
    printing = begins;
    for (const one of document.querySelectorAll("details")) one.open = begins;
    draw();
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  listen();
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (document.body.dataset.stamp) watch(document.body.dataset.stamp);
})();
