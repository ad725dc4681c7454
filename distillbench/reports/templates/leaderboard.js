"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.querySelector("form.filters");
  if (!form) return;
  // Filters of boards and rows; the address keeps what was chosen, so that it can be shared.
  const names = ["dataset", "teacher", "nfe", "free", "teachers"];
  const field = name => form.elements.namedItem(name);
  const chosen = name => { const one = field(name); return !one ? "" : one.type === "checkbox" ? (one.checked ? one.value : "") : one.value; };
  const apply = () => {
    const want = Object.fromEntries(names.map(name => [name, chosen(name)]));
    let rows = 0, total = 0;
    for (const board of all(".board")) {
      const fits = (!want.dataset || board.dataset.dataset === want.dataset) && (!want.teacher || board.dataset.teacher === want.teacher);
      let students = 0;
      for (const row of all("tr[data-free]", board)) {
        const teacher = row.dataset.free === "teacher";
        const ok = fits && (!want.nfe || row.dataset.nfe === want.nfe) && (teacher ? !want.teachers : !want.free || row.dataset.free === want.free);
        row.classList.toggle("off", !ok);
        total += 1; rows += ok; students += ok && !teacher;
      }
      for (const row of all(".answers > tbody > tr", board)) row.classList.toggle("off", Boolean(want.nfe) && row.dataset.nfe !== want.nfe);
      const own = board.querySelector(".answer-free");
      for (const part of all(".answer-any", board)) part.hidden = Boolean(want.free);
      if (own) own.hidden = !want.free;
      board.hidden = !fits || !students;
    }
    const nothing = all(".board").every(board => board.hidden), filtered = Object.values(want).some(Boolean);
    document.querySelector(".nothing").hidden = !nothing;
    form.querySelector("[data-shown]").textContent = filtered ? `${nothing ? 0 : rows} of ${total} rows` : "";
    const view = new URLSearchParams(Object.entries(want).filter(([, value]) => value)).toString();
    if (filtered || location.hash.includes("=")) history.replaceState(null, "", view ? `#${view}` : location.pathname + location.search);
  };
  const restore = () => {
    if (!location.hash.includes("=")) return;
    const view = new URLSearchParams(location.hash.slice(1));
    for (const name of names) {
      const one = field(name), value = view.get(name) ?? "";
      if (!one) continue;
      if (one.type === "checkbox") one.checked = value === one.value;
      else if ([...one.options].some(option => option.value === value)) one.value = value;
    }
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", event => event.preventDefault());
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { restore(); apply(); } });
  restore();
  apply();
})();
