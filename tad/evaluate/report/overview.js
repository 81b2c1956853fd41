// The scores: tiles, curves, the table of classes, errors, training.
const repaint = []; // charts on canvas know colours only as values: drawn again when the theme changes

function card(title, about, ...content) {
  return element("section", { class: "card" }, element("h2", {}, title), about ? element("p", { class: "faint" }, about) : null, ...content);
}
const interval = pair => pair ? `${percent(pair[0])}–${percent(pair[1])}` : "";
const tile = (value, unit, name, first) => element("div", { class: first ? "tile first" : "tile" },
  element("div", { class: "value" }, value, unit ? element("span", { class: "unit" }, " " + unit) : ""), element("div", { class: "name" }, name));
const axisShare = (name, high = 1) => ({ name, low: 0, high, format: (value, digits = 0) => percent(value, digits) });

function buildOverview() {
  const root = $("overview"), scores = data.scores;
  if (data.about.length) root.append(element("div", { class: "about" }, ...data.about.map(([name, value]) => element("span", {}, name + " ", element("b", {}, value)))));
  const tiles = element("div", { class: "tiles" });
  if (scores) {
    const low = scores.tiou[0], high = scores.tiou[scores.tiou.length - 1];
    tiles.append(tile(percent(scores.average_map, 2), "%", scores.tiou.length > 1 ? `average mAP, tIoU ${low}–${high}` : "mAP", true));
    if (data.intervals) tiles.lastChild.append(element("div", { class: "name" }, `${interval(data.intervals.average_map)} in ${Math.round(100 * data.intervals.level)} % of ${thousands(data.intervals.samples)} draws of videos`));
    scores.tiou.forEach((value, i) => { if ([0.3, 0.5, 0.7, 0.75, 0.95].includes(value) && scores.tiou.length > 1) tiles.append(tile(percent(scores.map[i], 1), "%", `mAP at ${value}`)); });
  }
  if (data.recall) tiles.append(tile(percent(data.recall.auc, 1), "%", "area under AR–AN"));
  const predictions = videos.score.reduce((sum, one) => sum + one.length, 0);
  tiles.append(tile(thousands(total), "", "videos"), tile(thousands(positives), "", "true segments"), tile(thousands(predictions), "", "predictions"), tile(thousands(data.true_classes || classes.length), "", "classes"));
  root.append(tiles);
  if (data.notes.length) root.append(element("ul", { class: "notes", "aria-label": "Notes" }, ...data.notes.map(note => element("li", { class: "note" }, note))));
  const curves = element("div", { class: "grid" });
  if (scores) curves.append(card("mAP over tIoU", "how precise the ends must be", lines({
    series: [{ name: "mAP", x: scores.tiou, y: scores.map, paint: "var(--blue)", dots: true }, ...Object.entries(data.intervals ? data.intervals.map : {}).map(([value, pair]) => ({ x: [+value, +value], y: pair, paint: "var(--blue)", opacity: 0.5, quiet: true }))], label: "mAP over tIoU: " + scores.tiou.map((value, i) => `${percent(scores.map[i])} at ${value}`).join(", "),
    x: { name: "tIoU", low: scores.tiou[0], high: scores.tiou[scores.tiou.length - 1], ticks: scores.tiou.length <= 6 ? scores.tiou : null, format: value => String(+value.toFixed(2)) }, y: axisShare("mAP in %") })));
  const pr = data.curves.length ? precisionCard() : null;
  if (pr) curves.append(pr.card);
  if (data.recall) curves.append(card("Recall of proposals", `AR over their average number a video (AN): ${Object.entries(data.recall.ar).map(([number, value]) => `${percent(value)} at ${number}`).join(", ")}`, lines({
    series: [{ name: "AR", x: data.recall.number, y: data.recall.recall, paint: "var(--k2)" }], label: "Average recall over the average number of proposals",
    x: { name: "AN", low: 0, high: data.recall.number[data.recall.number.length - 1], format: value => String(+value.toFixed(1)) }, y: axisShare("AR in %") })));
  if (curves.children.length) root.append(curves);
  root.append(classCard(pr));
  if (data.diagnosis) root.append(...errorCards(data.diagnosis));
  if (data.training) root.append(...trainingCards(data.training));
  const below = element("div", { class: "grid" });
  if (scores) below.append(countsCard(scores.counts));
  if (data.recipe) below.append(element("section", { class: "card" }, element("details", {}, element("summary", {}, "Recipe of the run"), element("pre", {}, data.recipe))));
  root.append(below);
}

