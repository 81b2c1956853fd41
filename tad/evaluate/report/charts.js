// Small charts in SVG, drawn again when their width changes. Colours are variables of the page, so themes need nothing.
const KEYS = 8;
const colour = index => `var(--k${index % KEYS})`;
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const dash = index => DASHES[Math.floor(index / KEYS) % DASHES.length];

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

function tip(text, event) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  if (box.textContent !== text) box.textContent = text;
  const left = event.clientX + 14 + box.offsetWidth > innerWidth ? event.clientX - 10 - box.offsetWidth : event.clientX + 14;
  const top = event.clientY + 14 + box.offsetHeight > innerHeight ? event.clientY - 10 - box.offsetHeight : event.clientY + 14;
  box.style.left = Math.max(2, left) + "px";
  box.style.top = Math.max(2, top) + "px";
}
const hover = text => ({ onpointermove: event => tip(text, event), onpointerleave: () => tip("") });

// draw(width) returns an <svg>; it is called for every new width.
function chart(draw, label) {
  const box = element("div", { class: "chart", role: "img", "aria-label": label });
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.round(box.clientWidth);
    if (now && now !== width) { width = now; box.replaceChildren(draw(now)); }
  }).observe(box);
  box.redraw = () => { if (width) box.replaceChildren(draw(width)); };
  return box;
}

function keys(names, lined = false) {
  return element("div", { class: "keys" }, ...names.map(([name, paint]) =>
    element("span", {}, element("i", { class: lined ? "lined" : null, style: lined ? `border-color:${paint}` : `background:${paint}` }), name)));
}

function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted), base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * base).find(value => value >= raw * 0.999) || 10 * base;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(+(k * step).toPrecision(12));
  return found;
}

