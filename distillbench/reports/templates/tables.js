"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Tables: a click on a heading sorts; empty cells stay last. Checkboxes choose columns.
  const value = cell => cell.dataset.v === undefined ? null : cell.classList.contains("num") ? Number(cell.dataset.v) : cell.dataset.v;
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : words.compare(a, b);
  for (const table of all("table.sortable")) {
    const headings = all("thead th", table);
    const body = table.tBodies[0], original = [...body.rows];
    const sort = (at, next) => {
      headings.forEach((h, i) => h.setAttribute("aria-sort", i === at ? next : "none"));
      const sign = next === "ascending" ? 1 : -1;
      const rows = original.map(row => [next === "none" ? 0 : value(row.cells[at]), row]);
      if (next !== "none") rows.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : sign * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    };
    headings.forEach((heading, at) => heading.querySelector("button").addEventListener("click", () => {
      const now = heading.getAttribute("aria-sort"), first = heading.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      sort(at, now === "none" ? first : now === first ? second : "none");
    }));
    document.querySelector(`select[data-sort="${table.id}"]`)?.addEventListener("change", event => {
      const at = event.target.value;
      at === "" ? sort(0, "none") : sort(Number(at), headings[Number(at)].dataset.first);
    });
    const filter = document.querySelector(`input[data-filter="${table.id}"]`);
    filter?.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of original) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every(word => text.includes(word));
        shown += !row.hidden;
      }
      document.querySelector(`[data-count="${table.id}"]`).textContent = words.length ? `${shown} of ${original.length} rows` : "";
    });
  }
  for (const button of all("button.copy")) button.addEventListener("click", async () => {
    const text = button.dataset.copy, said = button.textContent;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = document.createElement("textarea");
      area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    button.textContent = "Copied"; setTimeout(() => { button.textContent = said; }, 1500);
  });
  for (const chooser of all(".choose")) {
    const style = document.getElementById(chooser.dataset.style), table = chooser.dataset.table;
    chooser.addEventListener("change", () => {
      const off = all("input", chooser).filter(box => !box.checked).map(box => `#${table} tr > :nth-child(${box.value})`);
      style.textContent = off.length ? off.join(",") + "{display:none}" : "";
    });
  }
})();
