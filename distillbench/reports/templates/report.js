"use strict";
(() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Charts: the first ones are drawn at once, further ones when they come near, all again when a chooser, the size or the theme changes.
  const drawn = new Set();
  let printing = false;
  const inked = value => value === "#000000" ? css("--ink") : value;
  const themed = (data, layout) => {
    const ink = css("--soft"), line = css("--line");
    layout.font = { ...layout.font, color: ink, family: getComputedStyle(document.body).fontFamily };
    for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis] ??= {}, { gridcolor: line, linecolor: line, tickcolor: line });
    layout.hoverlabel = { bgcolor: css("--pane"), bordercolor: line, font: { color: css("--ink") } };
    for (const trace of data) {
      if (trace.line?.color) trace.line = { ...trace.line, color: inked(trace.line.color) };
      if (trace.fillcolor) trace.fillcolor = inked(trace.fillcolor);
      const colour = trace.marker?.color;
      if (colour) trace.marker = { ...trace.marker, color: Array.isArray(colour) ? colour.map(inked) : inked(colour) };
      if (trace.type === "bar") trace.textfont = { color: css("--ink") };
      if (trace.error_y) trace.error_y = { ...trace.error_y, color: trace.marker.color };
    }
    return [data, layout];
  };
  // Texts beside points, where there is room: names of emphasised series first. A text without room is left out.
  const pen = document.createElement("canvas").getContext("2d");
  const PLACES = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
  const place = (box, chart, data, first, over) => {
    const layout = box._fullLayout, { xaxis, yaxis } = layout, room = [], found = [];
    const width = xaxis._length, height = yaxis._length;
    const at = (trace, i) => {
      const x = trace.x?.[i], y = trace.y?.[i];
      return typeof x !== "number" || typeof y !== "number" ? null : [xaxis.d2p(x), yaxis.d2p(y)];
    };
    data.slice(first).forEach(trace => {
      if (trace.visible === false || trace.mode === "none" || trace.mode === "lines") return;
      trace.y?.forEach((_, i) => { const p = at(trace, i); if (p) room.push([p[0] - 5, p[1] - 5, p[0] + 5, p[1] + 5]); });
    });
    const hits = ([a, b, c, d]) => a < 0 || b < 0 || c > width || d > height || room.some(([p, q, r, s]) => a < r && c > p && b < s && d > q);
    const wanted = chart.labels.filter(label => !label.small || over !== "nfe").sort((a, b) => b.strong - a.strong || (a.small ?? false) - (b.small ?? false));
    for (const label of wanted) {
      const trace = data[first + label.trace], p = trace && trace.visible !== false ? at(trace, label.point) : null;
      if (!p || p[0] < -1 || p[0] > width + 1 || p[1] < -1 || p[1] > height + 1) continue;
      const size = label.small ? 9.5 : 11;
      pen.font = `${label.strong ? "600 " : ""}${size}px ${layout.font.family}`;
      const plain = label.text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
      const w = pen.measureText(plain).width + 2, h = size + 1;
      let spot = null;
      for (const far of label.small ? [8] : [9, 18, 30, 44]) {
        for (const [u, v] of label.line ? [[-1, -1], [-1, 1]] : PLACES) {
          const x = p[0] + u * (far + w / 2), y = p[1] + v * (far + h / 2);
          if (!hits([x - w / 2, y - h / 2, x + w / 2, y + h / 2])) { spot = [x, y, far]; break; }
        }
        if (spot) break;
      }
      if (!spot) continue;
      room.push([spot[0] - w / 2, spot[1] - h / 2, spot[0] + w / 2, spot[1] + h / 2]);
      const log = axis => axis.type === "log" ? Math.log10 : value => value;
      found.push({
        x: log(xaxis)(trace.x[label.point]), y: log(yaxis)(trace.y[label.point]), text: label.text, borderpad: 0, captureevents: false,
        ...(spot[2] > 10 ? { showarrow: true, arrowhead: 0, arrowwidth: 0.7, arrowcolor: css("--soft"), standoff: 5, ax: spot[0] - p[0], ay: spot[1] - p[1] }
          : { showarrow: false, xshift: spot[0] - p[0], yshift: p[1] - spot[1] }),
        font: { size, color: label.strong ? css("--ink") : css("--soft"), weight: label.strong ? 600 : 400 },
      });
    }
    return found;
  };
  const draw = async box => {
    drawn.add(box);
    const chart = box.chart ??= JSON.parse(document.getElementById(box.dataset.chart).textContent);
    const group = box.closest(".chooser-group");
    const picked = Object.entries(chart.choices).map(([axis, options]) => {
      const select = box.closest("figure").querySelector(`select[data-axis=${axis}]`);
      return select && select.value in options ? select.value : Object.keys(options)[0];
    });
    const options = Object.values(chart.choices).map((o, i) => o[picked[i]]);
    const data = chart.figure.data.map((trace, i) => Object.assign({}, trace, ...options.map(o => o.traces[i])));
    const layout = structuredClone(chart.figure.layout);
    for (const option of options) for (const [axis, own] of Object.entries(option.axes)) layout[axis] = { ...layout[axis], ...own };
    const off = group?.off;
    if (off) for (const trace of data) if (off.has(trace.name)) trace.visible = false;
    const front = chart.fronts[picked[0]];
    if (front) data.unshift({ type: "scatter", mode: "lines", hoverinfo: "skip", line: { shape: "hv", width: 7, color: "rgba(133,139,149,.3)" }, ...front });
    if (printing) { layout.width = Math.min(box.clientWidth, 335); layout.autosize = false; }
    const config = { displayModeBar: false, doubleClick: false, plotlyServerURL: "" };
    await window.Plotly.react(box, ...themed(data, layout), config);
    if (chart.labels.length) await window.Plotly.relayout(box, { annotations: place(box, chart, data, front ? 1 : 0, picked[0]) });
  };
  const charts = all(".chart");
  for (const select of all("select[data-axis]")) select.addEventListener("change", () => {
    all(".chart", select.closest("figure")).filter(box => drawn.has(box)).forEach(draw);
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
  let wide = innerWidth, soon;
  addEventListener("resize", () => {
    if (innerWidth === wide || printing) return;
    wide = innerWidth; clearTimeout(soon); soon = setTimeout(() => drawn.forEach(draw), 120);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  const print = on => { printing = on; (on ? charts : [...drawn]).forEach(draw); };
  matchMedia("print").addEventListener("change", event => print(event.matches));

  // Pictures: a click or Enter opens one beside the teacher's; arrows move over noise and rows; Esc closes.
  const dialog = document.getElementById("picture"), told = dialog.querySelector("p");
  const [own, teachers, apart] = all("canvas", dialog);
  let from = null, shown = null;
  const strips = () => all(".strip", from.closest(".grid"));
  const sizes = strip => [Number(strip.dataset.w), Number(strip.dataset.h)];
  const pixels = (strip, at) => {
    const [w, h] = sizes(strip), canvas = new OffscreenCanvas(w, h), pen = canvas.getContext("2d");
    pen.drawImage(strip.querySelector("img"), at * w, 0, w, h, 0, 0, w, h);
    return pen.getImageData(0, 0, w, h);
  };
  const difference = (strip, reference, at) => {
    const a = pixels(strip, at), b = pixels(reference, at);
    for (let i = 0; i < a.data.length; i++) if (i % 4 < 3) a.data[i] = Math.abs(a.data[i] - b.data[i]);
    return a;
  };
  const enlarge = (canvas, image, scale) => {
    const small = new OffscreenCanvas(image.width, image.height);
    small.getContext("2d").putImageData(image, 0, 0);
    canvas.width = image.width * scale; canvas.height = image.height * scale;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  };
  const comparable = (strip, reference, at) => reference && reference !== strip && at < Number(reference.dataset.n) && String(sizes(strip)) === String(sizes(reference));
  const open = (strip, at) => {
    shown = [strip, at];
    const label = strip.dataset.label, [width, height] = sizes(strip);
    const reference = strip.closest(".grid").querySelector(".strip.ref"), both = comparable(strip, reference, at);
    const across = both && innerWidth > 700 ? 3 : 1;
    const room = Math.min((innerWidth * 0.9 - 50) / across, (innerHeight * 0.82 - 130) * width / height / (both && across === 1 ? 3 : 1));
    const scale = Math.max(1, Math.min(Math.floor(room / width), Math.max(8, Math.floor(384 / width))));
    const texts = [label, both ? reference.dataset.label : "", both ? "difference (black: none)" : ""];
    enlarge(own, pixels(strip, at), scale);
    if (both) { enlarge(teachers, pixels(reference, at), scale); enlarge(apart, difference(strip, reference, at), scale); }
    [own, teachers, apart].forEach((canvas, i) => {
      canvas.closest("figure").hidden = !texts[i];
      canvas.setAttribute("aria-label", `${texts[i]}, noise ${at + 1}`);
      canvas.nextElementSibling.textContent = texts[i];
    });
    told.textContent = `${label}, noise ${at + 1}, ${width} × ${height} pixels, ${scale} times`;
    if (!dialog.open) dialog.showModal();
  };
  for (const box of all("input[data-difference]")) box.addEventListener("change", () => {
    const grid = box.closest("section").querySelector(".grid .cells")?.closest("section");
    for (const strip of all(".grid", grid).at(-1).querySelectorAll(".strip")) {
      strip.querySelector("canvas")?.remove();
      const reference = strip.closest(".grid").querySelector(".strip.ref"), [w, h] = sizes(strip), count = Number(strip.dataset.n);
      if (!box.checked || !comparable(strip, reference, 0)) continue;
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      canvas.width = w * count; canvas.height = h;
      for (let at = 0; at < count && comparable(strip, reference, at); at++) pen.putImageData(difference(strip, reference, at), at * w, 0);
      strip.append(canvas);
    }
  });
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
      button.type = "button"; button.tabIndex = at || strip !== strip.closest(".grid").querySelector(".strip") ? -1 : 0;
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
