// The list of videos, the player, the segments beside it.
const ITEM = 46; // px, as in the style
let order = [], tallies = [];

const player = {
  at: 0, there: false,
  ms() { return this.there ? 1000 * $("video").currentTime : this.at; },
  seek(ms) {
    this.at = Math.max(0, Math.min(ms, view.length));
    if (this.there) $("video").currentTime = this.at / 1000;
    tick();
  },
  toggle() {
    if (!this.there) return say("there is no video to play");
    if ($("video").paused) this.play(); else $("video").pause();
  },
  play() { if (this.there) $("video").play().catch(() => {}); },
};
const say = text => { $("said").textContent = text; };

function tick() {
  const ms = player.ms(), video = $("video"), item = state.segment;
  if (item && state.loop && player.there && !video.paused && (ms >= Math.max(item.end, item.start + 300) || ms < item.start - 500)) video.currentTime = Math.max(0, item.start) / 1000;
  $("clock").textContent = `${clock(ms)} / ${clock(view.length)}`;
  if (!video.paused && (ms > view.to || ms < view.from)) move(ms - 0.1 * (view.to - view.from));
  drawPlayhead();
}
function run() { tick(); if (!$("video").paused && !$("video").ended) requestAnimationFrame(run); }

function showVideo(v, { keep = false } = {}) {
  state.video = v;
  state.segment = null;
  if (!keep) fit(v);
  const video = $("video"), file = videos.file[v];
  player.there = false;
  player.at = 0;
  video.pause();
  if (file) video.src = file; else { video.removeAttribute("src"); video.load(); noVideo(["no file is known for this video"]); }
  if (file) noVideo(null);
  $("video-name").textContent = videos.id[v];
  const known = videos.known[v] || !data.true_classes ? "" : " · not in the annotation: all predictions here are false";
  $("video-facts").textContent = `${clock(videos.duration[v])} · ${thousands(count(videos.truth[v]))} true segments · ${thousands(count(videos.predicted[v]))} predictions · AP ${percent(matches().ap[v])}${known}`;
  refreshVideo();
  $("rows").scrollTop = 0;
  markItem();
  remember();
}
function noVideo(lines) {
  $("no-video").hidden = !lines;
  if (lines) $("no-video").replaceChildren(element("div", {}, lines[0]), ...lines.slice(1).map(line => element("code", {}, line)));
}

let waiting = 0;
function refreshSoon() { if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; refreshAll(); }); }
function refreshVideo() {
  if (!total) return;
  layout(state.video);
  if (state.segment) state.segment = view.items.find(item => item.kind === state.segment.kind && item.index === state.segment.index) || null;
  drawTimeline();
  fillSegments();
  tick();
}
function refreshAll() {
  refreshList();
  refreshVideo();
  $("score-share").textContent = `${thousands(allScores.length && shownInAll())} of ${thousands(allScores.length)}`;
}
function shownInAll() {
  let low = 0, high = allScores.length;
  while (low < high) { const mid = (low + high) >> 1; if (allScores[mid] >= state.cut) low = mid + 1; else high = mid; }
  return low;
}

function setCut(value, from) {
  state.cut = value;
  if (from !== $("score")) $("score").value = Number.isFinite(value) ? value : "";
  if (from !== $("score-slider")) $("score-slider").value = allScores.length ? 1000 * (1 - Math.cbrt(shownInAll() / allScores.length)) : 0;
  refreshSoon();
}
// The slider goes over the number of predictions, finely where few are left: it works whatever the scores look like.
function slid(position) {
  const n = allScores.length;
  if (!n) return -Infinity;
  return allScores[Math.max(1, Math.round(n * (1 - position / 1000) ** 3)) - 1];
}
function setClass(label) { state.label = label; $("class").value = label; refreshAll(); $("list").scrollTop = 0; drawList(); }
function showClass(label) { setClass(label); show("videos"); if (order.length && !order.includes(state.video)) showVideo(order[0]); }

