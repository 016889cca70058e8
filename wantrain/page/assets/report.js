"use strict";
// The table of clips: sorted by its heads, filtered by words, bucket and tag.
(() => {
  const table = byId("table"),
    body = table.tBodies[0],
    rows = [...body.rows];
  const find = byId("find"),
    bucket = byId("filter-bucket"),
    tag = byId("filter-tag");
  const tagsOf = (row) => JSON.parse(row.dataset.tags);
  const collator = new Intl.Collator(undefined, { numeric: true });
  const words = (row) => `${row.querySelector("td.caption").textContent} ${row.dataset.source}`.toLowerCase();
  const values = {
    caption: (row) => row.querySelector("td.caption").textContent.trim(),
    length: (row) => Number(row.dataset.length),
    bucket: (row) => row.dataset.bucket,
    frames: (row) => Number(row.dataset.frames),
    source: (row) => row.dataset.source,
    start: (row) => Number(row.dataset.start),
  };
  const fill = (select, names) =>
    select.append(
      ...[...new Set(names)].sort(collator.compare).map((name) => element("option", { value: name }, name)),
    );
  fill(
    bucket,
    rows.map((row) => row.dataset.bucket),
  );
  fill(tag, rows.flatMap(tagsOf));
  byId("tag-label").hidden = tag.options.length < 2;

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(
        (!wanted || words(row).includes(wanted)) &&
        (!bucket.value || row.dataset.bucket === bucket.value) &&
        (!tag.value || tagsOf(row).includes(tag.value))
      );
      shown += row.hidden ? 0 : 1;
    }
    byId("none").hidden = shown > 0;
    byId("count").textContent =
      shown === rows.length
        ? `${Format.count(shown)} clips`
        : `${Format.count(shown)} of ${Format.count(rows.length)} clips`;
    document
      .querySelectorAll("[data-filter]")
      .forEach((button) =>
        button.toggleAttribute("data-on", { bucket, tag }[button.dataset.filter].value === button.dataset.value),
      );
  }
  function sort(head) {
    const rising = head.getAttribute("aria-sort") !== "ascending",
      value = values[head.dataset.sort];
    table.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));
    rows.sort((a, b) => (rising ? 1 : -1) * compare(value(a), value(b)));
    body.append(...rows);
  }
  table.querySelectorAll("th[data-sort]").forEach((head) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(head);
    });
  });
  document.querySelectorAll("[data-filter]").forEach((button) =>
    button.addEventListener("click", () => {
      const select = { bucket, tag }[button.dataset.filter],
        value = button.dataset.value;
      if (![...select.options].some((option) => option.value === value))
        select.append(element("option", { value }, value));
      select.value = select.value === value ? "" : value;
      filter();
      byId("clips").scrollIntoView({ block: "start" });
    }),
  );
  [find, bucket, tag].forEach((control) => control.addEventListener("input", filter));
  filter();
})();
