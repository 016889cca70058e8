"use strict";
// The page of a run. While the run trains, the page loads its own newest version into a hidden frame, which sends its
// data here: nothing jumps, and it works from a file too.
const text = byId("data").textContent;
if (window !== window.top && location.hash === "#data") window.parent.postMessage({ wantrain: text }, "*");
else runPage(JSON.parse(text));

function runPage(first) {
  const { along, setting, table } = View;
  View.data = first;

  function files() {
    byId("config").textContent = View.data.config;
    byId("starts").replaceChildren(
      View.data.starts.length
        ? element(
            "div",
            { class: "scroll" },
            table(
              ["When", "Command", "Device", "Engine", "Processes", "Version"],
              View.data.starts.map((start) => [
                start.at.replace("T", " ").replace("+00:00", " UTC"),
                element("code", {}, [].concat(start.command).join(" ")),
                start.device,
                start.engine,
                start.processes,
                start.made_by,
              ]),
            ),
          )
        : element("p", { class: "empty" }, "No start is recorded."),
    );
  }
  function stretch() {
    const steps = [
      View.data.x,
      ...Object.values(View.data.validation).map((rows) => rows.map((row) => row.step)),
      ...Object.values(View.data.heat).map((heat) => heat.x),
    ];
    Charts.stretch(steps.filter((each) => each.length).map(along));
  }
  function charts() {
    setting.smoothing = Number(byId("smoothing").value);
    setting.clip = byId("clip-outliers").checked;
    setting.log = byId("log-loss").checked;
    setting.heat = byId("heat").value;
    const samples = byId("x-axis").value === "samples";
    if (samples !== setting.samples) Charts.forgetZoom();
    setting.samples = samples;
    stretch();
    Learning.draw();
    Trouble.draw();
    Cost.draw();
  }
  function show() {
    Summary.header();
    Summary.draw();
    charts();
    files();
  }

  let frame = null,
    unanswered = 0;
  function reload() {
    if (document.hidden) return;
    if (unanswered >= 3) {
      location.reload();
      return;
    }
    unanswered += 1;
    frame?.remove();
    frame = element("iframe", {
      src: `${location.pathname}?${Date.now()}#data`,
      hidden: true,
      sandbox: "allow-scripts",
      tabindex: -1,
      "aria-hidden": "true",
    });
    document.body.append(frame);
  }
  window.addEventListener("message", (event) => {
    if (!frame || event.source !== frame.contentWindow || typeof event.data?.wantrain !== "string") return;
    unanswered = 0;
    frame.remove();
    frame = null;
    const found = JSON.parse(event.data.wantrain);
    if (found.updated === View.data.updated && found.state === View.data.state) return;
    View.data = found;
    Inspector.update(View.data);
    show();
    Samples.update(View.data.previews);
  });
  setInterval(
    () => {
      if (View.data.state === "running") {
        Summary.header();
        reload();
      }
    },
    Math.max(5, Math.min(60, View.data.refresh || 10)) * 1000,
  );
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && View.data.state === "running") reload();
  });

  ["smoothing", "clip-outliers", "log-loss", "heat", "x-axis"].forEach((id) => keepControl(id, charts));
  Inspector.start(View.data);
  show();
  Samples.start(View.data.previews);
}
