// The data, and what follows from it: which prediction is right at a tIoU and a least score. No drawing here.
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, videos } = data;
const state = { view: "overview", video: 0, cut: -Infinity, tiou: data.tiou, label: -1, segment: null, loop: true };

const $ = id => document.getElementById(id);
// Text only ever enters the page as text: ids and labels are other people's.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}
const percent = (value, digits = 1) => value === null || value === undefined || Number.isNaN(value) ? "–" : (100 * value).toFixed(digits);
const thousands = value => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const short = value => value === null || value === undefined ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(+value.toPrecision(4));
const words = name => String(name).replace(/_/g, " ");
function clock(ms, digits = 1) {
  const sign = ms < 0 ? "−" : "", s = Math.abs(ms) / 1000, h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
  const rest = (Math.floor(s % 60 * 10 ** digits + 1e-6) / 10 ** digits).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
  return sign + (h ? h + ":" + String(m).padStart(2, "0") : m) + ":" + rest;
}

// Segments lie flat: [start, length, class] each, in ms.
const STEP = 3;
const count = flat => flat.length / STEP;

// As tad.evaluate.matching.tiou: zero length on zero length matches, an inverted segment never does.
function overlap(startA, lengthA, startB, lengthB) {
  if (lengthA < 0 || lengthB < 0) return 0;
  const both = Math.max(0, Math.min(startA + lengthA, startB + lengthB) - Math.max(startA, startB));
  const union = lengthA + lengthB - both;
  return union === 0 ? Infinity : both / union;
}

// As tad.evaluate.matching.match: by falling score, each prediction takes the free true segment of its class that it
// overlaps most. Returns the true segment of each prediction, or -1. A lower score never changes what a higher one takes.
function match(truth, predicted, tiou) {
  const taken = new Int32Array(count(predicted)).fill(-1), free = new Uint8Array(count(truth)).fill(1);
  const byClass = new Map();
  for (let j = 0; j < truth.length; j += STEP) {
    if (!byClass.has(truth[j + 2])) byClass.set(truth[j + 2], []);
    byClass.get(truth[j + 2]).push(j);
  }
  for (let i = 0; i < predicted.length; i += STEP) {
    let best = -1, value = tiou;
    for (const j of byClass.get(predicted[i + 2]) || []) {
      if (!free[j / STEP]) continue;
      const here = overlap(predicted[i], predicted[i + 1], truth[j], truth[j + 1]);
      if (here >= value) { value = here; best = j / STEP; }
    }
    if (best >= 0) { free[best] = 0; taken[i / STEP] = best; }
  }
  return taken;
}

const total = videos.id.length;
let matched = { tiou: null, taken: [], ap: [] };
function matches() {
  if (matched.tiou !== state.tiou) {
    const taken = videos.predicted.map((predicted, v) => match(videos.truth[v], predicted, state.tiou));
    matched = { tiou: state.tiou, taken, ap: taken.map((one, v) => pooledAp(one, count(videos.truth[v]))) };
  }
  return matched;
}

// Average precision of one video, all its classes in one ranking; null without a true segment.
function pooledAp(taken, positives) {
  if (!positives) return null;
  let hits = 0, best = 0, area = 0;
  for (const one of taken) hits += one >= 0;
  for (let i = taken.length - 1; i >= 0; i--) {
    best = Math.max(best, hits / (i + 1));
    if (taken[i] >= 0) { area += best; hits--; }
  }
  return area / positives;
}

// How many predictions of a video reach the least score: they are sorted.
function kept(v) {
  const score = videos.score[v];
  let low = 0, high = score.length;
  while (low < high) { const mid = (low + high) >> 1; if (score[mid] >= state.cut) low = mid + 1; else high = mid; }
  return low;
}

// Found, missed and false segments of a video, of the chosen class.
function tally(v) {
  const { taken } = matches(), truth = videos.truth[v], predicted = videos.predicted[v], any = state.label < 0;
  const result = { truth: 0, found: 0, shown: 0, wrong: 0 };
  for (let j = 2; j < truth.length; j += STEP) result.truth += any || truth[j] === state.label;
  for (let i = 0, n = kept(v); i < n; i++) {
    if (!any && predicted[STEP * i + 2] !== state.label) continue;
    result.shown++;
    if (taken[v][i] >= 0) result.found++; else result.wrong++;
  }
  return result;
}

const allScores = Float64Array.from(videos.score.flat()).sort().reverse();
const positives = videos.truth.reduce((sum, truth) => sum + count(truth), 0);

// The least score with the best F1 over all videos at the chosen tIoU.
function bestCut() {
  const { taken } = matches(), ranked = [];
  videos.score.forEach((scores, v) => scores.forEach((score, i) => ranked.push([score, taken[v][i] >= 0])));
  ranked.sort((a, b) => b[0] - a[0]);
  let hits = 0, best = 0, cut = ranked.length ? ranked[ranked.length - 1][0] : 0;
  ranked.forEach(([score, hit], i) => {
    hits += hit;
    if (i + 1 < ranked.length && ranked[i + 1][0] === score) return;
    const f1 = 2 * hits / (i + 1 + positives);
    if (f1 > best) { best = f1; cut = score; }
  });
  return cut;
}

// Why a prediction is not right: what it overlaps most, of its class and of others.
function nearest(v, i) {
  const truth = videos.truth[v], predicted = videos.predicted[v], own = [0, -1], other = [0, -1];
  for (let j = 0; j < truth.length; j += STEP) {
    const value = overlap(predicted[STEP * i], predicted[STEP * i + 1], truth[j], truth[j + 1]);
    const best = truth[j + 2] === predicted[STEP * i + 2] ? own : other;
    if (value > best[0]) { best[0] = value; best[1] = j / STEP; }
  }
  return { own, other };
}
