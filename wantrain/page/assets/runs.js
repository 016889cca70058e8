"use strict";
// All runs of a folder: a table to choose from, and the curves of the chosen ones over each other.
const Runs = (() => {
  const data = JSON.parse(byId("data").textContent),
    runs = data.runs;
  const palette = ["--blue", "--amber", "--teal", "--violet", "--rose", "--grey"],
    dashes = [undefined, [6, 4], [2, 3]];
  const kept = Kept.all().chosen,
    chosen = new Set(
      kept ? kept.filter((name) => runs.some((run) => run.name === name)) : runs.slice(0, 6).map((run) => run.name),
    );
  if (!chosen.size) runs.slice(0, 6).forEach((run) => chosen.add(run.name));
  let order = { key: "updated", rising: false };
  const fact = (run, name) => (run.facts.find(([key]) => key === name) || ["", ""])[1];
  const lowest = (run) => {
    const found = Object.values(run.best).filter(Boolean);
    return found.length ? found.reduce((a, b) => (b.loss < a.loss ? b : a)) : null;
  };
  const bests = (run) => run.experts.map((expert) => [expert, run.best[expert]]).filter(([, best]) => best);
  const columns = [
    ["name", "Run", (run) => run.name],
    ["state", "State", (run) => run.state],
    ["step", "Step", (run) => run.step],
    ["model", "Model", (run) => fact(run, "model")],
    ["trains", "Trains", (run) => `${fact(run, "expert")}, ${fact(run, "trains")}`],
    ["rate", "Rate", (run) => Number(fact(run, "learning rate"))],
    ["batch", "Batch", (run) => Number(fact(run, "batch"))],
    ["loss", "Lowest validation", (run) => lowest(run)?.loss ?? Infinity],
    ["updated", "Updated", (run) => run.updated],
  ];
  const numeric = new Set(["step", "rate", "batch"]);
  const place = (run) => runs.indexOf(run);
  const colour = (run) => palette[place(run) % palette.length],
    dash = (run) => dashes[Math.floor(place(run) / palette.length) % dashes.length];

  function cells(run) {
    const swatch = element("i", { class: "dot" });
    swatch.style.background = `var(${colour(run)})`;
    const box = element("input", {
      type: "checkbox",
      "aria-label": `Draw ${run.name}`,
      onchange: (event) => {
        event.target.checked ? chosen.add(run.name) : chosen.delete(run.name);
        Kept.set("chosen", [...chosen]);
        charts();
      },
    });
    box.checked = chosen.has(run.name);
    const validation = bests(run).map(([expert, best]) =>
      element(
        "div",
        {},
        bests(run).length > 1 ? element("span", { class: "quiet" }, `${Format.name(expert)} `) : "",
        Format.loss(best.loss),
        element("span", { class: "quiet" }, ` at step ${Format.count(best.step)}`),
        best.verdict === "better"
          ? element("span", { class: "good" }, " better")
          : best.verdict === "worse"
            ? element("span", { class: "bad" }, " worse")
            : "",
      ),
    );
    return [
      element("td", {}, box),
      element(
        "td",
        { dir: "auto" },
        swatch,
        element("a", { href: `${encodeURIComponent(run.name)}/index.html` }, run.name),
      ),
      element("td", {}, element("span", { class: `state ${run.state}` }, run.state)),
      element(
        "td",
        { class: "number nowrap" },
        Format.count(run.step),
        element("span", { class: "quiet" }, ` of ${Format.count(run.steps)}`),
      ),
      element("td", {}, fact(run, "model")),
      element("td", {}, `${fact(run, "expert")}, ${fact(run, "trains")}`),
      element("td", { class: "number" }, fact(run, "learning rate")),
      element("td", { class: "number" }, fact(run, "batch")),
      element("td", {}, validation.length ? validation : element("span", { class: "quiet" }, "none")),
      element(
        "td",
        { class: "nowrap quiet" },
        new Date(1000 * run.updated).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
      ),
    ];
  }
  function table() {
    const wanted = byId("find").value.trim().toLowerCase();
    const shown = runs.filter(
      (run) => !wanted || `${run.name} ${run.facts.flat().join(" ")} ${run.state}`.toLowerCase().includes(wanted),
    );
    const value = columns.find(([key]) => key === order.key)[2],
      collator = new Intl.Collator(undefined, { numeric: true });
    shown.sort(
      (a, b) =>
        (order.rising ? 1 : -1) *
        (typeof value(a) === "number" ? value(a) - value(b) : collator.compare(value(a), value(b))),
    );
    const head = columns.map(([key, title]) =>
      element(
        "th",
        {
          "data-key": key,
          tabindex: 0,
          class: numeric.has(key) ? "number" : null,
          "aria-sort": key === order.key ? (order.rising ? "ascending" : "descending") : null,
          onclick: () => {
            order = { key, rising: order.key === key ? !order.rising : true };
            table();
          },
        },
        title,
      ),
    );
    byId("runs").replaceChildren(
      element("thead", {}, element("tr", {}, element("th"), head)),
      element(
        "tbody",
        {},
        shown.map((run) => element("tr", { "data-run": run.name }, cells(run))),
      ),
    );
    byId("none").hidden = shown.length > 0;
  }

  // Curves of all chosen runs on one axis: each has its own steps, so the axis is all of them together.
  function overlay(id, title, note, pick, options = {}) {
    const samples = byId("x-axis").value === "samples",
      curves = [];
    for (const run of runs.filter((each) => chosen.has(each.name))) {
      for (const expert of run.experts) {
        const points = pick(run.curves[expert], samples).filter(([x, y]) => x != null && y != null);
        if (points.length) curves.push({ run, expert, points });
      }
    }
    const xs = [...new Set(curves.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
    const series = curves.map(({ run, expert, points }) => {
      const at = new Map(points);
      return {
        label: run.experts.length > 1 ? `${run.name} ${Format.name(expert)}` : run.name,
        values: xs.map((x) => at.get(x) ?? null),
        colour: colour(run),
        dash: run.experts.indexOf(expert) ? [2, 3] : dash(run),
        width: 1.75,
        points: options.points,
      };
    });
    return {
      id,
      spec: {
        title,
        note,
        x: xs,
        xLabel: samples ? "samples" : "step",
        series,
        empty: chosen.size ? "None of these runs has measured it." : "Tick a run above.",
        log: byId("log-loss").checked && options.log,
        ...options.spec,
      },
    };
  }
  const toSamples = (curve, step) => {
    const i = curve.x.findIndex((each) => each >= step),
      at = i < 0 ? curve.x.length - 1 : i;
    return step === 0 ? 0 : Math.round(((curve.samples[at] ?? 0) * step) / curve.x[at]);
  };
  const overSteps = (curve, samples, values) =>
    values.map((value, i) => [samples ? curve.samples[i] : curve.x[i], value]);
  let before = null;
  function charts() {
    const factor = Number(byId("smoothing").value),
      axis = byId("x-axis").value;
    if (before !== axis) Charts.forgetZoom();
    before = axis;
    const all = [
      overlay(
        "loss",
        "Training loss",
        "smoothed",
        (curve, samples) => overSteps(curve, samples, Charts.smoothed(Charts.capped(curve.loss), factor)),
        { log: true, spec: { format: Format.loss, tick: Format.plain, clip: true, height: 280 } },
      ),
      overlay(
        "validation",
        "Validation loss",
        "comparable where the same clips are held out",
        (curve, samples) => curve.validation.map(([step, loss]) => [samples ? toSamples(curve, step) : step, loss]),
        { points: true, log: true, spec: { format: Format.loss, tick: Format.plain, height: 280 } },
      ),
      overlay("rate", "Learning rate", "", (curve, samples) => overSteps(curve, samples, curve.lr), {
        spec: { format: Format.rate, tick: (value) => Format.rate(value).replace(/\.?0+e/, "e"), zero: true },
      }),
      overlay(
        "gradient",
        "Gradient norm",
        "smoothed",
        (curve, samples) => overSteps(curve, samples, Charts.smoothed(curve.grad_norm, factor)),
        { log: true, spec: { clip: true } },
      ),
    ];
    Charts.stretch(all.map(({ spec }) => spec.x));
    all.forEach(({ id, spec }) => Charts.draw(byId("charts"), id, spec));
  }
  ["smoothing", "log-loss", "x-axis"].forEach((id) => keepControl(id, charts));
  byId("find").addEventListener("input", table);
  table();
  charts();
})();
