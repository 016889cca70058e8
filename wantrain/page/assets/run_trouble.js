"use strict";
// What stands out: unusual steps, gradients, rates, and the clips that stay hard.
const Trouble = (() => {
  const { colour, many, overSteps, table } = View;
  function trouble() {
    const parent = byId("charts-trouble"),
      of = (key) =>
        View.data.experts.map((expert) => ({
          label: many() ? Format.name(expert) : key,
          values: View.data.of_expert[expert][key],
          colour: colour(expert),
          width: 1.25,
        }));
    const named = (key, words) => of(key).map((series) => ({ ...series, label: many() ? series.label : words }));
    overSteps("usual", parent, {
      title: "Loss against the usual",
      note: "for its noise levels; 1 is usual",
      series: named("times_usual", "times the usual"),
      log: true,
      format: Format.times,
      include: [0.8, 1.25],
      empty: "Compared once enough samples were seen at each noise level.",
    });
    overSteps("gradient", parent, {
      title: "Gradient norm",
      note: "before clipping",
      series: named("grad_norm", "norm"),
      clip: View.setting.clip,
      log: View.setting.log,
      format: Format.plain,
    });
    overSteps("rate", parent, {
      title: "Learning rate",
      series: named("lr", "rate"),
      format: Format.rate,
      tick: (value) => Format.rate(value).replace(/\.?0+e/, "e"),
      zero: true,
    });
    overSteps("update", parent, {
      title: "Update over weights",
      note: "norm of a step’s update; of a LoRA over the adapter’s weights",
      series: named("update_ratio", "ratio"),
      format: Format.plain,
      log: true,
    });
    const steps = View.data.unusual.slice(0, 12),
      blocks = [];
    const recorded = (step) => View.data.records.find((record) => record.step === step);
    if (steps.length)
      blocks.push(
        element(
          "div",
          {},
          element("h3", {}, "Most unusual steps"),
          table(
            ["Step", ...(many() ? ["Expert"] : []), "Against the usual", "Clip with the highest loss"],
            steps.map(([step, expert, times]) => [
              step,
              ...(many() ? [Format.name(expert)] : []),
              Format.times(times),
              clipName(View.data.picks[step]?.clips[0]?.[0], recorded(step)),
            ]),
            (n) => Inspector.open(steps[n][0]),
          ),
        ),
      );
    if (View.data.hard.length)
      blocks.push(
        element(
          "div",
          {},
          element("h3", {}, "Hardest clips"),
          element(
            "p",
            { class: "quiet" },
            "Loss over that of other clips at the same noise: look for wrong captions and odd footage.",
          ),
          element(
            "div",
            { class: "clip-list", style: { marginTop: "10px" } },
            View.data.hard.map(([clip, ratio, count]) => hardClip(clip, ratio, count)),
          ),
        ),
      );
    byId("unusual").replaceChildren(
      ...(blocks.length ? blocks : [element("p", { class: "empty" }, "No step stands out so far.")]),
    );
  }

  function clipName(clip, record) {
    if (!clip) return "";
    return element(
      "span",
      {},
      View.data.clips[clip]?.caption?.slice(0, 90) || clip,
      record ? element("span", { class: "bad" }, record.skipped ? "  skipped" : "  spike") : "",
    );
  }

  function hardClip(clip, ratio, count) {
    const view = View.data.clips[clip];
    return element(
      "figure",
      {},
      view ? element("img", { src: view.strip, alt: "" }) : element("div", { class: "blank" }, "no picture"),
      element(
        "figcaption",
        {},
        element("b", {}, Format.times(ratio)),
        element("span", { class: "quiet" }, `  ${clip}, seen ${count} times`),
        view
          ? element("p", { class: "caption", dir: "auto", title: view.caption }, view.caption || "(no caption)")
          : "",
      ),
    );
  }
  return { draw: trouble };
})();
