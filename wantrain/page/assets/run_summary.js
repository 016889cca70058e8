"use strict";
// Where a run stands, and what matters of it in a few cards.
const Summary = (() => {
  const { title, last, mean } = View;
  function header() {
    const age = Date.now() / 1000 - View.data.updated,
      silent = View.data.state === "running" && age > Math.max(300, 5 * View.data.refresh);
    const state = byId("state");
    state.className = `state ${silent ? "silent" : View.data.state}`;
    state.textContent = silent ? "no news" : View.data.state;
    byId("age").textContent = View.data.state === "running" && age < 60 ? "" : `updated ${Format.duration(age)} ago`;
    const share = View.data.steps ? Math.min(1, View.data.step / View.data.steps) : 0;
    byId("progress").firstElementChild.style.width = `${100 * share}%`;
    byId("progress").setAttribute("aria-valuenow", Math.round(100 * share));
    const pace = mean(View.data.of_run.seconds.slice(-30)),
      left = pace && View.data.state === "running" ? (View.data.steps - View.data.step) * pace : null;
    byId("status").replaceChildren(
      `Step ${Format.count(View.data.step)} of ${Format.count(View.data.steps)}`,
      element(
        "span",
        { class: "quiet" },
        [pace ? ` · ${Format.seconds(pace)} per step` : "", left ? ` · ${Format.duration(left)} left` : ""].join(""),
      ),
    );
    const message = byId("message");
    message.hidden = !View.data.message;
    message.textContent = View.data.message;
    byId("facts").replaceChildren(
      ...View.data.facts.map(([key, value]) =>
        element("div", {}, element("dt", {}, key), element("dd", { dir: "auto" }, value)),
      ),
    );
    document.title = `${View.data.state === "running" ? `${Math.round(100 * share)} % · ` : ""}${View.data.name}`;
  }

  function card(name, value, note, tone = "", extra = null) {
    return element(
      "div",
      { class: "card" },
      element("h3", {}, name),
      element("p", { class: `value ${tone}` }, value),
      note ? element("p", {}, note) : "",
      extra,
    );
  }

  function verdictCard(expert, rows) {
    const measured = rows.filter((row) => row.validation_loss != null),
      now = measured.at(-1),
      name = `Validation${title(expert)}`;
    if (!now) {
      const psnr = rows.at(-1)?.validation_psnr;
      return card(name, psnr == null ? "none yet" : `${psnr.toFixed(2)} dB`, "");
    }
    const best = measured.reduce((a, b) => (b.validation_loss < a.validation_loss ? b : a));
    const lowest = `Lowest at step ${Format.count(best.step)}: ${Format.loss(best.validation_loss)}`;
    if (!now.step) return card(name, Format.loss(now.validation_loss), "before training");
    const interval =
      now.validation_change_low == null
        ? "too few files for an interval"
        : `99 % interval ${Format.signed(now.validation_change_low)} to ${Format.signed(now.validation_change_high)}`;
    const verdict = now.validation_verdict ?? "",
      tone = verdict === "better" ? "good" : verdict === "worse" ? "bad" : "";
    return card(
      name,
      verdict === "not distinguishable" ? "no clear change" : `${verdict} than the base`,
      `${Format.signed(now.validation_change)} (${interval})`,
      tone,
      element("p", {}, lowest),
    );
  }

  function overfitCard(expert, rows) {
    const now = rows.findLast((row) => row.validation_gap_change != null && row.step > 0);
    if (!now) return null;
    if (now.validation_gap_change_low == null || now.validation_gap_change_low <= 0) return null;
    return card(
      `Overfitting${title(expert)}`,
      "fits training clips better",
      `by ${Format.loss(now.validation_gap_change)} more than held-out ones, against the start`,
      "bad",
    );
  }

  function summary() {
    const cards = View.data.experts.flatMap((expert) =>
      View.data.validation[expert]
        ? [verdictCard(expert, View.data.validation[expert]), overfitCard(expert, View.data.validation[expert])]
        : [],
    );
    for (const expert of View.data.experts) {
      const losses = View.data.of_expert[expert].loss.filter((value) => value != null),
        part = Math.max(1, Math.floor(losses.length / 10));
      const [start, now] = [mean(losses.slice(0, part)), mean(losses.slice(-part))];
      cards.push(
        card(
          `Training loss${title(expert)}`,
          Format.loss(now),
          losses.length > 20 ? `${Format.percent(now / start - 1)} since the start (means of tenths)` : "",
        ),
      );
    }
    const speed = last(View.data.of_run.tokens_per_second),
      use = last(View.data.of_run.mfu);
    cards.push(
      card(
        "Speed",
        Format.seconds(mean(View.data.of_run.seconds.slice(-30))),
        `per step${speed ? `, ${Format.count(speed)} tokens/s` : ""}${use ? `, MFU ${Math.round(100 * use)} %` : ""}`,
      ),
    );
    const device = last(View.data.of_run.device_gb),
      host = last(View.data.of_run.host_gb);
    cards.push(
      device != null
        ? card("Memory of the device", Format.gigabytes(device), `host ${Format.gigabytes(host)}`)
        : card("Memory of the host", Format.gigabytes(host), "at most so far"),
    );
    const skipped = View.data.records.filter((record) => record.skipped).length;
    cards.push(
      card(
        "Safeguards",
        View.data.records.length ? `${View.data.records.length} recorded` : "quiet",
        View.data.records.length
          ? skipped
            ? `${skipped} of them skipped the step`
            : "no step was skipped"
          : "no spike, no skipped step",
        View.data.records.length ? "bad" : "",
      ),
    );
    if (View.data.checkpoints.length)
      cards.push(
        card(
          "Checkpoints kept",
          View.data.checkpoints.slice(-4).map(Format.count).join(", "),
          View.data.checkpoints.length > 4 ? `and ${View.data.checkpoints.length - 4} older` : "steps",
        ),
      );
    byId("summary").replaceChildren(...cards.filter(Boolean));
  }
  return { header, draw: summary };
})();