function precisionCard() {
  let chosen = null;
  const grid = Array.from({ length: 101 }, (_, k) => k / 100);
  const sums = grid.map(() => 0);
  for (const [, recall, precision] of data.curves) { // mean of the envelopes, as average precision sees them
    let best = 0, at = recall.length - 1;
    for (let k = 100; k >= 0; k--) {
      while (at >= 0 && recall[at] >= grid[k] - 1e-9) best = Math.max(best, precision[at--]);
      sums[k] += best;
    }
  }
  const mean = { name: "mean over classes", x: grid, y: sums.map(sum => sum / data.curves.length), paint: "var(--ink)", width: 2.2, step: true };
  const holder = element("div"), about = element("p", { class: "faint" });
  const draw = () => {
    const few = data.curves.length <= KEYS;
    const series = data.curves.map(([label, recall, precision], i) => ({ name: label, x: recall, y: precision, step: true, paint: few ? colour(i) : "var(--faint)", width: label === chosen ? 2.6 : few && chosen === null ? 1.3 : 0.8, opacity: chosen === null ? (few ? 0.9 : 0.35) : label === chosen ? 1 : 0.22, quiet: label !== chosen }));
    const front = series.find(one => one.name === chosen);
    if (front && !few) front.paint = "var(--orange)";
    holder.replaceChildren(lines({ series: [mean, ...series.filter(one => one !== front), ...(front ? [front] : [])], label: `Precision over recall at tIoU ${data.tiou}`,
      x: { name: "recall in %", low: 0, high: 1, format: value => percent(value, 0) }, y: axisShare("precision in %") }), ...(few ? [keys(series.map(one => [one.name, one.paint]), true)] : []));
    about.textContent = chosen === null ? `at tIoU ${data.tiou}; choose a class in the table below` : `at tIoU ${data.tiou}: ${chosen}`;
  };
  draw();
  return { card: element("section", { class: "card" }, element("h2", {}, "Precision over recall"), about, holder), choose: label => { chosen = chosen === label ? null : label; draw(); return chosen; } };
}

