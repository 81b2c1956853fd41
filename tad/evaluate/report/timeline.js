// One video's truth and predictions over time, a band a class. Only what is in view is drawn.
const SMALL = { truth: 13, lane: 9, gap: 2, pad: 5 }, MOST_LANES = 40, LEAST_RANGE = 500, LARGEST = 1.7;
const view = { from: 0, to: 1, length: 1, bands: [], items: [], tall: 0, width: 0 };

const gutter = () => Math.min(170, Math.max(90, view.width * 0.14));
const toX = ms => gutter() + (ms - view.from) / (view.to - view.from) * (view.width - gutter() - 10);
const toMs = x => view.from + (x - gutter()) / (view.width - gutter() - 10) * (view.to - view.from);

// First free lane of each segment; items come in order of importance.
function pack(items, longest) {
  const lanes = [];
  for (const item of items) {
    let lane = lanes.findIndex(spans => spans.every(([a, b]) => item.end <= a || item.start >= b));
    if (lane < 0) lane = lanes.length < longest ? lanes.push([]) - 1 : longest - 1;
    if (lane < longest - 1) lanes[lane].push([item.start, Math.max(item.end, item.start + 1)]);
    item.lane = lane;
  }
  return lanes.length;
}

// What is shown of a video at the present least score, tIoU and class.
function itemsOf(v) {
  const truth = videos.truth[v], predicted = videos.predicted[v], taken = matches().taken[v], shown = kept(v), items = [], taker = new Map();
  for (let i = 0; i < shown; i++) if (taken[i] >= 0) taker.set(taken[i], i);
  for (let j = 0; j < count(truth); j++) items.push({ kind: "truth", index: j, start: truth[STEP * j], end: truth[STEP * j] + truth[STEP * j + 1], label: truth[STEP * j + 2], right: taker.has(j), pair: taker.get(j) });
  for (let i = 0; i < shown; i++) items.push({ kind: "predicted", index: i, start: predicted[STEP * i], end: predicted[STEP * i] + predicted[STEP * i + 1], label: predicted[STEP * i + 2], score: videos.score[v][i], right: taken[i] >= 0, pair: taken[i] });
  return state.label < 0 ? items : items.filter(item => item.label === state.label);
}

function layout(v) {
  view.items = itemsOf(v);
  const bands = new Map();
  for (const item of view.items) {
    if (!bands.has(item.label)) bands.set(item.label, { label: item.label, truth: [], predicted: [], first: Infinity, best: -Infinity });
    const band = bands.get(item.label);
    band[item.kind].push(item);
    if (item.kind === "truth") band.first = Math.min(band.first, item.start); else band.best = Math.max(band.best, item.score);
  }
  view.bands = [...bands.values()].sort((a, b) => a.first - b.first || b.best - a.best);
  for (const band of view.bands) {
    band.lanes = [Math.max(data.true_classes ? 1 : 0, pack(band.truth, MOST_LANES)), Math.max(1, pack(band.predicted, MOST_LANES))];
    band.least = 2 * SMALL.pad + band.lanes[0] * (SMALL.truth + SMALL.gap) + band.lanes[1] * (SMALL.lane + SMALL.gap) + 1;
  }
  // Few bands are drawn larger, as far as there is room.
  const scale = Math.max(1, Math.min(LARGEST, $("rows").clientHeight / Math.max(1, view.bands.reduce((sum, band) => sum + band.least, 0))));
  const [truthTall, laneTall, gap, pad] = [SMALL.truth, SMALL.lane, SMALL.gap, SMALL.pad].map(value => Math.floor(value * scale));
  let y = 0;
  for (const band of view.bands) {
    Object.assign(band, { y, middle: pad + truthTall / 2 });
    y += pad;
    for (const item of band.truth) Object.assign(item, { y: y + item.lane * (truthTall + gap), tall: truthTall });
    y += band.lanes[0] * (truthTall + gap) + 1;
    for (const item of band.predicted) Object.assign(item, { y: y + item.lane * (laneTall + gap), tall: laneTall });
    y += band.lanes[1] * (laneTall + gap) + pad;
    band.tall = y - band.y;
  }
  view.tall = y;
  $("rows-space").style.height = Math.max(y, $("rows").clientHeight) + "px";
  view.items.sort((a, b) => a.start - b.start || a.end - b.end || (a.kind < b.kind ? 1 : -1));
}

function fit(v) {
  view.length = Math.max(1000, videos.duration[v]);
  for (const flat of [videos.truth[v], videos.predicted[v]]) for (let i = 0; i < flat.length; i += STEP) view.length = Math.max(view.length, flat[i] + flat[i + 1]);
  view.from = 0;
  view.to = view.length;
}

function zoom(factor, at = player.ms()) {
  const middle = Math.min(Math.max(at, view.from), view.to);
  const range = Math.min(view.length, Math.max(LEAST_RANGE, (view.to - view.from) * factor));
  const share = (middle - view.from) / (view.to - view.from);
  move(middle - share * range, range);
}
function move(from, range = view.to - view.from) {
  view.from = Math.max(0, Math.min(from, view.length - range));
  view.to = view.from + range;
  drawTimeline();
}
function reveal(start, end) {
  const range = view.to - view.from;
  if (end - start > range) return move(start - 0.05 * (end - start), Math.min(view.length, 1.1 * (end - start)));
  if (start < view.from || end > view.to) move(start - (range - (end - start)) / 2);
}

