"use strict";
// Charts over steps by uPlot: one zoom and one cursor for all, colours of the page's scheme.
const Charts = (() => {
  const made = new Map();
  // A click means the points within so many pixels.
  const NEAR = 6;
  let zoom = null,
    extent = [0, 1];
  const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (colour, share) => `color-mix(in srgb, ${colour} ${share}%, transparent)`;

  // An average that follows slowly, without the pull of its start; gaps stay gaps.
  function smoothed(values, factor) {
    let total = 0,
      weight = 0;
    return values.map((value) => {
      if (value == null) return null;
      total = factor * total + (1 - factor) * value;
      weight = factor * weight + (1 - factor);
      return total / weight;
    });
  }
  function quantile(values, share) {
    const sorted = values.filter((value) => value != null).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.round(share * (sorted.length - 1))] : null;
  }
  // Outliers cut to the height of what 98 % stay below, so that one spike does not bend a smooth line.
  const capped = (values) => {
    const most = quantile(values, 0.98);
    return values.map((value) => (value == null ? null : Math.min(value, most)));
  };
  function stretch(xs) {
    const found = xs.flatMap((x) => (x.length ? [x[0], x[x.length - 1]] : []));
    extent = found.length ? [Math.min(...found), Math.max(...found)] : [0, 1];
    if (extent[0] === extent[1]) extent = [extent[0] - 1, extent[1] + 1];
  }

  // What of the values lies in view, so that outliers of a clipped chart do not set its scale.
  function heights(chart, low, high) {
    const { spec } = chart,
      [from, to] = zoom || extent;
    if (spec.yRange) return spec.yRange;
    const shown = spec.series.filter((series, i) => (chart.plot ? chart.plot.series[i + 1].show : !series.hidden));
    const inView = shown
      .flatMap((series) => spec.x.map((x, i) => (x >= from && x <= to ? series.values[i] : null)))
      .filter((value) => value != null);
    if (!inView.length) return [low ?? 0, high ?? 1];
    let [bottom, top] = spec.clip
      ? [quantile(inView, 0.005), quantile(inView, 0.98)]
      : [Math.min(...inView), Math.max(...inView)];
    for (const value of spec.include || []) {
      bottom = Math.min(bottom, value);
      top = Math.max(top, value);
    }
    if (spec.log) return [bottom > 0 ? bottom / 1.1 : 1e-12, top > 0 ? top * 1.1 : 1];
    if (bottom === top) {
      const half = Math.abs(bottom) / 10 || 1;
      return [bottom - half, top + half];
    }
    const room = 0.07 * (top - bottom);
    return [spec.zero || (bottom >= 0 && bottom < 0.35 * top) ? 0 : bottom - room, top + room];
  }

  function options(chart, host) {
    const { spec } = chart,
      axis = {
        stroke: theme("--quiet"),
        font: "11px system-ui, sans-serif",
        grid: { stroke: theme("--grid"), width: 1 },
        ticks: { show: false },
      };
    const format = (value) => (value == null ? "–" : (spec.format || Format.plain)(value));
    return {
      width: Math.max(200, host.clientWidth),
      height: spec.height || 210,
      padding: [8, 18, 0, 0],
      scales: {
        x: { time: false, range: () => zoom || extent },
        y: { distr: spec.log ? 3 : 1, range: (_, low, high) => heights(chart, low, high) },
      },
      axes: [
        {
          ...axis,
          size: 26,
          gap: 4,
          values: (_, ticks) => ticks.map((value) => (value == null ? "" : compact(value))),
        },
        {
          ...axis,
          size: 60,
          gap: 6,
          values: (_, ticks) =>
            ticks.map((value) => (value == null ? "" : spec.tick ? spec.tick(value) : format(value))),
        },
      ],
      cursor: {
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        focus: { prox: 1e6 },
        sync: { key: "steps", scales: ["x", null] },
        y: false,
      },
      legend: {
        markers: {
          width: 0,
          fill: (u, i) => {
            const series = spec.series[i - 1];
            return series ? (series.faint ? faint(theme(series.colour), 35) : theme(series.colour)) : "transparent";
          },
        },
      },
      series: [
        { label: spec.xLabel || "step", value: (_, value) => (value == null ? "" : Format.count(value)) },
        ...spec.series.map((series) => ({
          label: series.label,
          value: (_, value, i, at) => (at == null ? "" : format(value)),
          spanGaps: series.gaps !== true,
          show: series.hidden !== true,
          stroke:
            series.line === false
              ? "transparent"
              : series.faint
                ? faint(theme(series.colour), 35)
                : theme(series.colour),
          width: series.line === false ? 0 : series.width || 1.5,
          dash: series.dash,
          fill: series.fill ? faint(theme(series.colour), series.fill) : undefined,
          points: {
            show: series.points === true,
            size: series.size || 7,
            width: 1.5,
            stroke: theme(series.colour),
            fill: series.hollow ? theme("--surface") : theme(series.colour),
          },
        })),
      ],
      bands: (spec.bands || []).map((band) => ({
        series: band.series,
        fill: faint(theme(band.colour), band.share || 16),
      })),
      hooks: {
        setSelect: [
          (u) => {
            if (u.select.width < 8) return;
            zoom = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
            rescale();
          },
        ],
        ready: [(u) => listen(chart, u)],
        // Of the chart as it is now: its values change while the plot stays.
        draw: [(u) => chart.spec.draw?.(u, theme)],
        setCursor: [(u) => chart.spec.hover?.(u)],
      },
    };
  }
  function listen(chart, u) {
    let down = null;
    u.over.addEventListener("mousedown", (event) => {
      down = event.clientX;
    });
    u.over.addEventListener("click", (event) => {
      if (!chart.spec.click || (down !== null && Math.abs(event.clientX - down) > 4)) return;
      const near = [-NEAR, 0, NEAR].map((pixels) => u.posToIdx(event.offsetX + pixels));
      chart.spec.click(near[1], near[0], near[2]);
    });
    u.over.addEventListener("dblclick", () => {
      zoom = null;
      rescale();
    });
  }
  const compact = (value) =>
    Math.abs(value) >= 1e6
      ? `${Number((value / 1e6).toPrecision(4))}M`
      : Math.abs(value) >= 1e4
        ? `${Number((value / 1e3).toPrecision(4))}k`
        : String(Number(value.toPrecision(6)));
  function rescale() {
    for (const { plot } of made.values()) plot?.setScale("x", { min: (zoom || extent)[0], max: (zoom || extent)[1] });
  }

  const shapeOf = (spec) =>
    JSON.stringify([
      spec.title,
      spec.log,
      spec.series.map((series) => [series.label, series.colour, series.hidden, series.points]),
      spec.xLabel,
    ]);
  // Draw a chart into `parent`, or bring the one of this id up to date. An empty one says why.
  function draw(parent, id, spec) {
    let chart = made.get(id);
    if (!chart) {
      const plot = element("div", { class: "plot" }),
        note = element("span");
      const figure = element(
        "figure",
        { class: `chart${spec.click ? " clickable" : ""}`, id: `chart-${id}` },
        element("figcaption", {}, element("strong", {}, spec.title), note),
        plot,
      );
      parent.append(figure);
      chart = { host: plot, note, figure, plot: null, shape: "" };
      made.set(id, chart);
    }
    chart.spec = spec;
    chart.note.textContent = spec.note || "";
    chart.figure.classList.toggle("wide", spec.wide === true);
    if (!spec.x.length || (!spec.draw && !spec.series.some((series) => series.values.some((value) => value != null)))) {
      chart.plot?.destroy();
      chart.plot = null;
      chart.shape = "";
      chart.host.replaceChildren(element("p", { class: "empty" }, spec.empty || "Nothing measured yet."));
      return chart;
    }
    const data = [spec.x, ...spec.series.map((series) => series.values)];
    if (chart.plot && chart.shape === shapeOf(spec)) {
      chart.plot.setData(data);
    } else {
      chart.plot?.destroy();
      chart.host.replaceChildren();
      chart.shape = shapeOf(spec);
      chart.plot = null;
      chart.plot = new uPlot(options(chart, chart.host), data, chart.host);
      const rows = chart.plot.root.querySelectorAll(".u-legend .u-series");
      spec.series.forEach((series, i) => {
        if (rows[i + 1]) rows[i + 1].hidden = series.unnamed === true;
      });
    }
    return chart;
  }
  function remove(id) {
    const chart = made.get(id);
    if (chart) {
      chart.plot?.destroy();
      chart.figure.remove();
      made.delete(id);
    }
  }
  function again() {
    for (const [, chart] of made) {
      if (!chart.plot) continue;
      chart.shape = "";
      draw(null, [...made].find(([, each]) => each === chart)[0], chart.spec);
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  new ResizeObserver(() => {
    for (const { plot, host, spec } of made.values()) {
      if (plot && host.clientWidth && Math.abs(plot.width - host.clientWidth) > 1)
        plot.setSize({ width: Math.max(200, host.clientWidth), height: spec.height || 210 });
    }
  }).observe(document.body);
  return {
    draw,
    remove,
    smoothed,
    capped,
    quantile,
    stretch,
    theme,
    forgetZoom: () => {
      zoom = null;
    },
  };
})();
