// Start, views, theme, keyboard.
function show(name) {
  state.view = name;
  for (const id of ["overview", "videos"]) {
    $(id).hidden = id !== name;
    $("tab-" + id).setAttribute("aria-selected", String(id === name));
    $("tab-" + id).tabIndex = id === name ? 0 : -1;
  }
  tip("");
  if (name === "videos") { openVideos(); if (total) { refreshAll(); markItem(); } } else $("video").pause();
  remember();
}

let opened = false; // the view of videos is filled when it is first looked at
function openVideos() {
  if (opened) return;
  opened = true;
  if (!total) {
    for (const part of $("videos").children) part.hidden = true;
    $("videos").append(element("p", { class: "note", style: "margin: 1rem; align-self: start" }, "There is no video: no truth and no prediction was given."));
    return;
  }
  document.querySelector(".theatre").classList.toggle("bare", !videos.file.some(Boolean));
  const fallback = allScores.length > 10 * total ? allScores[10 * total - 1] : allScores.length ? allScores[allScores.length - 1] : -Infinity;
  setCut(positives && allScores.length ? bestCut() : fallback);
  refreshList();
  const asked = wantedVideo();
  showVideo(asked >= 0 ? asked : order[0]);
}

// The address says what is seen, so that a link or a bookmark leads back to it.
function remember() {
  const hash = state.view === "videos" && total ? "#video=" + encodeURIComponent(videos.id[state.video]) : "#scores";
  if (location.hash !== hash) try { history.replaceState(null, "", hash); } catch (error) { if (!(error instanceof DOMException)) throw error; }
}
function wantedVideo() {
  if (!location.hash.startsWith("#video=")) return -1;
  try { return videos.id.indexOf(decodeURIComponent(location.hash.slice(7))); } catch (error) { if (!(error instanceof URIError)) throw error; return -1; }
}

const THEMES = ["system", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
function stored(value) { // some browsers keep nothing for files
  try { if (value) localStorage.setItem("tad-theme", value); return localStorage.getItem("tad-theme"); } catch (error) { if (!(error instanceof DOMException)) throw error; return null; }
}
let theme = THEMES.includes(stored()) ? stored() : "system";
function applyTheme() {
  document.documentElement.dataset.theme = theme === "system" ? (dark.matches ? "dark" : "light") : theme;
  $("theme").textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
  $("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  readPaints();
  repaint.forEach(one => one.redraw());
  if (opened && total) { drawTimeline(); drawList(); }
}
// From what is seen now to the other one first; the third step is back to the system's.
function nextTheme() {
  const now = document.documentElement.dataset.theme, other = now === "dark" ? "light" : "dark";
  theme = theme === "system" ? other : theme === (dark.matches ? "light" : "dark") ? now === "dark" ? "light" : "dark" : "system";
  stored(theme);
  applyTheme();
}

const KEYBOARD = {
  " ": () => player.toggle(), ArrowLeft: event => player.seek(player.ms() - (event.shiftKey ? 100 : 1000)), ArrowRight: event => player.seek(player.ms() + (event.shiftKey ? 100 : 1000)),
  j: () => stepSegment(1), k: () => stepSegment(-1), n: () => stepVideo(1), p: () => stepVideo(-1), l: () => $("loop").click(),
  "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: () => { view.from = 0; view.to = view.length; drawTimeline(); },
  "[": () => nudge(-20), "]": () => nudge(20), Escape: () => choose(null), Enter: () => { if (state.segment) choose(state.segment, true); },
  "/": () => { $("search").focus(); $("search").select(); },
};
const nudge = by => { const slider = $("score-slider"); slider.value = +slider.value + by; setCut(slid(+slider.value), slider); };
const EVERYWHERE = { s: () => show("overview"), v: () => show("videos"), t: nextTheme, "?": () => $("help").showModal() };

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const target = event.target, typing = target.matches("input:not([type=range]), select, textarea");
  if (typing) return;
  if (target.matches("button, summary") && (event.key === " " || event.key === "Enter")) return; // the button's own
  if (target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  if (target.matches("[role=tab]") && event.key.startsWith("Arrow")) { show(state.view === "videos" ? "overview" : "videos"); $("tab-" + state.view).focus(); event.preventDefault(); return; }
  const act = EVERYWHERE[event.key] || (state.view === "videos" && total ? KEYBOARD[event.key] : null);
  if (!act) return;
  event.preventDefault();
  act(event);
});

function legend() {
  const mark = (kind, look, name) => element("span", {}, element("i", { class: `mark ${kind} ${look}` }), name);
  if (!data.true_classes) return $("legend").append(mark("predicted", "right full", "prediction; stronger: higher score"));
  $("legend").append(mark("truth", "right full", "truth, found"), mark("truth", "wrong half", "truth, missed"), mark("predicted", "right full", "prediction, right"), mark("predicted", "wrong half", "prediction, false"), element("span", {}, "stronger: higher score"));
}

const levels = [...new Set([data.tiou, 0.1, 0.3, 0.5, 0.7, 0.9, ...(data.scores ? data.scores.tiou : [])])].sort((a, b) => a - b);
$("tiou").append(...levels.map(value => element("option", { value, selected: value === data.tiou }, String(+value.toFixed(3)))));
$("class").append(element("option", { value: -1 }, "all classes"), ...classes.map((label, k) => element("option", { value: k }, label)));
if (!data.true_classes) for (const option of [...$("sort").options]) if (["ap", "missed", "false", "truth"].includes(option.value)) option.remove();
for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => show(tab.dataset.view));
$("theme").addEventListener("click", nextTheme);
$("help-open").addEventListener("click", () => $("help").showModal());
dark.addEventListener("change", applyTheme);
addEventListener("hashchange", () => { const v = wantedVideo(); if (v >= 0) { show("videos"); if (v !== state.video) showVideo(v); } });
readPaints();
buildOverview();
legend();
listenTimeline();
listenVideos();
applyTheme();
show(location.hash.startsWith("#video") ? "videos" : data.scores || !total ? "overview" : "videos");
globalThis.tadReport = { data, state, match, matches, tally, view, player, told }; // for tests and the console
