"use strict";
// The better one of two samples, pair by pair, saved or copied as the table that data.pairs= reads.
(() => {
  const pairs = [...document.querySelectorAll(".pair")];
  if (!pairs.length) return;
  const save = byId("save"),
    copy = byId("copy"),
    area = byId("text");
  const choices = (pair) => [...pair.querySelectorAll(".choice")],
    isChosen = (choice) => choice.getAttribute("aria-pressed") === "true",
    winner = (pair) => choices(pair).find(isChosen),
    loser = (pair) => choices(pair).find((choice) => !isChosen(choice));
  let saved = "";

  function text() {
    const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
    const lines = pairs
      .filter(winner)
      .map((pair) => [winner(pair).dataset.file, loser(pair).dataset.file, pair.dataset.prompt].map(cell).join(","));
    return `\ufeff${["winner,loser,prompt", ...lines].join("\r\n")}\r\n`;
  }
  function show() {
    const count = pairs.filter(winner).length;
    byId("count").textContent = `${Format.count(count)} of ${Format.count(pairs.length)} chosen`;
    save.disabled = copy.disabled = count === 0;
    pairs.forEach((pair) => pair.toggleAttribute("data-chosen", winner(pair) !== undefined));
    area.hidden = true;
  }
  function choose(pair, choice) {
    const was = isChosen(choice);
    choices(pair).forEach((each) => each.setAttribute("aria-pressed", String(each === choice && !was)));
    show();
  }
  function next(pair) {
    const following = pairs[pairs.indexOf(pair) + 1];
    if (!following) return;
    following.focus({ preventScroll: true });
    following.scrollIntoView({ block: "center" });
  }
  pairs.forEach((pair) => {
    choices(pair).forEach((choice) => choice.addEventListener("click", () => choose(pair, choice)));
    pair.addEventListener("keydown", (event) => {
      const place = { ArrowLeft: 0, ArrowRight: 1 }[event.key];
      if (place === undefined) return;
      event.preventDefault();
      choose(pair, choices(pair)[place]);
      if (winner(pair)) next(pair);
    });
  });
  save.addEventListener("click", () => {
    saved = text();
    const address = URL.createObjectURL(new Blob([saved], { type: "text/csv" }));
    element("a", { href: address, download: "pairs.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  copy.addEventListener("click", () => {
    saved = text();
    area.value = saved.slice(1); // without the byte order mark
    area.hidden = false;
    area.select();
    document.execCommand("copy"); // a file has no navigator.clipboard in every browser; the text stays to be copied
  });
  window.addEventListener("beforeunload", (event) => {
    if (pairs.some(winner) && text() !== saved) event.preventDefault();
  });
  show();
})();