function classCard(pr) {
  const truths = new Array(classes.length).fill(0), found = new Array(classes.length).fill(0);
  for (const flat of videos.truth) for (let j = 2; j < flat.length; j += STEP) truths[flat[j]]++;
  for (const flat of videos.predicted) for (let i = 2; i < flat.length; i += STEP) found[flat[i]]++;
  const scores = data.scores, ap = new Map(scores ? scores.ap : []), levels = scores ? scores.tiou : [];
  const mean = values => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  const rows = classes.map((label, k) => ({ k, label, cells: [truths[k], found[k], ...(ap.has(label) ? ap.get(label) : levels.map(() => null)), ...(levels.length ? [ap.has(label) ? mean(ap.get(label)) : null] : [])] }));
  const names = ["class", "true", "predicted", ...levels.map(value => `AP ${value}`), ...(levels.length ? ["average"] : [])];
  const body = element("tbody"), heads = names.map((name, column) => element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sort(column) }, name)));
  let order = [0, 1];
  const cell = (value, column) => column < 2 ? element("td", {}, thousands(value)) : element("td", { style: value === null ? null : `background:rgba(var(--shade), ${(0.42 * value).toFixed(3)})` }, percent(value));
  const all = scores ? element("tr", { class: "all" }, element("td", {}, "all"), element("td", {}, thousands(positives)), element("td", {}, thousands(found.reduce((sum, value) => sum + value, 0))), ...[...scores.map, scores.average_map].map(value => element("td", {}, percent(value)))) : null;
  const lined = rows.map(row => {
    const line = element("tr", {}, element("td", {}, element("button", { class: "link", type: "button", title: `Videos with ${row.label}`, onclick: event => { event.stopPropagation(); showClass(row.k); } }, row.label)), ...row.cells.map(cell));
    if (pr && ap.has(row.label)) line.addEventListener("click", () => { const now = pr.choose(row.label); lined.forEach((other, k) => other.classList.toggle("chosen", rows[k].label === now)); });
    return line;
  });
  const show = () => {
    const [column, sign] = order;
    const value = row => column ? row.cells[column - 1] : row.label;
    const compare = (a, b) => { const x = value(a), y = value(b); return x === null ? 1 : y === null ? -1 : (x < y ? -1 : x > y ? 1 : 0) * sign; };
    body.replaceChildren(...(all ? [all] : []), ...[...rows].sort(compare).map(row => lined[row.k]));
    heads.forEach((head, k) => { if (k === column) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending"); else head.removeAttribute("aria-sort"); });
  };
  const sort = column => { order = order[0] === column ? [column, -order[1]] : [column, column ? -1 : 1]; show(); };
  show();
  return card(scores ? "Average precision by class" : "Classes", pr ? "a row shows its precision over recall; a name its videos" : "a name shows its videos",
    element("div", { class: "scroll table", tabindex: 0, role: "region", "aria-label": "Classes" }, element("table", { id: "classes" }, element("thead", {}, element("tr", {}, ...heads)), body)));
}

const KINDS = ["true_positive", "double_detection", "wrong_label", "localization", "confusion", "background"];
const KIND_PAINT = { true_positive: "var(--k0)", double_detection: "var(--k5)", wrong_label: "var(--k3)", localization: "var(--k1)", confusion: "var(--k4)", background: "var(--k7)" };
const KIND_MEANING = { true_positive: "right", double_detection: "segment was found before", wrong_label: "right place, wrong class", localization: "right class, ends too far off", confusion: "wrong class, ends too far off", background: "nothing there" };

function errorCards(diagnosis) {
  const found = [], falses = diagnosis.false_positives, grid = element("div", { class: "grid" });
  if (falses && falses.by_limit && falses.by_limit.length) grid.append(card("What predictions are", `by rank: 1G are the best G of each class, G being the number of its true segments, 2G the next G; tIoU ${diagnosis.tiou}`,
    bars({ bars: falses.by_limit.map(row => ({ name: row.g + "G", parts: KINDS.map(kind => ({ name: words(kind), value: row[kind], paint: KIND_PAINT[kind] })) })), high: 1, name: "predictions in %", height: 250, label: "Kinds of predictions by how many are taken" }),
    keys(KINDS.map(kind => [`${words(kind)} (${KIND_MEANING[kind]})`, KIND_PAINT[kind]]))));
  if (falses && falses.gain) {
    const rows = Object.entries(falses.gain).map(([kind, value]) => ({ name: words(kind), value, paint: KIND_PAINT[kind] || "var(--k7)", text: (value >= 0 ? "+" : "−") + percent(Math.abs(value || 0)) }));
    rows.sort((a, b) => b.value - a.value);
    grid.append(card("What each kind of error costs", `normalised mAP gained without the predictions of this kind, in points, at tIoU ${diagnosis.tiou}`, rowsChart({ rows, low: Math.min(0, ...rows.map(row => row.value)), high: Math.max(1e-6, ...rows.map(row => row.value)), label: "Gain of mAP by kind of error" })));
  }
  if (grid.children.length) found.push(element("h2", { class: "part" }, "Errors"), grid);
  const sensitivity = diagnosis.sensitivity || {}, missed = diagnosis.false_negatives || {};
  const panel = (name, buckets, value, line, paint) => {
    const high = Math.max(0.05, line || 0, ...buckets.map(bucket => bucket[value] || 0)) * 1.15;
    return element("div", {}, element("h3", {}, words(name)), bars({ bars: buckets.map(bucket => ({ name: bucket.bucket, note: `${words(name)} ${bucket.bucket}: ${thousands(bucket.count || 0)} segments`, parts: [{ name: value === "ap" ? "mAP" : "missed", value: bucket[value], paint }], text: bucket[value] === null || bucket[value] === undefined ? "–" : percent(bucket[value], 0) })), high, height: 132, line, left: 28, label: `${words(name)}: ${buckets.map(bucket => `${bucket.bucket} ${percent(bucket[value])}`).join(", ")}` }));
  };
  const sensitive = Object.entries(sensitivity).filter(([, buckets]) => Array.isArray(buckets));
  if (sensitive.length) found.push(card("Sensitivity", `normalised mAP in % on the true segments of each kind; dashed: on all, ${percent(sensitivity.overall)}`, element("div", { class: "panels" }, ...sensitive.map(([name, buckets]) => panel(name, buckets, "ap", sensitivity.overall, "var(--k0)")))));
  const lacking = Object.entries(missed).filter(([, buckets]) => Array.isArray(buckets));
  if (lacking.length) found.push(card("Missed segments", `share of the true segments of each kind that no prediction of a useful rank finds, in %${diagnosis.missed === undefined || diagnosis.missed === null ? "" : `; of all, ${percent(diagnosis.missed)}`}`, element("div", { class: "panels" }, ...lacking.map(([name, buckets]) => panel(name, buckets, "share", diagnosis.missed ?? null, "var(--k4)")))));
  const confusion = diagnosis.confusion;
  if (confusion && confusion.matrix && confusion.matrix.length) {
    const chart = matrixChart(confusion.classes, confusion.matrix, `Confusion of ${confusion.classes.length} classes`);
    repaint.push(chart);
    found.push(card("Confusion", `rows: true segments, columns: what overlaps them best (tIoU ≥ ${diagnosis.tiou}), last row: predictions on no true segment; shaded by the share of a row`, element("div", { class: "split" }, chart, confused(confusion))));
  }
  return found;
}

// The most frequent mistakes between classes, in words: a large matrix is hard to read.
function confused({ classes: names, matrix }) {
  const pairs = [], none = names.indexOf("background");
  matrix.forEach((row, i) => row.forEach((value, j) => { if (value && i !== j && i !== none && j !== none) pairs.push([value, i, j]); }));
  pairs.sort((a, b) => b[0] - a[0]);
  if (!pairs.length) return element("div", {}, element("h3", {}, "No class is taken for another"));
  const sums = matrix.map(row => row.reduce((sum, value) => sum + (value || 0), 0));
  return element("div", {}, element("h3", {}, "Taken for another class"), element("table", { class: "counts" }, element("tbody", {}, ...pairs.slice(0, 12).map(([value, i, j]) =>
    element("tr", {}, element("td", {}, `${names[i]} → ${names[j]}`), element("td", {}, thousands(value)), element("td", { class: "faint" }, `${percent(value / sums[i], 0)} %`))))));
}

function trainingCards(training) {
  const columns = Object.keys(training), epochs = training.epoch || training[columns[0]].map((_, k) => k + 1);
  const known = name => training[name].some(value => value !== null);
  const group = (test, title, y) => {
    const names = columns.filter(name => test(name) && known(name));
    if (!names.length) return null;
    const values = names.flatMap(name => training[name]).filter(value => value !== null);
    const low = y.share ? 0 : Math.min(0, ...values), high = y.share ? Math.max(0.05, ...values) : Math.max(...values);
    const series = names.map((name, k) => ({ name: words(name), x: epochs, y: training[name], paint: colour(k), dash: dash(k), dots: epochs.length <= 12, joined: true, width: k ? 1.5 : 2.2 }));
    return element("section", { class: "card" }, element("h2", {}, title), lines({ series, label: title, height: 210, x: { name: "epoch", low: epochs[0], high: epochs[epochs.length - 1], format: value => String(value) },
      y: { name: y.name, low, high: high > low ? high : low + 1, format: (value, digits) => y.share ? percent(value, digits || 0) : short(value) } }), names.length > 1 ? keys(series.map(one => [one.name, one.paint]), true) : null);
  };
  const cards = [group(name => name.startsWith("loss"), "Loss", { name: "loss" }), group(name => name === "average_map" || name.startsWith("map_"), "mAP on held-out videos", { name: "mAP in %", share: true }), group(name => name === "lr", "Learning rate", { name: "" })].filter(one => one);
  return cards.length ? [element("h2", { class: "part" }, "Training"), element("div", { class: "grid" }, ...cards)] : [];
}

function countsCard(counts) {
  const rows = [];
  const line = (name, value, sub) => rows.push(element("tr", { class: sub ? "sub" : null }, element("td", {}, words(name)), element("td", {}, typeof value === "number" ? thousands(value) : String(value))));
  for (const [name, value] of Object.entries(counts)) {
    if (value !== null && typeof value === "object") {
      const inside = Object.entries(value);
      line(name, inside.length ? inside.reduce((sum, [, one]) => sum + (typeof one === "number" ? one : 0), 0) : 0);
      inside.slice(0, 30).forEach(([reason, one]) => line(reason, one, true));
      if (inside.length > 30) line(`and ${inside.length - 30} more`, "", true);
    } else line(name, value);
  }
  return card("What was counted", "and what was left out, and why", element("table", { class: "counts" }, element("tbody", {}, ...rows)));
}