// ---- the list: as many elements as are seen, whatever its length ----
function refreshList() {
  tallies = videos.id.map((_, v) => tally(v));
  const { ap } = matches(), wanted = $("search").value.trim().toLowerCase(), sort = $("sort").value;
  order = videos.id.map((_, v) => v).filter(v => (!wanted || videos.id[v].toLowerCase().includes(wanted)) && (state.label < 0 || tallies[v].truth || tallies[v].shown));
  const key = { ap: v => ap[v] === null ? 2 : ap[v], missed: v => tallies[v].found - tallies[v].truth, false: v => -tallies[v].wrong, duration: v => -videos.duration[v], truth: v => -tallies[v].truth }[sort];
  const byName = (a, b) => videos.id[a] < videos.id[b] ? -1 : videos.id[a] > videos.id[b] ? 1 : 0;
  order.sort(key ? (a, b) => key(a) - key(b) || byName(a, b) : byName);
  $("list-space").style.height = order.length * ITEM + "px";
  const sums = order.reduce((sum, v) => [sum[0] + tallies[v].found, sum[1] + tallies[v].truth, sum[2] + tallies[v].wrong], [0, 0, 0]);
  $("list-count").textContent = `${thousands(order.length)} videos`;
  $("list-sums").textContent = data.true_classes ? `${thousands(sums[0])}/${thousands(sums[1])} found, ${thousands(sums[2])} false` : `${thousands(sums[2])} segments`;
  drawList();
}
function drawList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ITEM) - 3), last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / ITEM) + 3);
  const { ap } = matches(), made = [];
  for (let place = first; place < last; place++) {
    const v = order[place], { truth, found, wrong, shown } = tallies[v], strip = element("canvas", { "aria-hidden": "true" });
    made.push(element("div", { class: "item", role: "option", id: "item-" + v, "aria-selected": v === state.video ? "true" : "false", "aria-posinset": place + 1, "aria-setsize": order.length, style: `top:${place * ITEM}px`, title: videos.id[v], onclick: () => showVideo(v),
      "aria-label": `${videos.id[v]}, ${data.true_classes ? `AP ${percent(ap[v])}, ${found} of ${truth} found, ${wrong} false` : `${shown} segments`}` },
      element("div", { class: "row" }, element("span", { class: "name" }, videos.id[v]), element("span", { class: "faint", title: "found / true, + false" }, data.true_classes ? `${found}/${truth}  +${wrong}` : String(shown)), data.true_classes ? element("span", { class: "ap", title: "average precision" }, percent(ap[v], 0)) : null), strip));
    strip.dataset.video = v;
  }
  $("list-space").replaceChildren(...made);
  for (const item of made) drawStrip(item.lastChild, +item.lastChild.dataset.video);
  if (order.includes(state.video)) list.setAttribute("aria-activedescendant", "item-" + state.video); else list.removeAttribute("aria-activedescendant");
}
// Truth above, predictions below: found and right in blue, missed and false in orange.
function drawStrip(canvas, v) {
  const width = canvas.clientWidth, length = Math.max(1000, videos.duration[v]);
  if (!width) return;
  const context = sized(canvas, width, 12);
  context.fillStyle = paints.line;
  context.fillRect(0, 5.5, width, 1);
  for (const item of itemsOf(v).sort((a, b) => a.right - b.right)) { // what is right lies on top
    context.fillStyle = item.right || !data.true_classes ? paints.blue : paints.orange;
    context.globalAlpha = item.kind === "truth" || item.right ? 1 : 0.55;
    context.fillRect(item.start / length * width, item.kind === "truth" ? 0 : 7, Math.max(1.2, (item.end - item.start) / length * width), 5);
  }
  context.globalAlpha = 1;
}
function markItem() {
  const place = order.indexOf(state.video), list = $("list");
  if (place >= 0) {
    if (place * ITEM < list.scrollTop) list.scrollTop = place * ITEM;
    else if ((place + 1) * ITEM > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ITEM - list.clientHeight;
  }
  drawList();
}
function stepVideo(by) {
  if (!order.length) return;
  const place = order.indexOf(state.video), next = place < 0 ? 0 : place + by;
  if (next < 0 || next >= order.length) return say(by > 0 ? "this is the last video" : "this is the first video");
  showVideo(order[next]);
  say(`${videos.id[order[next]]}, video ${next + 1} of ${order.length}`);
}

// ---- segments ----
const SEGMENTS = 300;
function fillSegments() {
  const columns = [["", "left"], ["start", ""], ["end", ""], ["s", ""], ["score", ""], ["", "left"]];
  const rows = view.items.slice(0, SEGMENTS).map(item => {
    const found = told(item), right = item.right || !data.true_classes;
    return element("tr", { onclick: () => choose(item, true), "data-key": item.kind + item.index, class: state.segment === item ? "chosen" : null },
      element("td", { class: "left clip" }, element("i", { class: `mark ${item.kind} ${right ? "right full" : "wrong half"}` }), classes[item.label]),
      element("td", {}, clock(item.start, 2)), element("td", {}, clock(item.end, 2)), element("td", {}, ((item.end - item.start) / 1000).toFixed(2)),
      element("td", {}, item.kind === "truth" ? "truth" : short(item.score)), element("td", { class: "left faint clip" }, found.slice(item.kind === "truth" ? 2 : 3).join(", ")));
  });
  $("segments").replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...columns.map(([name, side]) => element("th", { scope: "col", class: side || null }, name)))), element("tbody", {}, ...rows)),
    view.items.length > SEGMENTS ? element("p", { class: "faint", style: "padding:.3rem .6rem" }, `and ${view.items.length - SEGMENTS} more: raise the least score, or choose a class`) : "");
}
function choose(item, play = false) {
  state.segment = item;
  for (const row of $("segments").querySelectorAll("tr[data-key]")) {
    const chosen = item && row.dataset.key === item.kind + item.index;
    row.classList.toggle("chosen", Boolean(chosen));
    if (chosen) { const box = $("segments"), at = row.offsetTop; if (at < box.scrollTop + 30 || at > box.scrollTop + box.clientHeight - 30) box.scrollTop = at - box.clientHeight / 2; }
  }
  if (item) {
    const rows = $("rows");
    if (item.y < rows.scrollTop) rows.scrollTop = item.y - 20;
    else if (item.y + item.tall > rows.scrollTop + rows.clientHeight) rows.scrollTop = item.y + item.tall + 20 - rows.clientHeight;
    reveal(item.start, item.end);
    player.seek(item.start);
    if (play && state.loop) player.play();
    say(told(item).join(", "));
  }
  drawTimeline();
}
function stepSegment(by) {
  const items = view.items;
  if (!items.length) return say("no segment is shown");
  const place = state.segment ? items.indexOf(state.segment) : by > 0 ? -1 : items.length;
  choose(items[Math.max(0, Math.min(items.length - 1, place + by))]);
}

