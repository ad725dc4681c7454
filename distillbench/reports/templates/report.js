"use strict";
(() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Tables: a click on a heading sorts; empty cells stay last. Checkboxes choose columns.
  const value = cell => cell.dataset.v === undefined ? null : cell.classList.contains("num") ? Number(cell.dataset.v) : cell.dataset.v;
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : words.compare(a, b);
  for (const table of all("table.sortable")) {
    const headings = all("thead th", table);
    headings.forEach((heading, at) => heading.querySelector("button").addEventListener("click", () => {
      const now = heading.getAttribute("aria-sort"), first = heading.dataset.first;
      const next = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      headings.forEach(h => h.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1, body = table.tBodies[0];
      const rows = [...body.rows].map(row => [value(row.cells[at]), row]);
      rows.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : sign * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    }));
  }
  for (const chooser of all(".choose")) {
    const style = document.getElementById(chooser.dataset.style), table = chooser.dataset.table;
    chooser.addEventListener("change", () => {
      const off = all("input", chooser).filter(box => !box.checked).map(box => `#${table} tr > :nth-child(${box.value})`);
      style.textContent = off.length ? off.join(",") + "{display:none}" : "";
    });
  }

  // Charts: the first ones are drawn at once, further ones when they come near, all again when a chooser or the theme changes.
  const drawn = new Set();
  let printing = false;
  const themed = (data, layout) => {
    const ink = css("--soft"), line = css("--line");
    layout.font = { ...layout.font, color: ink, family: getComputedStyle(document.body).fontFamily };
    for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis] ??= {}, { gridcolor: line, linecolor: line, tickcolor: line });
    layout.hoverlabel = { bgcolor: css("--pane"), bordercolor: line, font: { color: css("--ink") } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: css("--ink") };
    return [data, layout];
  };
  const draw = box => {
    drawn.add(box);
    const chart = box.chart ??= JSON.parse(document.getElementById(box.dataset.chart).textContent);
    const group = box.closest(".chooser-group");
    const picked = Object.entries(chart.choices).map(([axis, options]) => {
      const select = box.closest("figure").querySelector(`select[data-axis=${axis}]`) ?? group?.querySelector(`:scope > .controls select[data-axis=${axis}]`);
      return !select ? Object.keys(options)[0] : select.value in options ? select.value : null;
    });
    if (picked.includes(null)) { window.Plotly.purge(box); box.textContent = "No values of this score."; return; }
    if (!box.classList.contains("js-plotly-plot")) box.textContent = "";
    const options = Object.values(chart.choices).map((o, i) => o[picked[i]]);
    const data = chart.figure.data.map((trace, i) => Object.assign({}, trace, ...options.map(o => o.traces[i])));
    const layout = structuredClone(chart.figure.layout);
    for (const option of options) for (const [axis, own] of Object.entries(option.axes)) layout[axis] = { ...layout[axis], ...own };
    const off = group?.off;
    if (off) for (const trace of data) if (off.has(trace.name)) trace.visible = false;
    for (const front of chart.fronts[picked.join("|")] ?? [])
      data.unshift({ type: "scatter", mode: "lines", hoverinfo: "skip", line: { shape: "hv", width: 7, color: "rgba(133,139,149,.35)" }, ...front });
    if (printing) { layout.width = Math.min(box.clientWidth, box.dataset.wide ? 690 : 335); layout.autosize = false; }
    window.Plotly.react(box, ...themed(data, layout), { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  };
  const charts = all(".chart");
  for (const select of all("select[data-axis]")) select.addEventListener("change", () => {
    const own = select.closest("figure") ?? select.closest(".chooser-group");
    all(".chart", own).filter(box => drawn.has(box)).forEach(draw);
  });
  for (const group of all(".chooser-group")) {
    group.off = new Set();
    for (const button of all(".legend button", group)) button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!off));
      group.off[off ? "add" : "delete"](button.dataset.trace);
      all(".chart", group).filter(box => drawn.has(box)).forEach(draw);
    });
  }
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  charts.slice(20).forEach(box => near.observe(box));
  charts.slice(0, 20).forEach((box, i) => setTimeout(draw, 30 * i, box));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  const print = on => { printing = on; (on ? charts : [...drawn]).forEach(draw); };
  matchMedia("print").addEventListener("change", event => print(event.matches));

  // Pictures: a click or Enter opens one; arrows move over noise and rows; Esc closes.
  const dialog = document.getElementById("picture"), canvas = dialog.querySelector("canvas"), told = dialog.querySelector("p");
  let from = null, shown = null;
  const strips = () => all(".strip", from.closest(".grid"));
  const open = (strip, at) => {
    shown = [strip, at];
    const { w, h, label } = strip.dataset, width = Number(w), height = Number(h), image = strip.querySelector("img");
    const room = Math.min(innerWidth * 0.9 - 34, (innerHeight * 0.82 - 110) * width / height);
    const scale = Math.max(1, Math.min(Math.floor(room / width), Math.max(8, Math.floor(384 / width))));
    canvas.width = width * scale; canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, at * width, 0, width, height, 0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", `${label}, noise ${at + 1}`);
    told.textContent = `${label}, noise ${at + 1}, ${width} × ${height} pixels, ${scale} times`;
    if (!dialog.open) dialog.showModal();
  };
  const move = (across, down) => {
    const rows = strips(), row = rows[(rows.indexOf(shown[0]) + down + rows.length) % rows.length], count = Number(row.dataset.n);
    open(row, (shown[1] + across + count) % count);
  };
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const strip of all(".strip")) {
    const cells = strip.querySelector(".cells"), count = Number(strip.dataset.n);
    cells.style.gridTemplateColumns = `repeat(${count}, 1fr)`;
    for (let at = 0; at < count; at++) {
      const button = document.createElement("button");
      button.type = "button"; button.tabIndex = at ? -1 : 0;
      button.setAttribute("aria-label", `enlarge ${strip.dataset.label}, noise ${at + 1}`);
      cells.append(button);
    }
    cells.addEventListener("click", event => {
      const at = [...cells.children].indexOf(event.target.closest("button"));
      if (at >= 0) { from = event.target; open(strip, at); }
    });
    cells.addEventListener("keydown", event => {
      const step = arrows[event.key];
      if (!step) return;
      event.preventDefault();
      const rows = all(".strip", strip.closest(".grid")), row = rows[rows.indexOf(strip) + step[1]] ?? strip;
      row.querySelector(".cells").children[[...cells.children].indexOf(event.target) + step[0]]?.focus();
    });
  }
  dialog.addEventListener("keydown", event => {
    const step = arrows[event.key];
    if (step) { event.preventDefault(); move(...step); }
  });
  for (const button of all("button[data-move]", dialog)) button.addEventListener("click", () => move(...arrows[button.dataset.move]));
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => from?.focus());
})();
