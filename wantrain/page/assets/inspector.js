"use strict";
// One step: its values and its clips. Opened by a click into a chart.
const Inspector = (() => {
  let data = null,
    opened = null;
  const order = () => data.unusual.map(([step]) => step).sort((a, b) => a - b);

  function nearest(step) {
    const known = Object.keys(data.picks).map(Number);
    return known.length
      ? known.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best))
      : null;
  }
  function figure([clip, sigma, loss]) {
    const view = data.clips[clip];
    return element(
      "figure",
      {},
      view ? element("img", { src: view.strip, alt: "" }) : element("div", { class: "blank" }, "no picture"),
      element(
        "figcaption",
        {},
        element("b", {}, `loss ${Format.loss(loss)}`),
        sigma == null ? "" : ` at sigma ${sigma.toFixed(3)}`,
        element("span", { class: "quiet" }, `  ${clip}${view ? `, ${view.bucket}` : ""}`),
        view
          ? element("p", { class: "caption", dir: "auto", title: view.caption }, view.caption || "(no caption)")
          : "",
      ),
    );
  }
  function facts(pick) {
    const rows = [
      ["loss", Format.loss(pick.loss)],
      ["against the usual", Format.times(pick.times_usual)],
      ["gradient norm", Format.plain(pick.grad_norm)],
      ["learning rate", Format.rate(pick.lr)],
    ];
    return element(
      "dl",
      { class: "facts" },
      rows
        .filter(([, value]) => value !== "–")
        .map(([key, value]) => element("div", {}, element("dt", {}, key), element("dd", {}, value))),
    );
  }
  // The step nearest to `step` of which the log has clips.
  function open(step) {
    const found = nearest(step),
      panel = byId("inspector");
    if (found === null) return;
    opened = found;
    const pick = data.picks[found],
      record = data.records.find((each) => each.step === found);
    byId("inspected").textContent = `Step ${Format.count(found)}`;
    const why = { gradient: "the gradient was not finite", spike: "the loss was too far above the usual" };
    const note = record
      ? `${record.skipped ? "Skipped" : "Recorded"}: ${why[record.safeguard]}.`
      : data.width > 1
        ? `The most unusual of ${data.width} steps here.`
        : "";
    const clips = record?.samples.length
      ? record.samples.map((each) => [each.id, each.sigma ?? null, typeof each.loss === "number" ? each.loss : null])
      : pick.clips;
    byId("inspector-body").replaceChildren(
      facts(pick),
      note ? element("p", { class: "quiet" }, note) : "",
      element(
        "div",
        { class: "clip-list" },
        [...clips].sort((a, b) => (b[2] ?? Infinity) - (a[2] ?? Infinity)).map(figure),
      ),
    );
    const steps = order();
    byId("previous-unusual").disabled = !steps.some((each) => each < found);
    byId("next-unusual").disabled = !steps.some((each) => each > found);
    panel.hidden = false;
  }
  function close() {
    byId("inspector").hidden = true;
    opened = null;
  }
  function start(found) {
    data = found;
    byId("close-inspector").addEventListener("click", close);
    byId("previous-unusual").addEventListener("click", () =>
      open(
        order()
          .filter((step) => step < opened)
          .at(-1),
      ),
    );
    byId("next-unusual").addEventListener("click", () => open(order().find((step) => step > opened)));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
    });
  }
  return {
    start,
    open,
    close,
    update: (found) => {
      data = found;
    },
    figure,
  };
})();