function listenVideos() {
  const video = $("video");
  video.addEventListener("loadedmetadata", () => {
    player.there = true;
    const ms = Number.isFinite(video.duration) ? 1000 * video.duration : 0;
    if (ms > view.length) { const whole = view.to === view.length; view.length = ms; if (whole) view.to = ms; }
    if (player.at) video.currentTime = player.at / 1000;
    video.playbackRate = +$("speed").value;
    drawTimeline();
    tick();
  });
  video.addEventListener("error", () => {
    if (!videos.file[state.video]) return;
    player.there = false;
    noVideo(videos.exists[state.video] ? ["This browser cannot play the file: it was moved, or its codec is none of H.264, VP8, VP9, AV1.", videos.file[state.video]] : ["The video is not there.", videos.file[state.video]]);
  });
  video.addEventListener("play", () => { $("play").classList.add("on"); $("play").setAttribute("aria-label", "Pause"); run(); });
  video.addEventListener("pause", () => { $("play").classList.remove("on"); $("play").setAttribute("aria-label", "Play"); tick(); });
  video.addEventListener("timeupdate", tick);
  video.addEventListener("seeked", tick);
  video.addEventListener("click", () => player.toggle());
  $("play").addEventListener("click", () => player.toggle());
  $("next").addEventListener("click", () => stepVideo(1));
  $("previous").addEventListener("click", () => stepVideo(-1));
  $("loop").addEventListener("click", () => { state.loop = !state.loop; $("loop").setAttribute("aria-pressed", String(state.loop)); });
  $("speed").addEventListener("change", event => { video.playbackRate = +event.target.value; });
  $("score-slider").addEventListener("input", event => setCut(slid(+event.target.value), event.target));
  $("score").addEventListener("input", event => setCut(event.target.value === "" ? -Infinity : +event.target.value, event.target));
  $("best-f1").addEventListener("click", () => setCut(bestCut()));
  $("tiou").addEventListener("change", event => { state.tiou = +event.target.value; refreshAll(); showFactsAgain(); });
  $("class").addEventListener("change", event => setClass(+event.target.value));
  $("search").addEventListener("input", () => { $("list").scrollTop = 0; refreshList(); });
  $("search").addEventListener("keydown", event => {
    if (event.key === "Enter" && order.length) { showVideo(order[0]); $("list").focus(); }
    if (event.key === "Escape") { event.target.value = ""; refreshList(); $("list").focus(); }
  });
  $("sort").addEventListener("change", () => { $("list").scrollTop = 0; refreshList(); });
  $("list").addEventListener("scroll", drawList);
  $("list").addEventListener("keydown", event => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 }[event.key];
    if (!by || !order.length) return;
    event.preventDefault();
    event.stopPropagation();
    const place = order.indexOf(state.video);
    showVideo(order[Math.max(0, Math.min(order.length - 1, place < 0 ? 0 : place + by))]);
  });
  new ResizeObserver(() => { if (order.length) drawList(); }).observe($("list"));
}
function showFactsAgain() {
  const facts = $("video-facts");
  facts.textContent = facts.textContent.replace(/AP [\d.–]+/, `AP ${percent(matches().ap[state.video])}`);
}