function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1, context = canvas.getContext("2d");
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  context.textBaseline = "middle";
  return context;
}

const paints = {};
function readPaints() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "faint", "line", "soft", "panel", "blue", "orange", "select"]) paints[name] = style.getPropertyValue("--" + name).trim();
}

function drawTimeline() {
  view.width = $("timeline").clientWidth;
  if (!view.width || !total) return;
  drawAxis();
  const box = $("rows"), tall = box.clientHeight, context = sized($("rows-canvas"), box.clientWidth, tall), top = box.scrollTop;
  const left = gutter(), right = view.width - 10;
  view.bands.forEach((band, k) => {
    if (band.y + band.tall < top || band.y > top + tall) return;
    context.fillStyle = paints.soft;
    if (k % 2) context.fillRect(0, band.y - top, view.width, band.tall);
  });
  context.strokeStyle = context.fillStyle = paints.line;
  context.globalAlpha = 0.6;
  context.beginPath();
  for (const ms of axisTicks()) { context.moveTo(Math.round(toX(ms)) + 0.5, 0); context.lineTo(Math.round(toX(ms)) + 0.5, tall); }
  context.stroke();
  const end = toX(videos.duration[state.video]);
  if (end < right - 1) context.fillRect(Math.max(left, end), 0, right - Math.max(left, end), tall); // behind the video's end
  context.globalAlpha = 1;
  context.save();
  context.beginPath();
  context.rect(left - 3, 0, right - left + 6, tall);
  context.clip();
  const highest = allScores.length ? allScores[0] : 1, least = Number.isFinite(state.cut) ? Math.min(state.cut, highest) : allScores[allScores.length - 1];
  for (const band of view.bands) {
    if (band.y + band.tall < top || band.y > top + tall) continue;
    for (const item of band.truth) drawItem(context, item, top, 1);
    for (const item of band.predicted) drawItem(context, item, top, highest > least ? (item.score - least) / (highest - least) : 1);
  }
  context.restore();
  for (const band of view.bands) {
    if (band.y + band.tall < top || band.y > top + tall) continue;
    context.fillStyle = paints.ink;
    context.fillText(clipped(context, classes[band.label], left - 14), 8, band.y - top + band.middle);
    if (band.label >= data.true_classes && data.true_classes) {
      context.fillStyle = paints.faint;
      context.fillText("not in the truth", 8, band.y - top + band.middle + 15, left - 14);
    }
  }
  if (!view.bands.length) {
    context.fillStyle = paints.faint;
    context.fillText(count(videos.predicted[state.video]) ? "nothing at this least score and class" : "no true segment and no prediction", left + 8, 24);
  }
  drawPlayhead();
}

function drawItem(context, item, top, strength) {
  const x = toX(item.start), wide = Math.max(2, toX(item.end) - x), y = item.y - top;
  if (x + wide < 0 || x > view.width) return;
  const paint = item.right || !data.true_classes ? paints.blue : paints.orange, full = item.right || !data.true_classes;
  context.fillStyle = paint;
  context.strokeStyle = paint;
  context.lineWidth = 1.3;
  context.globalAlpha = item.kind === "truth" ? (full ? 0.95 : 0.14) : full ? 0.4 + 0.6 * strength : 0.12 + 0.3 * strength;
  context.fillRect(x, y, wide, item.tall);
  context.globalAlpha = 1;
  if (!full) context.strokeRect(x + 0.65, y + 0.65, Math.max(0.7, wide - 1.3), item.tall - 1.3);
  if (state.segment && state.segment.kind === item.kind && state.segment.index === item.index) {
    context.strokeStyle = paints.ink;
    context.lineWidth = 2;
    context.strokeRect(x - 2, y - 2, wide + 4, item.tall + 4);
  }
}

function axisTicks() {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200].map(s => 1000 * s);
  const wanted = (view.to - view.from) / Math.max(2, (view.width - gutter()) / 90), step = steps.find(value => value >= wanted) || Math.ceil(wanted / 3.6e6) * 3.6e6;
  const found = [];
  for (let k = Math.ceil(view.from / step); k * step <= view.to; k++) found.push(k * step);
  return found;
}

function drawAxis() {
  const context = sized($("axis"), view.width, 26), found = axisTicks(), digits = found.length > 1 && found[1] - found[0] < 1000 ? 1 : 0;
  context.textAlign = "center";
  for (const ms of found) {
    context.fillStyle = paints.faint;
    context.fillText(clock(ms, digits), Math.min(toX(ms), view.width - 20), 12);
    context.fillRect(toX(ms), 21, 1, 5);
  }
  context.textAlign = "left";
  context.fillStyle = paints.faint;
  context.fillText(view.to - view.from < view.length - 1 ? `${clock(view.to - view.from)} of ${clock(view.length, 0)}` : "", 8, 13, gutter() - 12);
  if (state.segment && state.segment.end !== undefined) {
    context.fillStyle = paints.ink;
    context.fillRect(toX(state.segment.start), 23, Math.max(2, toX(state.segment.end) - toX(state.segment.start)), 3);
  }
}

