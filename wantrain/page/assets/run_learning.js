"use strict";
// Is it learning? Training loss, validation, and the loss by noise level.
const Learning = (() => {
  const { setting, title, colour, many, last, along, label, overSteps, table } = View;
  function learning() {
    const parent = byId("charts-learning");
    const raw = View.data.experts.flatMap((expert) => [
      {
        label: many()
          ? `${Format.name(expert)}, each`
          : View.data.width > 1
            ? `mean of ${View.data.width}`
            : "each step",
        values: View.data.of_expert[expert].loss,
        colour: colour(expert),
        faint: true,
        width: 1,
      },
      {
        label: many() ? Format.name(expert) : "smoothed",
        values: Charts.smoothed(
          View.setting.clip ? Charts.capped(View.data.of_expert[expert].loss) : View.data.of_expert[expert].loss,
          View.setting.smoothing,
        ),
        colour: colour(expert),
        width: 2,
      },
    ]);
    overSteps("loss", parent, {
      title: "Training loss",
      wide: many(),
      note: View.data.width > 1 ? `a point for ${View.data.width} steps` : "",
      series: raw,
      clip: View.setting.clip,
      log: View.setting.log,
      format: Format.loss,
      tick: Format.plain,
    });
    for (const expert of View.data.experts)
      if (View.data.validation[expert]) validation(parent, expert, View.data.validation[expert]);
    const heats = byId("heatmaps");
    for (const [expert, heat] of Object.entries(View.data.heat)) {
      HeatMap.draw(
        heats,
        expert,
        heat,
        `Loss by noise level${title(expert)}`,
        setting.heat,
        heat.x,
        along(heat.x),
        (step) => Inspector.open(step),
      );
    }
    tags();
  }

  function validation(parent, expert, rows) {
    const id = `validation-${expert}`,
      steps = rows.map((row) => row.step),
      key = rows.some((row) => row.validation_loss != null) ? "validation_loss" : "validation_psnr";
    const loss = rows.map((row) => row[key] ?? null),
      bases = rows.map((row) =>
        row.validation_change == null || row[key] == null ? null : row[key] - row.validation_change,
      );
    const base = last(bases),
      bound = (name) =>
        rows.map((row, i) => (row[name] == null || bases[i] == null || !row.step ? null : bases[i] + row[name]));
    const verdict = (wanted) =>
      rows.map((row, i) => (row.step && (row.validation_verdict ?? "") === wanted ? loss[i] : null));
    const linear = last(rows.map((row) => row.validation_linear ?? null)),
      live = rows.map((row) => row.validation_live_loss ?? null);
    const series = [
      { label: "held out", values: loss, colour: colour(expert), width: 2 },
      { label: "low", values: bound("validation_change_low"), colour: colour(expert), line: false, unnamed: true },
      { label: "high", values: bound("validation_change_high"), colour: colour(expert), line: false, unnamed: true },
      { label: "base", values: rows.map(() => base), colour: "--grey", dash: [5, 4], width: 1.5 },
      {
        label: "training clips",
        values: rows.map((row) => row.validation_train_loss ?? null),
        colour: "--violet",
        width: 1.25,
        hidden: true,
      },
      { label: "better", values: verdict("better"), colour: "--good", line: false, points: true },
      { label: "worse", values: verdict("worse"), colour: "--bad", line: false, points: true },
      {
        label: "not distinguishable",
        values: verdict("not distinguishable"),
        colour: "--grey",
        line: false,
        points: true,
        hollow: true,
      },
      { label: "live weights", values: live, colour: "--teal", width: 1.25 },
    ].filter((each) => each.values.some((value) => value != null) || ["low", "high"].includes(each.label));
    const note = [
      key === "validation_loss" && base != null ? "band: 99 % interval of the change from the base" : "",
      linear != null ? `best linear predictor ${Format.loss(linear)}` : "",
    ]
      .filter(Boolean)
      .join("; ");
    Charts.draw(parent, id, {
      title: `Validation${title(expert)}`,
      note,
      x: along(steps),
      xLabel: label(),
      series,
      bands: [{ series: [3, 2], colour: colour(expert) }],
      format: Format.loss,
      tick: Format.plain,
      click: (place) => Samples.goTo(steps[place]),
    });
  }

  function tags() {
    const found = View.data.experts
      .map((expert) => [expert, View.data.validation[expert]?.at(-1)?.validation_by_tag])
      .filter(([, tags]) => tags && Object.keys(tags).length);
    byId("tags").replaceChildren(
      ...found.map(([expert, rows]) =>
        element(
          "details",
          {},
          element("summary", {}, `Validation by tag${title(expert)}`),
          element(
            "div",
            { class: "scroll" },
            table(
              ["Tag", "Clips", "Loss", "Change from the base", "99 % interval"],
              Object.entries(rows).map(([tag, row]) => [
                tag,
                row.clips,
                Format.loss(row.loss),
                Format.signed(row.change),
                row.change_low == null
                  ? "too few files"
                  : `${Format.signed(row.change_low)} to ${Format.signed(row.change_high)}`,
              ]),
            ),
          ),
        ),
      ),
    );
  }
  return { draw: learning };
})();
