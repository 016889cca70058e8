"use strict";
// The sample grid: a row for each prompt, step 0 beside the step that the slider names.
const Samples = (() => {
  let rows = [],
    steps = [],
    place = 0;
  const name = (step) => (step === 0 ? "before training" : `step ${Format.count(step)}`);

  // A frame that shows one video, and keeps the one before until the next can be seen.
  function frame() {
    const box = element("div", { class: "frame" }),
      caption = element("figcaption");
    const figure = element("figure", {}, box, caption);
    let wanted = null;
    function show(step, video) {
      caption.replaceChildren(
        element("strong", {}, name(step)),
        video
          ? element(
              "span",
              { class: "quiet" },
              `motion ${video.motion.toFixed(2)}, flicker ${video.flicker.toFixed(2)}`,
            )
          : "",
      );
      if (video?.file === wanted) return;
      wanted = video?.file ?? null;
      if (!video) {
        clear();
        box.append(element("p", { class: "missing" }, "No sample at this step."));
        return;
      }
      const next = element("video", {
        src: encodeURI(video.file).replaceAll("#", "%23").replaceAll("?", "%3F"),
        loop: true,
        playsinline: true,
        preload: "auto",
        "data-waiting": true,
      });
      next.muted = true;
      next.addEventListener("error", () => {
        if (wanted === video.file) {
          clear();
          box.append(element("p", { class: "missing" }, `${video.file} is missing or cannot be played here.`));
        }
      });
      next.addEventListener("loadeddata", () => {
        if (wanted !== video.file) {
          drop(next);
          return;
        }
        [...box.children].forEach((child) => {
          if (child !== next) drop(child);
        });
        next.removeAttribute("data-waiting");
      });
      [...box.querySelectorAll("[data-waiting]")].forEach(drop);
      box.append(Player.watch(next));
    }
    const drop = (child) => {
      if (child.tagName === "VIDEO") Player.forget(child);
      child.remove();
    };
    const clear = () => [...box.children].forEach(drop);
    return { figure, show };
  }
  function build(previews) {
    const grid = byId("grid");
    grid.replaceChildren();
    rows = previews.rows.map((row) => {
      const first = frame(),
        then = frame();
      const text = element(
        "div",
        { class: "text", title: "Show all of the prompt", onclick: () => text.classList.toggle("open") },
        element("p", { class: "caption", dir: "auto" }, row.prompt),
        element("p", { class: "quiet" }, `seed ${row.seed}`),
      );
      grid.append(element("div", { class: "sample" }, text, first.figure, then.figure));
      return { row, first, then, key: JSON.stringify([row.prompt, row.seed]) };
    });
  }
  function update(previews) {
    const atEnd = place >= steps.length - 1,
      keys = previews.rows.map((row) => JSON.stringify([row.prompt, row.seed]));
    byId("samples").hidden = !previews.rows.length;
    if (JSON.stringify(keys) !== JSON.stringify(rows.map((row) => row.key))) build(previews);
    previews.rows.forEach((row, i) => {
      rows[i].row = row;
    });
    steps = previews.steps;
    const slider = byId("step-slider");
    slider.max = Math.max(0, steps.length - 1);
    slider.disabled = steps.length < 2;
    move(atEnd ? steps.length - 1 : place);
  }
  function move(to) {
    if (!steps.length) return;
    place = Math.max(0, Math.min(steps.length - 1, to));
    const slider = byId("step-slider"),
      step = steps[place];
    slider.value = place;
    slider.setAttribute("aria-valuetext", name(step));
    byId("sample-step").textContent = step === 0 ? "Step 0" : `Step ${Format.count(step)}`;
    Kept.set("sample", step);
    rows.forEach(({ row, first, then }) => {
      const known = Object.keys(row.videos).map(Number),
        start = known.includes(0) ? 0 : Math.min(...known);
      first.show(start, row.videos[start]);
      then.show(step, row.videos[step]);
    });
  }
  function start(previews) {
    byId("step-slider").addEventListener("input", (event) => move(Number(event.target.value)));
    document.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || byId("samples").hidden) return;
      if (event.target.matches?.("input:not(#step-slider), select, textarea, button, summary")) return;
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        move(place + (event.key === "ArrowLeft" ? -1 : 1));
        event.preventDefault();
      }
      if (event.key === " ") {
        Player.toggle();
        event.preventDefault();
      }
    });
    const kept = Kept.all().sample;
    update(previews);
    if (kept !== undefined && steps.includes(kept)) move(steps.indexOf(kept));
    Player.start();
  }
  return {
    start,
    update,
    goTo: (step) => {
      if (steps.includes(step)) move(steps.indexOf(step));
    },
    at: () => steps[place],
  };
})();