function drawPlayhead() {
  const ms = player.ms(), x = toX(ms), head = $("playhead");
  head.hidden = ms < view.from - 1 || ms > view.to + 1;
  head.style.transform = `translateX(${x.toFixed(1)}px)`;
}

function itemAt(x, y) {
  const down = y + $("rows").scrollTop;
  let found = null;
  for (const item of view.items) {
    if (down < item.y - 1 || down > item.y + item.tall + 1) continue;
    const from = toX(item.start) - 2, to = Math.max(toX(item.end), from + 4) + 2;
    if (x >= from && x <= to && (!found || item.end - item.start < found.end - found.start)) found = item;
  }
  return found;
}

function told(item) {
  const v = state.video, length = item.end - item.start;
  const behind = item.end > videos.duration[v] + 100 ? "   behind the video's end" : "";
  const lines = [`${classes[item.label]}${item.kind === "truth" ? " (truth)" : ""}`, `${clock(item.start, 2)} – ${clock(item.end, 2)}   ${(length / 1000).toFixed(2)} s${behind}`];
  const pairs = (share, j) => `tIoU ${Number.isFinite(share) ? share.toFixed(2) : "0/0"}${j === undefined ? "" : ` with ${classes[videos.truth[v][STEP * j + 2]]}`}`;
  if (item.kind === "truth") {
    if (item.right) {
      const p = videos.predicted[v].slice(STEP * item.pair, STEP * item.pair + 2);
      lines.push(`found with score ${short(videos.score[v][item.pair])}, ${pairs(overlap(item.start, length, p[0], p[1]))}`);
    } else lines.push("missed");
  } else {
    lines.push(`score ${short(item.score)}`);
    const { own, other } = nearest(v, item.index);
    if (item.right) lines.push(`right, ${pairs(overlap(item.start, length, videos.truth[v][STEP * item.pair], videos.truth[v][STEP * item.pair + 1]))}`);
    else if (data.true_classes) lines.push(`${verdict(own, other)}`, ...(own[1] >= 0 ? [pairs(own[0], own[1])] : []), ...(other[1] >= 0 ? [pairs(other[0], other[1])] : []));
  }
  return lines;
}
function verdict(own, other) {
  if (own[0] >= state.tiou) return "found before by a higher score";
  if (other[0] >= state.tiou) return "wrong class";
  if (own[0] >= 0.1) return "ends too far off";
  return other[0] >= 0.1 ? "wrong class, ends too far off" : "nothing there";
}

function listenTimeline() {
  const rows = $("rows"), axis = $("axis"), box = $("timeline");
  let down = null;
  const place = event => { const edge = box.getBoundingClientRect(); return [event.clientX - edge.left, event.clientY - rows.getBoundingClientRect().top]; };
  axis.addEventListener("pointerdown", event => { axis.setPointerCapture(event.pointerId); player.seek(toMs(place(event)[0])); });
  axis.addEventListener("pointermove", event => { if (event.buttons & 1) player.seek(toMs(place(event)[0])); });
  rows.addEventListener("pointerdown", event => { if (event.button === 0) down = { x: event.clientX, from: view.from, moved: false }; });
  rows.addEventListener("pointermove", event => {
    if (down && event.buttons & 1 && (down.moved || Math.abs(event.clientX - down.x) > 4)) {
      down.moved = true;
      tip("");
      return move(down.from - (event.clientX - down.x) / (view.width - gutter() - 10) * (view.to - view.from));
    }
    const [x, y] = place(event), item = x < gutter() ? null : itemAt(x, y), band = x < gutter() ? bandAt(y) : null;
    rows.style.cursor = item || band ? "pointer" : "default";
    tip(item ? told(item).join("\n") : band ? classes[band.label] + (state.label < 0 ? "\nclick: only this class" : "\nclick: all classes") : "", event);
  });
  rows.addEventListener("pointerleave", () => tip(""));
  rows.addEventListener("click", event => {
    const was = down;
    down = null;
    if (was && was.moved) return;
    const [x, y] = place(event);
    if (x < gutter()) { const band = bandAt(y); if (band) setClass(state.label < 0 ? band.label : -1); return; }
    const item = itemAt(x, y);
    if (item) choose(item, true); else { choose(null); player.seek(toMs(x)); }
  });
  rows.addEventListener("scroll", drawTimeline);
  box.addEventListener("wheel", event => {
    if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 200))), toMs(place(event)[0])); }
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) { event.preventDefault(); move(view.from + (event.deltaX || event.deltaY) / view.width * (view.to - view.from)); }
  }, { passive: false });
  new ResizeObserver(() => { if (state.view === "videos" && total) { layout(state.video); drawTimeline(); } }).observe(box);
}
const bandAt = y => view.bands.find(band => y + $("rows").scrollTop >= band.y && y + $("rows").scrollTop < band.y + band.tall);
