"use strict";
// The review of captions: filtered, sorted, edited in place, and saved as the table that caption.py apply= reads.
(() => {
  const rows = [...byId("table").tBodies[0].rows],
    find = byId("find"),
    by = byId("filter-by"),
    save = byId("save");
  const box = (row) => row.querySelector("textarea"),
    caption = (row) => (box(row) ? box(row).value : row.querySelector("td.caption").textContent.trim()),
    isEdited = (row) => box(row) !== null && box(row).value !== box(row).defaultValue;
  const collator = new Intl.Collator(undefined, { numeric: true });
  const values = {
    caption,
    tokens: (row) => Number(row.dataset.tokens),
    by: (row) => row.querySelector("td.by").textContent,
    path: (row) => row.dataset.path,
  };
  by.append(
    ...new Map(rows.map((row) => [row.dataset.by, element("option", { value: row.dataset.by }, values.by(row))])).values(),
    element("option", { value: "edited" }, "edited here"),
  );

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const matches = by.value === "edited" ? isEdited(row) : !by.value || row.dataset.by === by.value;
      row.hidden = !(matches && `${caption(row)} ${row.dataset.path}`.toLowerCase().includes(wanted));
      shown += row.hidden ? 0 : 1;
    }
    byId("none").hidden = shown > 0;
    const all = Format.count(rows.length);
    byId("count").textContent = shown === rows.length ? `${all} files` : `${Format.count(shown)} of ${all} files`;
  }
  function sort(head) {
    const rising = head.getAttribute("aria-sort") !== "ascending",
      value = values[head.dataset.sort];
    head.parentNode.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));
    rows.sort((a, b) => (rising ? 1 : -1) * compare(value(a), value(b)));
    byId("table").tBodies[0].append(...rows);
  }
  function edited() {
    const count = rows.filter(isEdited).length;
    rows.forEach((row) => {
      row.toggleAttribute("data-edited", isEdited(row));
      row.querySelector("td.number").textContent = isEdited(row) ? "–" : Format.count(values.tokens(row));
    });
    save.disabled = count === 0;
    save.textContent = count ? `Save the table (${Format.count(count)} edited)` : "Save the table";
  }
  // As tall as its text, where the browser does not do it by itself (field-sizing in the style).
  function fit(area) {
    if (CSS.supports("field-sizing", "content")) return;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }
  function text() {
    const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
    const lines = rows.map((row) => {
      const { path, tokens, by, seen } = row.dataset;
      return [path, caption(row), tokens, by, seen].map(cell).join(",");
    });
    return `\ufeff${["path,caption,tokens,by,seen", ...lines].join("\r\n")}\r\n`;
  }
  let saved = "";
  save.addEventListener("click", () => {
    saved = text();
    const address = URL.createObjectURL(new Blob([saved], { type: "text/csv" }));
    element("a", { href: address, download: "captions.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  window.addEventListener("beforeunload", (event) => {
    if (rows.some(isEdited) && text() !== saved) event.preventDefault();
  });
  document.querySelectorAll("#table textarea").forEach((area) => {
    fit(area);
    area.addEventListener("input", () => {
      fit(area);
      edited();
    });
  });
  document.querySelectorAll("th[data-sort]").forEach((head) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(head);
    });
  });
  [find, by].forEach((control) => control.addEventListener("input", filter));
  filter();
  edited();
})();