// Lines over a common axis. series: {name, x, y, paint, width, dash, dots, step, joined, quiet}.
// step: a value holds from the point before it; joined: over gaps; quiet: not named under the pointer.
function lines({ series, x, y, height = 230, label }) {
  return chart(width => {
    const box = { left: 42, right: width - 8, top: 10, bottom: height - 34 };
    const toX = value => box.left + (value - x.low) / ((x.high - x.low) || 1) * (box.right - box.left);
    const toY = value => box.bottom - (value - y.low) / ((y.high - y.low) || 1) * (box.bottom - box.top);
    const root = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
    for (const value of y.ticks || ticks(y.low, y.high, 5)) {
      root.append(svg("line", { x1: box.left, x2: box.right, y1: toY(value), y2: toY(value), class: "gridline" }),
        svg("text", { x: box.left - 6, y: toY(value) + 4, "text-anchor": "end" }, y.format(value)));
    }
    for (const value of x.ticks || ticks(x.low, x.high, Math.min(8, width / 60)))
      root.append(svg("text", { x: toX(value), y: box.bottom + 15, "text-anchor": "middle" }, x.format(value)));
    root.append(svg("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }),
      svg("text", { x: (box.left + box.right) / 2, y: height - 3, "text-anchor": "middle" }, x.name),
      svg("text", { x: 11, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${(box.top + box.bottom) / 2})` }, y.name));
    for (const one of series) {
      let path = "", pen = false;
      one.x.forEach((value, i) => {
        if (one.y[i] === null || one.y[i] === undefined) { pen = pen && one.joined; return; }
        if (pen && one.step) path += `V${toY(one.y[i]).toFixed(1)}`;
        path += `${pen ? "L" : "M"}${toX(value).toFixed(1)} ${toY(one.y[i]).toFixed(1)}`;
        pen = true;
      });
      root.append(svg("path", { d: path, fill: "none", stroke: one.paint, "stroke-width": one.width || 2, "stroke-dasharray": one.dash || null,
        "stroke-opacity": one.opacity || 1, "stroke-linejoin": "round" }));
      if (one.dots) one.x.forEach((value, i) => {
        if (one.y[i] !== null && one.y[i] !== undefined) root.append(svg("circle", { cx: toX(value), cy: toY(one.y[i]), r: 3, fill: one.paint }));
      });
    }
    const named = series.filter(one => !one.quiet && one.x.length), cross = svg("line", { y1: box.top, y2: box.bottom, class: "axis", visibility: "hidden" });
    root.append(cross, svg("rect", { x: box.left, y: box.top, width: Math.max(0, box.right - box.left), height: box.bottom - box.top, fill: "transparent",
      onpointermove: event => {
        const at = x.low + (event.clientX - root.getBoundingClientRect().left - box.left) / (box.right - box.left) * (x.high - x.low);
        const near = one => one.x.reduce((best, value, i) => Math.abs(value - at) < Math.abs(one.x[best] - at) ? i : best, 0);
        const rows = named.map(one => { const i = near(one); return [one, i]; }).filter(([one, i]) => one.y[i] !== null && one.y[i] !== undefined);
        if (!rows.length) return;
        const [first, i] = rows[0];
        cross.setAttribute("x1", toX(first.x[i])); cross.setAttribute("x2", toX(first.x[i])); cross.setAttribute("visibility", "visible");
        tip([`${x.name} ${x.format(first.x[i])}`, ...rows.slice(0, 12).map(([one, k]) => `${one.name}: ${y.format(one.y[k], 1)}`)].join("\n"), event);
      },
      onpointerleave: () => { tip(""); cross.setAttribute("visibility", "hidden"); } }));
    return root;
  }, label);
}

// Vertical bars, each a stack. bars: {name, parts: [{name, value, paint}], text, note}
function bars({ bars, high, name = "", height = 190, line = null, format = value => percent(value, 0), label, left = 42, axisName = "" }) {
  return chart(width => {
    const box = { left, right: width - 6, top: 14, bottom: height - (axisName ? 34 : 20) };
    const toY = value => box.bottom - value / (high || 1) * (box.bottom - box.top);
    const root = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
    for (const value of ticks(0, high, 4))
      root.append(svg("line", { x1: box.left, x2: box.right, y1: toY(value), y2: toY(value), class: "gridline" }),
        svg("text", { x: box.left - 5, y: toY(value) + 4, "text-anchor": "end" }, format(value)));
    if (name) root.append(svg("text", { x: 11, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${(box.top + box.bottom) / 2})` }, name));
    if (axisName) root.append(svg("text", { x: (box.left + box.right) / 2, y: height - 3, "text-anchor": "middle" }, axisName));
    const slot = (box.right - box.left) / Math.max(1, bars.length), thick = Math.min(46, slot * 0.72);
    bars.forEach((bar, k) => {
      const middle = box.left + (k + 0.5) * slot;
      let sum = 0;
      for (const part of bar.parts) {
        const value = part.value || 0;
        const top = toY(sum + value), tall = toY(sum) - top;
        sum += value;
        if (tall > 0) root.append(svg("rect", { x: middle - thick / 2, y: top, width: thick, height: Math.max(0.5, tall - (bar.parts.length > 1 ? 0.6 : 0)), fill: part.paint, "fill-opacity": part.opacity || 1, ...hover(`${bar.note || bar.name}\n${part.name}: ${part.text || percent(value)}`) }));
      }
      if (bar.text) root.append(svg("text", { x: middle, y: toY(sum) - 4, "text-anchor": "middle", class: "strong" }, bar.text));
      root.append(svg("text", { x: middle, y: box.bottom + 14, "text-anchor": "middle" }, bar.name));
    });
    root.append(svg("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }));
    if (line !== null) root.append(svg("line", { x1: box.left, x2: box.right, y1: toY(line), y2: toY(line), stroke: "var(--ink)", "stroke-dasharray": "4 3", "stroke-opacity": 0.7 }));
    return root;
  }, label);
}

// Horizontal bars with their names on the left. rows: {name, value, paint, text}
function rowsChart({ rows, low = 0, high, label, names = 120 }) {
  const step = 26, height = rows.length * step + 6;
  return chart(width => {
    const box = { left: names, right: width - 54 };
    const toX = value => box.left + (value - low) / ((high - low) || 1) * (box.right - box.left);
    const root = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
    rows.forEach((row, k) => {
      const y = k * step + 4, from = Math.min(toX(0), toX(row.value || 0)), to = Math.max(toX(0), toX(row.value || 0));
      root.append(svg("text", { x: box.left - 8, y: y + 13, "text-anchor": "end" }, row.name),
        svg("rect", { x: from, y, width: Math.max(1, to - from), height: step - 8, fill: row.paint, rx: 1.5, ...hover(`${row.name}: ${row.text}`) }),
        svg("text", { x: to + 6, y: y + 13, class: "strong" }, row.text));
    });
    root.append(svg("line", { x1: toX(0), x2: toX(0), y1: 0, y2: height, class: "axis" }));
    return root;
  }, label);
}

// A matrix of counts on a canvas: rows are truth, columns predictions; each row is shaded by its share.
function matrixChart(names, matrix, label) {
  const box = element("div", { class: "chart" }), canvas = element("canvas", { role: "img", "aria-label": label });
  box.append(canvas);
  const n = names.length, sums = matrix.map(row => row.reduce((sum, value) => sum + (value || 0), 0));
  let cell = 1, gutter = 0, head = 0;
  const draw = () => {
    const width = Math.round(box.clientWidth);
    if (!width) return;
    const style = getComputedStyle(document.documentElement), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    const named = n <= 40;
    context.font = "11px system-ui, sans-serif";
    gutter = named ? Math.min(150, 8 + Math.max(...names.map(name => context.measureText(name).width))) : 12;
    head = named ? Math.min(110, gutter) : 12;
    cell = Math.max(1.5, Math.min(34, (width - gutter - 4) / n));
    const height = head + cell * n + 4;
    Object.assign(canvas.style, { width: width + "px", height: height + "px" });
    canvas.width = width * ratio; canvas.height = height * ratio;
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const faint = style.getPropertyValue("--faint"), ink = style.getPropertyValue("--ink"), shade = style.getPropertyValue("--shade");
    matrix.forEach((row, i) => row.forEach((value, j) => {
      if (!value) return;
      const share = value / (sums[i] || 1);
      context.fillStyle = `rgba(${shade}, ${0.06 + 0.9 * share})`;
      context.fillRect(gutter + j * cell, head + i * cell, cell - (cell > 6 ? 1 : 0), cell - (cell > 6 ? 1 : 0));
      if (cell >= 24) {
        context.fillStyle = share > 0.55 ? style.getPropertyValue("--panel") : ink;
        context.textAlign = "center";
        context.fillText(value > 9999 ? Math.round(value / 1000) + "k" : value, gutter + (j + 0.5) * cell, head + (i + 0.5) * cell, cell - 3);
      }
    }));
    context.fillStyle = faint;
    if (named) names.forEach((name, k) => {
      context.textAlign = "right";
      context.fillText(clipped(context, name, gutter - 8), gutter - 5, head + (k + 0.5) * cell);
      context.save();
      context.translate(gutter + (k + 0.5) * cell, head - 5);
      context.rotate(-Math.PI / (cell > 40 ? 6 : 2));
      context.textAlign = "left";
      context.fillText(clipped(context, name, head - 8), 0, 0);
      context.restore();
    });
    context.strokeStyle = style.getPropertyValue("--line");
    context.strokeRect(gutter - 0.5, head - 0.5, cell * n, cell * n);
  };
  canvas.addEventListener("pointermove", event => {
    const edge = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - edge.left - gutter) / cell), i = Math.floor((event.clientY - edge.top - head) / cell);
    if (i < 0 || j < 0 || i >= n || j >= n) return tip("");
    tip(`true: ${names[i]}\npredicted: ${names[j]}\n${thousands(matrix[i][j] || 0)} (${percent((matrix[i][j] || 0) / (sums[i] || 1))} % of the row)`, event);
  });
  canvas.addEventListener("pointerleave", () => tip(""));
  new ResizeObserver(draw).observe(box);
  box.redraw = draw;
  return box;
}

function clipped(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let low = 0, high = text.length;
  while (low < high) { const mid = (low + high + 1) >> 1; if (context.measureText(text.slice(0, mid) + "…").width <= room) low = mid; else high = mid - 1; }
  return text.slice(0, low) + "…";
}
