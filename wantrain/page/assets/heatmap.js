"use strict";
// The loss by noise level over time: a cell for each bin of sigma and each reading.
const HeatMap = (() => {
  const modes = { change: "change since the start", loss: "loss" };
  const usual = (values) => {
    const found = values.filter((value) => value != null && value > 0).map(Math.log);
    return found.length ? Math.exp(found.reduce((a, b) => a + b, 0) / found.length) : null;
  };
  // Blue is lower than at the start, red is higher; a deviation of `most` has the full colour.
  function shade(value, most, mode, theme) {
    if (mode === "loss")
      return `color-mix(in oklab, ${theme("--blue")} ${Math.round(100 * value)}%, ${theme("--surface")})`;
    const share = Math.min(1, Math.abs(value) / most);
    return `color-mix(in oklab, ${theme(value < 0 ? "--blue" : "--bad")} ${Math.round(100 * share)}%, ${theme("--raised")})`;
  }
  function edges(middles, low, high) {
    const inner = middles.slice(1).map((value, i) => (value + middles[i]) / 2);
    return [
      low ?? Math.max(0, middles[0] - (inner[0] - middles[0] || 0.05)),
      ...inner,
      high ?? Math.min(1, middles.at(-1) + (middles.at(-1) - (inner.at(-1) ?? middles.at(-1) - 0.05))),
    ];
  }
  function draw(parent, expert, heat, title, mode, steps, xs, click) {
    const first = heat.loss.map((row) => usual(row.slice(0, Math.max(3, Math.ceil(row.length / 10)))));
    const values = heat.loss.map((row, bin) =>
      row.map((loss) =>
        loss == null ? null : mode === "loss" ? loss : loss > 0 && first[bin] ? Math.log(loss / first[bin]) : null,
      ),
    );
    const all = values.flat().filter((value) => value != null),
      [low, high] = [Charts.quantile(all, 0.02), Charts.quantile(all, 0.98)];
    const most = Math.max(0.05, Charts.quantile(all.map(Math.abs), 0.95) || 0);
    const bounds = edges(heat.sigma),
      id = `heat-${expert}`;
    let chart = null;
    const cell = (u, x, y) => {
      const column = xs.findIndex((each) => x <= each),
        bin = bounds.findIndex((edge, i) => i < heat.sigma.length && y >= edge && y <= bounds[i + 1]);
      return column < 0 || bin < 0 ? null : [column, bin];
    };
    const spec = {
      title,
      note: modes[mode],
      x: xs,
      height: 190,
      click: (place) => click(steps[place]),
      empty: "The loss declares no noise levels.",
      series: [{ label: "sigma", values: xs.map(() => null), colour: "--grey", hidden: false }],
      yRange: [bounds[0], bounds.at(-1)],
      format: (value) => value.toFixed(2),
      xLabel: "step",
      draw: (u, theme) => {
        let cells = 0;
        const { ctx, bbox } = u;
        ctx.save();
        ctx.beginPath();
        ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
        ctx.clip();
        values.forEach((row, bin) =>
          row.forEach((value, i) => {
            if (value == null) return;
            const left = u.valToPos(i ? xs[i - 1] : Math.max(0, 2 * xs[0] - (xs[1] ?? xs[0])), "x", true),
              right = u.valToPos(xs[i], "x", true);
            const top = u.valToPos(bounds[bin + 1], "y", true),
              bottom = u.valToPos(bounds[bin], "y", true);
            ctx.fillStyle = shade(mode === "loss" ? (value - low) / (high - low || 1) : value, most, mode, theme);
            ctx.fillRect(Math.floor(left), Math.floor(top), Math.ceil(right - left) + 1, Math.ceil(bottom - top));
            cells += 1;
          }),
        );
        ctx.restore();
        u.root.dataset.cells = cells;
      },
      hover: (u) => {
        const found = !u.over.matches(":hover")
          ? null
          : cell(u, u.posToVal(u.cursor.left, "x"), u.posToVal(u.cursor.top, "y"));
        if (!chart) return;
        const loss = found && heat.loss[found[1]][found[0]];
        chart.at.textContent =
          loss == null
            ? ""
            : `step ${Format.count(steps[found[0]])}, sigma ${heat.sigma[found[1]].toFixed(2)}: loss ${Format.loss(loss)}` +
              (mode === "change" && values[found[1]][found[0]] != null
                ? ` (${Format.percent(Math.exp(values[found[1]][found[0]]) - 1)})`
                : "");
      },
    };
    chart = Charts.draw(parent, id, spec);
    if (chart.plot) chart.plot.root.querySelector(".u-legend").hidden = true;
    chart.figure.querySelector(".scale")?.remove();
    const bar = element("i"),
      ends =
        mode === "loss"
          ? [Format.loss(low), Format.loss(high)]
          : [Format.percent(Math.exp(-most) - 1), Format.percent(Math.exp(most) - 1)];
    bar.style.background =
      mode === "loss"
        ? "linear-gradient(to right, var(--surface), var(--blue))"
        : "linear-gradient(to right in oklab, var(--blue), var(--raised), var(--bad))";
    chart.at = element("span", { class: "at" });
    chart.figure.append(
      element("div", { class: "scale" }, element("span", {}, ends[0]), bar, element("span", {}, ends[1]), chart.at),
    );
  }
  return { draw };
})();
