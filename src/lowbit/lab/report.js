"use strict";
// The plots of the comparison page. Data comes from the element #data; nothing is loaded.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { metric, methods } = data;
  const $ = (id) => document.getElementById(id);
  const hidden = new Set();
  const shown = () => methods.filter((m) => !hidden.has(m.key));
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const symbols = ["circle", "square", "triangle-up", "diamond"];
  const config = { displaylogo: false, displayModeBar: "hover", showSendToCloud: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const touch = matchMedia("(pointer: coarse)").matches;
  if (touch) config.displayModeBar = false;

  // plotly reads a small part of HTML in its texts: names are data, not HTML
  const esc = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (s, most) => {
    const c = [...String(s).replace(/\s+/g, " ")];
    const tail = Math.floor((most - 1) / 3);
    if (c.length > most) c.splice(most - 1 - tail, c.length - most + 1, "…");
    return c.join("");
  };
  const titled = esc(short(metric.name, 24) + (metric.unit && ", " + short(metric.unit, 8)));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (m) => css(m.colour < 0 ? "--ref" : "--c" + m.colour);
  const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const number = (v, digits = 4) => (v === null || v === undefined ? "–" : String(+v.toPrecision(digits)));

  function options(id, pairs) {
    for (const [value, text] of pairs) $(id).append(new Option(text, value));
  }

  const missing = (all) => shown().filter((m) => !all.includes(m)).map((m) => m.key);
  function note(id, text, title, names) {
    $("n-" + id).textContent = text + (names.length ? ` ${title}: ${names.join(", ")}.` : "");
  }

  function axis(title, more) {
    return { title: { text: title, standoff: 10 }, gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false,
             ticks: "outside", exponentformat: "power", tickcolor: css("--line"), automargin: true, ...more };
  }

  // plotly would label the ticks between powers of ten with one digit only
  function logarithmic(values) {
    const positive = values.filter((v) => v > 0);
    if (!positive.length) return { type: "log" };
    const low = positive.reduce((a, b) => Math.min(a, b)), high = positive.reduce((a, b) => Math.max(a, b));
    const decades = Math.log10(high / low), ticks = [];
    const fine = [...Array(90).keys()].map((i) => 1 + i / 10);
    const steps = decades > 3 ? [1] : decades > 1 ? [1, 2, 5] : decades > 0.3 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : fine;
    for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.log10(high) + 1; e++)
      ticks.push(...steps.map((s) => s * 10 ** e));
    const near = ticks.filter((v) => v > low / 1.2 && v < high * 1.2), every = Math.ceil(near.length / 9);
    const chosen = decades > 0.3 ? ticks : near.filter((_, i) => i % every === 0);
    return { type: "log", tickvals: chosen, ticktext: chosen.map((v) => number(v, 3)) };
  }

  function draw(id, traces, x, y, more = {}) {
    const box = $(id);
    if (!traces.length) {
      if (window.Plotly && box.data) Plotly.purge(box);
      box.textContent = "Nothing was measured, or everything is hidden.";
      box.classList.add("empty");
      return;
    }
    if (box.classList.contains("empty")) { box.textContent = ""; box.classList.remove("empty"); }
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 58, r: 14, t: 30, b: 48 },
      showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom", xaxis: x, yaxis: y,
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") }, namelength: 40 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      width: box.clientWidth || 600, height: box.clientHeight || 380, ...more };
    Plotly.react(box, traces, layout, config);
  }

  // Learning curves
  const error = "test_error";
  options("metric-what", [["test_metric", "test " + metric.name],
    ...(metric.unit === "%" ? [[error, "test error, log scale"]] : []), ["train_metric", "training " + metric.name]]);
  options("loss-what", [["train_loss", "training loss, by epoch"], ["batch_loss", "training loss, by batch"],
    ["test_loss", "test loss"]]);
  const epochs = Math.max(0, ...methods.flatMap((m) => m.curves.train_loss.x.concat(m.curves.test_metric.x)));

  function curves(id, which, yTitle, log) {
    const traces = [];
    const value = (v) => (which === error ? 100 - v : v);
    for (const m of shown()) {
      const c = m.curves[which === error ? "test_metric" : which];
      if (!c.x.length) continue;
      const mean = c.mean.map(value);
      const few = c.x.length < 13;
      if (c.sd.some((s) => s > 0)) {
        // a band that reaches zero has no place on a log axis
        const low = mean.map((v, i) => Math.max(v - c.sd[i], log ? v / 10 : -Infinity));
        traces.push({ x: c.x.concat([...c.x].reverse()), y: mean.map((v, i) => v + c.sd[i]).concat(low.reverse()),
          fill: "toself", fillcolor: faded(colour(m), 0.14), line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
      }
      traces.push({ x: c.x, y: mean, name: esc(m.key), mode: few ? "lines+markers" : "lines",
        line: { color: colour(m), width: which === "batch_loss" ? 1.2 : 2, dash: dashes[m.style] },
        marker: { symbol: symbols[m.style], size: 6, color: colour(m) }, customdata: c.sd,
        hovertemplate: "%{y:.4g} ± %{customdata:.2g} at %{x}" });
    }
    const whole = which !== "batch_loss" && epochs <= 8 ? { dtick: 1 } : {};
    draw(id, traces, axis(which === "batch_loss" ? "step" : "epoch", whole),
      axis(yTitle, log ? logarithmic(traces.flatMap((t) => t.y)) : { nticks: 8 }));
  }

  function learning() {
    const scale = (log) => (log ? " (log scale)" : "");
    const what = $("metric-what").value, log = what === error || metric.name === "perplexity";
    const name = what === error ? "test error, %" : (what === "test_metric" ? "test " : "training ") + titled;
    curves("p-metric", what, name + scale(log), log);
    const loss = $("loss-what").value, lossLog = $("loss-log").checked;
    curves("p-loss", loss, (loss === "test_loss" ? "test loss" : "training loss") + scale(lossLog), lossLog);
  }

  // Metric against bits
  const sizes = { mean: "W, A and E, mean", W: "W", A: "A", E: "E", bytes: "weights, stored size" };
  options("bits-what", Object.entries(sizes));

  function bitsOf(m, what) {
    if (what === "bytes") return m.bytes === null ? null : m.bytes / 1024;
    const all = (what === "mean" ? ["W", "A", "E"] : [what]).map((r) => (m.bits || {})[r]).filter((v) => v != null);
    return all.length ? all.reduce((a, b) => a + b, 0) / all.length : null;
  }

  // The first place for each label that meets no other label and no point; none where there is no room
  function labels(points, width, height) {
    const taken = points.map((p) => [p.x - 8, p.y - 8, p.x + 8, p.y + 8]);
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "12px " + getComputedStyle(document.body).fontFamily;
    const found = [];
    for (const p of points) {
      const text = short(p.key, 18), wide = pen.measureText(text).width + 6, high = 16;
      const free = (b) => b[0] >= 0 && b[1] >= 0 && b[2] <= width && b[3] <= height
        && taken.every((t) => b[0] >= t[2] || b[2] <= t[0] || b[1] >= t[3] || b[3] <= t[1]);
      search: for (let d = 0; d < height; d += 6) {
        for (const dy of d ? [-d, d] : [0]) {
          for (const side of d > 14 ? [1, -1, 0] : [1, -1]) {
            const cx = p.x + side * (10 + d / 3 + wide / 2), cy = p.y + dy;
            const b = [cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2];
            if (!free(b)) continue;
            taken.push(b);
            found.push({ x: p.ax, y: p.ay, ax: cx - p.x, ay: dy, text: esc(text), font: { size: 12 }, borderpad: 1,
              standoff: 6, showarrow: true, arrowhead: 0, arrowwidth: 0.7,
              arrowcolor: d > 14 ? css("--soft") : "rgba(0,0,0,0)" });
            break search;
          }
        }
      }
    }
    return found;
  }

  function bits() {
    const what = $("bits-what").value;
    const all = shown().filter((m) => m.metric && m.metric.mean != null && bitsOf(m, what) > 0);
    const log10 = Math.log10, ys = all.flatMap((m) => [-1, 1].map((s) => m.metric.mean + s * (m.metric.spread || 0)));
    const margin = { l: 62, r: 14, t: 30, b: 58 };
    const width = $("p-bits").clientWidth - margin.l - margin.r;
    const height = (innerWidth > 500 ? 380 : 330) - margin.t - margin.b; // as in the style sheet
    const xs = all.map((m) => bitsOf(m, what)).concat(what === "bytes" ? [] : [2, 32]);
    const pad = (a, b, part) => { const p = (b - a) * part || Math.abs(a) * 0.05 || 1; return [a - p, b + p]; };
    const ylog = Math.min(...ys) > 0 && Math.max(...ys) / Math.min(...ys) > 20;
    const f = ylog ? log10 : (v) => v;
    const xr = pad(log10(Math.min(...xs)), log10(Math.max(...xs)), 0.07);
    const yr = pad(f(Math.min(...ys)), f(Math.max(...ys)), 0.08);
    const points = all.map((m) => {
      const px = log10(bitsOf(m, what)), py = f(m.metric.mean);
      return { key: m.key, ax: px, ay: py, x: ((px - xr[0]) / (xr[1] - xr[0])) * width,
        y: ((yr[1] - py) / (yr[1] - yr[0])) * height };
    });
    const traces = all.map((m) => ({ x: [bitsOf(m, what)], y: [m.metric.mean], name: esc(m.key), mode: "markers",
      error_y: { type: "data", array: [m.metric.spread || 0], color: colour(m), thickness: 1.2, width: 3 },
      marker: { size: 11, symbol: symbols[m.style], color: colour(m) }, hovertemplate: "%{y:.4g} at %{x:.3g}" }));
    const titles = { bytes: "stored weights, KiB", mean: "mean bits of W, A and E" };
    const ticks = what === "bytes" ? logarithmic(xs)
      : { tickvals: [1, 2, 4, 8, 16, 32], ticktext: ["1", "2", "4", "8", "16", "32"] };
    const title = (titles[what] || "bits of " + what) + " (log scale)";
    draw("p-bits", traces, axis(title, { type: "log", range: xr, automargin: false, ...ticks }),
      axis(titled, { nticks: 8, ...(ylog ? logarithmic(ys) : {}), range: yr, automargin: false }),
      { margin, annotations: labels(points, width, height) });
    note("bits", "Bars: ± one standard deviation over seeds. 32 bits is float.", "Without a result", missing(all));
  }

  // Time of a step
  function step() {
    const all = shown().filter((m) => m.step && m.step.ratio != null).sort((a, b) => b.step.ratio - a.step.ratio);
    $("p-step").style.height = all.length ? Math.max(200, 27 * all.length + 90) + "px" : "";
    const place = all.map((_, i) => i), most = Math.max(1, ...all.map((m) => m.step.ratio));
    const traces = [{ type: "bar", orientation: "h", y: place, x: all.map((m) => m.step.ratio), width: 0.62,
      marker: { color: all.map(colour) }, text: all.map((m) => m.step.ratio.toFixed(2) + " ×"),
      textposition: "outside", cliponaxis: false,
      hovertext: all.map((m) => `${esc(m.key)}: ${number(m.step.ms, 3)} ms`), hoverinfo: "text" }];
    draw("p-step", all.length ? traces : [],
      axis("step time relative to float32", { range: [0, most * 1.18], nticks: 6 }),
      axis("", { tickvals: place, ticktext: all.map((m) => esc(short(m.key, innerWidth > 500 ? 22 : 15)) + " "),
        ticks: "", range: [-0.7, all.length - 0.3] }),
      { shapes: [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper",
        line: { color: css("--soft"), width: 1.3, dash: "dot" } }] });
    note("step", "Dotted: as fast as float32.", "Not measured", missing(all));
  }

  // Layers
  const figures = { sqnr: ["SQNR", "SQNR, dB", 1], clipped: ["clipped elements", "clipped elements, %", 100],
    zero: ["elements to zero", "elements that became zero, %", 100], scale: ["scale", "mean scale", 1],
    bits: ["bits", "stored bits", 1] };
  const present = [...new Set(methods.flatMap((m) => m.layers.map((r) => r.role)))];
  const roleNames = { W: "W, weights", A: "A, activations", E: "E, errors", G: "G, weight gradients",
    U: "U, updated weights" };
  present.sort((a, b) => ("WAEGU".indexOf(a) + 9) % 9 - ("WAEGU".indexOf(b) + 9) % 9);
  options("layer-role", present.map((r) => [r, roleNames[r] || r]));
  options("layer-what", Object.entries(figures).map(([k, v]) => [k, v[0]]));

  function layers() {
    const role = $("layer-role").value, what = $("layer-what").value, [, title, factor] = figures[what];
    const names = [...new Set(methods.flatMap((m) => m.layers.map((r) => r.layer)))];
    const traces = [], exact = [];
    for (const m of shown()) {
      const rows = m.layers.filter((r) => r.role === role);
      if (what === "sqnr" && rows.some((r) => r.exact)) exact.push(`${m.key} (${rows.filter((r) => r.exact).length})`);
      const by = new Map(rows.map((r) => [r.layer, r]));
      const y = names.map((n) => (by.has(n) && by.get(n)[what] != null ? by.get(n)[what] * factor : null));
      if (y.every((v) => v === null)) continue;
      traces.push({ x: names.map((_, i) => i), y, name: esc(m.key), mode: "lines+markers", connectgaps: false,
        text: names.map((n) => esc(short(n, 60)) + "<br>" + esc(short((by.get(n) || {}).format || "", 60))),
        line: { color: colour(m), width: 1.8, dash: dashes[m.style] },
        marker: { symbol: symbols[m.style], size: 7, color: colour(m) },
        hovertemplate: "%{text}<br>%{y:.4g}" });
    }
    const stride = Math.ceil(names.length / Math.max(1, $("p-layer").clientWidth / 24));
    const some = names.map((_, i) => i).filter((i) => i % stride === 0);
    const slanted = names.length * 90 > $("p-layer").clientWidth;
    const ticks = { tickvals: some, ticktext: some.map((i) => esc(short(names[i], 18))), tickangle: slanted ? -50 : 0 };
    draw("p-layer", traces, axis("layer", { ...ticks, range: [-0.4, names.length - 0.6] }),
      axis(title, { nticks: 8, ...(what === "scale" ? logarithmic(traces.flatMap((t) => t.y)) : {}) }));
    note("layer", "First seed, after training, one batch.", "Nothing was lost in (number of layers)", exact);
  }

  // Histograms
  const known = methods.filter((m) => m.histograms.length);
  options("hist-method", known.map((m) => [m.key, short(m.key, 40)]));
  const quantized = known.find((m) => m.key !== data.baseline);
  if (quantized) $("hist-method").value = quantized.key;

  function layerChoice() {
    const m = known.find((k) => k.key === $("hist-method").value), before = $("hist-layer").value;
    $("hist-layer").textContent = "";
    const names = [...new Set(((m || {}).histograms || []).map((h) => h.layer))];
    options("hist-layer", names.map((n) => [n, short(n, 40)]));
    if (names.includes(before)) $("hist-layer").value = before;
    else if (names.length > 2) $("hist-layer").value = names[1]; // first layers are often left in float
  }

  function histograms() {
    const m = known.find((k) => k.key === $("hist-method").value);
    const log = $("hist-what").value === "log";
    for (const role of ["W", "A", "E"]) {
      const h = m && m.histograms.find((k) => k.role === role && k.layer === $("hist-layer").value);
      $("t-" + role).textContent = roleNames[role];
      const { edges = [], counts = [] } = (h && (log ? h.magnitudes : h)) || {};
      $("n-" + role).textContent = "";
      if (!counts.length || edges.some((e) => e === null)) { draw("p-" + role, []); continue; }
      const total = h.count || counts.reduce((a, b) => a + b, 0) || 1, shares = counts.map((c) => (100 * c) / total);
      const mids = counts.map((_, i) => (edges[i] + edges[i + 1]) / 2);
      const widths = counts.map((_, i) => edges[i + 1] - edges[i] || 1e-30);
      const at = (v) => (log ? Math.log2(Math.abs(v)) : v);
      const levels = [...new Set((h.levels || []).map(at))].filter(Number.isFinite);
      let [low, high] = [edges[0], edges[edges.length - 1]];
      const width = high - low || Math.abs(low) || 1, clip = h.clip && h.clip.every((v) => v !== null) ? h.clip : null;
      const ends = clip && (log ? [low - width, Math.log2(Math.max(...clip.map(Math.abs)))] : clip);
      // the grid's ends are shown where they are near the data
      if (ends && ends[1] < high + width) high = Math.max(high, ends[1]);
      if (ends && !log && ends[0] > low - width) low = Math.min(low, ends[0]);
      const range = [low - 0.05 * (high - low || width), high + 0.05 * (high - low || width)];
      const inside = levels.filter((v) => v >= range[0] && v <= range[1]), tall = inside.length > 33 ? 0.08 : 1;
      const traces = [{ type: "bar", x: mids, y: shares, width: widths,
        marker: { color: colour(m), line: { width: 0 } }, opacity: 0.75,
        hovertemplate: "%{y:.3g} % near %{x:.4g}<extra></extra>" }];
      if (inside.length) traces.push({ x: inside.flatMap((v) => [v, v, null]),
        y: inside.flatMap(() => [0, tall, null]), yaxis: "y2", mode: "lines",
        line: { color: faded(css("--ref"), tall < 1 ? 0.75 : 0.4), width: 1 }, hoverinfo: "skip" });
      const shapes = ends ? [{ type: "rect", yref: "paper", y0: 0, y1: 1, layer: "below", line: { width: 0 },
        x0: Math.max(ends[0], range[0]), x1: Math.min(ends[1], range[1]), fillcolor: faded(css("--c5"), 0.16) }] : [];
      draw("p-" + role, traces, axis(log ? "log₂ |value|" : "value", { range, nticks: 5 }),
        axis("share of elements, %", { type: $("hist-log").checked ? "log" : "linear", nticks: 6 }),
        { bargap: 0, shapes, yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } });
      const notes = [h.format || "", `${total.toLocaleString("en")} elements`];
      if (h.blocks > 1) notes.push(`${h.blocks.toLocaleString("en")} scales`);
      if (log && h.magnitudes.zeros) notes.push(`${number((100 * h.magnitudes.zeros) / total, 3)} % are zero`);
      if (clip) notes.push(`grid from ${number(clip[0], 3).replace("-", "−")} to ${number(clip[1], 3)}`);
      $("n-" + role).textContent = notes.filter(Boolean).join("; ");
    }
  }

  // A part that fails says so in its own place and leaves the others alone
  function guarded(part, ...places) {
    return () => {
      try {
        part();
      } catch (e) {
        for (const p of places) $(p).textContent = "This plot could not be drawn: " + e.message;
      }
    };
  }
  const parts = { learning: guarded(learning, "p-metric", "p-loss"), bits: guarded(bits, "p-bits"),
    step: guarded(step, "p-step"), layers: guarded(layers, "p-layer"),
    histograms: guarded(histograms, "p-W", "p-A", "p-E") };
  const everything = () => Object.values(parts).forEach((p) => p());
  const on = (ids, part) => ids.forEach((id) => $(id).addEventListener("change", part));
  on(["metric-what", "loss-what", "loss-log"], parts.learning);
  on(["bits-what"], parts.bits);
  on(["layer-role", "layer-what"], parts.layers);
  on(["hist-layer", "hist-what", "hist-log"], parts.histograms);
  on(["hist-method"], () => { layerChoice(); parts.histograms(); });

  const first = data.baseline || methods[0].key;
  function toggled() {
    for (const b of $("legend").querySelectorAll("[data-key]"))
      b.setAttribute("aria-pressed", String(!hidden.has(b.dataset.key)));
    if ($("all")) $("all").textContent = hidden.size ? "show all" : "show only " + short(first, 18);
    everything();
  }
  $("legend").addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    if (b.id !== "all") hidden.has(b.dataset.key) ? hidden.delete(b.dataset.key) : hidden.add(b.dataset.key);
    else if (hidden.size) hidden.clear();
    else methods.filter((m) => m.key !== first).forEach((m) => hidden.add(m.key));
    toggled();
  });

  // The table: a click on a head sorts, missing values last
  $("headline").querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {
    const up = th.getAttribute("aria-sort") !== "ascending", body = $("headline").tBodies[0];
    $("headline").querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.v;
    const compare = (a, b) => (column ? value(a) - value(b) : value(a).localeCompare(value(b))) * (up ? 1 : -1);
    const rows = [...body.rows];
    const figures = rows.filter((row) => value(row) !== undefined);
    body.append(...figures.sort(compare), ...rows.filter((row) => value(row) === undefined));
  }));

  layerChoice();
  everything();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
  let waiting, width = $("legend").clientWidth;
  new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if ($("legend").clientWidth === width) return;
      width = $("legend").clientWidth;
      everything();
    }, 100);
  }).observe($("legend"));
  document.documentElement.dataset.drawn = "true";
})();
