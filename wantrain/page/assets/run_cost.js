"use strict";
// Where the time of a step goes, throughput and memory.
const Cost = (() => {
  const { mean, overSteps } = View;
  function cost() {
    const parent = byId("charts-cost"),
      parts = ["forward", "backward", "optimizer", "communication", "data", "rest"];
    const names = [
      ...parts.filter((part) => View.data.times[part]),
      ...Object.keys(View.data.times).filter((part) => !parts.includes(part)),
    ];
    let below = View.data.x.map(() => 0);
    const stacked = names.map((name, i) => {
      below = below.map((value, n) => value + (View.data.times[name][n] ?? 0));
      return {
        label: name,
        values: below.map((value, n) => (View.data.times[name][n] == null ? null : value)),
        colour: ["--blue", "--teal", "--violet", "--rose", "--amber", "--grey"][i % 6],
        width: 1,
        gaps: false,
      };
    });
    const total = names.reduce((sum, name) => sum + (mean(View.data.times[name]) ?? 0), 0);
    const shares = names
      .map((name) => [name, (mean(View.data.times[name]) ?? 0) / (total || 1)])
      .filter(([, share]) => share >= 0.01)
      .map(([name, share]) => `${name} ${Math.round(100 * share)} %`)
      .join(", ");
    overSteps("time", parent, {
      title: "Seconds of a step",
      note: shares,
      series: stacked.map((series, i) => (i ? series : { ...series, fill: 30 })),
      bands: stacked.slice(1).map((series, i) => ({ series: [i + 2, i + 1], colour: series.colour, share: 30 })),
      format: Format.seconds,
      zero: true,
      clip: true,
    });
    const speed = View.data.of_run.tokens_per_second;
    overSteps("speed", parent, {
      title: "Throughput",
      note: "tokens per second, of all processes",
      series: [{ label: "tokens/s", values: speed, colour: "--blue", width: 1.75 }],
      format: Format.count,
      zero: true,
    });
    const memory = [
      { label: "device", values: View.data.of_run.device_gb, colour: "--blue", width: 1.75 },
      { label: "host", values: View.data.of_run.host_gb, colour: "--grey", width: 1.75 },
    ].filter((series) => series.values.some((value) => value != null));
    overSteps("memory", parent, {
      title: "Memory",
      note: "the most so far",
      series: memory,
      format: Format.gigabytes,
      tick: (value) => `${Number(value.toPrecision(3))} GB`,
      zero: true,
    });
    if (View.data.of_run.mfu.some((value) => value != null))
      overSteps("mfu", parent, {
        title: "MFU",
        note: "of the device’s dense bfloat16 peak",
        series: [{ label: "MFU", values: View.data.of_run.mfu, colour: "--teal", width: 1.75 }],
        format: (value) => `${(100 * value).toFixed(0)} %`,
        zero: true,
      });
  }
  return { draw: cost };
})();
