"use strict";
// What the parts of a run's page share: its data, the chosen settings, and charts over its steps.
const View = (() => {
  const setting = { smoothing: 0.9, clip: true, log: false, heat: "change", samples: false };
  const title = (expert) => (View.data.experts.length > 1 ? `, ${Format.name(expert)}` : "");
  const colour = (expert) => colourOf(expert, View.data.experts.indexOf(expert));
  const many = () => View.data.experts.length > 1;
  const last = (values) => values.findLast((value) => value != null) ?? null;
  const mean = (values) => {
    const some = values.filter((value) => value != null);
    return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
  };

  // The horizontal axis: steps, or the samples seen by then.
  function along(steps) {
    if (!View.setting.samples) return steps;
    const samples = View.data.of_run.samples;
    return steps.map((step) => {
      const place = View.data.x.findIndex((each) => each >= step);
      return place < 0 ? last(samples) : step === 0 ? 0 : Math.round((samples[place] * step) / View.data.x[place]);
    });
  }
  const label = () => (View.setting.samples ? "samples" : "step");
  function overSteps(id, parent, spec) {
    const steps = View.data.x;
    // Of the points near a click the most unusual step: a spike is one pixel wide.
    const click = (place, from, to) => {
      const near = View.data.experts
        .flatMap((expert) => View.data.worst[expert].slice(from, to + 1))
        .filter((step) => step != null && View.data.picks[step]);
      const score = (step) => View.data.picks[step].times_usual ?? View.data.picks[step].loss ?? Infinity;
      Inspector.open(
        near.length ? near.reduce((best, step) => (score(step) > score(best) ? step : best)) : steps[place],
      );
    };
    Charts.draw(parent, id, { x: along(steps), xLabel: label(), click, ...spec });
  }
  function table(head, rows, pick = null) {
    const numeric = head.map(
      (_, i) =>
        rows.length > 0 && rows.every((row) => typeof row[i] === "number" || /^[−+±]?[\d,.]+ ?[×%]?$/.test(row[i])),
    );
    const cell = (tag, value, i) =>
      element(
        tag,
        { class: numeric[i] ? "number" : null, dir: "auto" },
        value instanceof Node ? value : typeof value === "number" ? Format.count(value) : String(value ?? ""),
      );
    return element(
      "table",
      { class: "list" },
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          head.map((name, i) => cell("th", name, i)),
        ),
      ),
      element(
        "tbody",
        {},
        rows.map((row, n) =>
          element(
            "tr",
            pick
              ? {
                  class: "pick",
                  tabindex: 0,
                  onclick: () => pick(n),
                  onkeydown: (event) => {
                    if (event.key === "Enter") pick(n);
                  },
                }
              : {},
            row.map((value, i) => cell("td", value, i)),
          ),
        ),
      ),
    );
  }
  return { data: null, setting, title, colour, many, last, mean, along, label, overSteps, table };
})();
