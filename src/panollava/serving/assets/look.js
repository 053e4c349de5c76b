/* The page of `panollava look`. Texts from data are never HTML: they are set as textContent. */
"use strict";

const $ = (id) => document.getElementById(id);
const viewer = new PanoramaViewer($("viewer"));
const state = {
  panorama: null, // {name, title, queries: [{text, references}]}
  question: "", // that was asked, and its answer
  answer: "",
  words: [], // buttons of the answer, with the places of their characters
  maps: new Map(), // of this answer, by part
  asking: null, // AbortController of the answer, of the map and of the panorama's choice
  mapping: null,
  choosing: null,
  reading: null, // the promise of a file that is read
  start: null, // what the server says about itself
  page: 0,
  total: 0,
};
const PAGE = 12;

/* The server. */

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is “panollava look” still running?");
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not one of its own errors */ }
  throw new Error(message);
}

function post(path, content, signal) {
  const headers = {"Content-Type": "application/json"};
  return request(path, {method: "POST", headers, body: JSON.stringify(content), signal});
}

/* The words of an answer, from the chunks of OpenAI's API. */
async function* words(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0].delta.content;
      if (piece) yield piece;
    }
  }
}

/* Messages. */

function showError(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
  $("error").scrollIntoView({block: "nearest"});
}

function hideError() {
  $("error").hidden = true;
  $("error").textContent = "";
}

function say(text) {
  $("status").textContent = text;
}

/* A task of which only the last counts; its error is shown. */
function started(name) {
  if (state[name]) state[name].abort();
  state[name] = new AbortController();
  return state[name].signal;
}

/* Panoramas. */

async function choose(entry, question = "") {
  hideError();
  started("asking");
  started("mapping");
  viewer.setMap(null);
  state.panorama = entry;
  $("result").hidden = true;
  $("name").textContent = entry.title;
  $("question").value = question;
  for (const button of document.querySelectorAll("#thumbnails button")) {
    button.setAttribute("aria-current", button.dataset.name === entry.name);
  }
  showExamples();
  remember();
  try {
    await viewer.show(`/look/pictures/${entry.name}`);
  } catch {
    // The picture's own error says more.
    await request(`/look/pictures/${entry.name}`);
    throw new Error("The picture of this panorama cannot be shown.");
  }
}

function showExamples() {
  const own = state.panorama ? state.panorama.queries.map((query) => query.text) : [];
  const examples = own.length ? own : state.start.examples;
  $("examples").replaceChildren(...examples.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      $("question").value = text;
      ask(text).catch(showError);
    });
    return button;
  }));
  $("examples").hidden = !examples.length;
}

/* Questions wait for it; the last choice counts. */
function upload(file) {
  const signal = started("choosing");
  state.reading = read(file, signal).finally(() => {
    if (state.choosing.signal === signal) state.reading = null;
  });
  return state.reading;
}

async function read(file, signal) {
  hideError();
  if (file.size > state.start.max_bytes) {
    const size = Math.floor(state.start.max_bytes / 2 ** 20);
    throw new Error(`${file.name} is too large: a file may have ${size} MiB. Save it smaller.`);
  }
  say(`Reading ${file.name}`);
  const headers = {"Content-Type": "application/octet-stream"};
  let response;
  try {
    response = await request("/look/panoramas", {method: "POST", headers, body: file, signal});
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error(`${file.name} cannot be used: ${error.message}`);
  }
  const entry = await response.json();
  await choose({...entry, title: file.name}, $("question").value);
  say(`${file.name} is shown`);
}

/* The gallery. */

async function browse(page) {
  const search = $("search").value;
  const parameters = new URLSearchParams({search, start: page * PAGE});
  const signal = started("browsing");
  const {total, panoramas} = await (await request(`/look/panoramas?${parameters}`, {signal})).json();
  Object.assign(state, {page, total});
  const plural = total === 1 ? "panorama" : "panoramas";
  $("count").textContent = `${total} ${plural} of the split “${state.start.split}”${search ? " found" : ""}`;
  const last = page * PAGE + panoramas.length;
  $("range").textContent = total ? `${page * PAGE + 1} to ${last}` : "";
  $("previous").disabled = page === 0;
  $("next").disabled = last >= total;
  $("thumbnails").replaceChildren(...panoramas.map(thumbnail));
  return panoramas;
}

function thumbnail(entry) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.name = entry.name;
  button.setAttribute("aria-current", state.panorama?.name === entry.name);
  const picture = document.createElement("img");
  picture.loading = "lazy";
  picture.alt = "";
  picture.src = `/look/pictures/${entry.name}`;
  const title = document.createElement("span");
  title.textContent = entry.title.split("/").pop();
  button.append(picture, title);
  button.addEventListener("click", () => {
    started("choosing");
    state.reading = null;
    choose(entry).then(() => $("viewer").scrollIntoView({block: "nearest"})).catch(showError);
  });
  item.append(button);
  return item;
}

/* Asking. */

async function ask(question) {
  await state.reading;
  hideError();
  if (!state.panorama) throw new Error("Choose a panorama first.");
  const signal = started("asking");
  started("mapping");
  viewer.setMap(null);
  Object.assign(state, {question, answer: "", words: [], maps: new Map()});
  $("answer").replaceChildren();
  $("asked").textContent = question;
  for (const id of ["hint", "map", "references"]) $(id).hidden = true;
  $("turn").disabled = true;
  $("result").hidden = false;
  $("result").scrollIntoView({block: "nearest"});
  $("answer").setAttribute("aria-busy", "true");
  remember();
  try {
    const asked = {panorama: state.panorama.name, question};
    for await (const piece of words(await post("/look/answers", asked, signal))) {
      state.answer += piece;
      $("answer").textContent = state.answer;
    }
  } finally {
    if (!signal.aborted) $("answer").removeAttribute("aria-busy");
  }
  if (signal.aborted) return;
  say(state.answer ? `Answer: ${state.answer}` : "The answer is empty.");
  if (!state.answer) $("answer").textContent = "(an empty answer)";
  showReferences();
  showWords();
  if (state.answer.trim()) await showMap(null);
}

function showReferences() {
  const query = state.panorama.queries.find((each) => each.text === state.question);
  $("references").hidden = !query;
  $("references").querySelector("ul").replaceChildren(...(query ? query.references : []).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

/* The words of the answer, to choose from. */

function* pieces(text) {
  if (window.Intl?.Segmenter) {
    const segmenter = new Intl.Segmenter(undefined, {granularity: "word"});
    for (const {segment, index, isWordLike} of segmenter.segment(text)) {
      yield [segment, index, isWordLike];
    }
  } else {
    for (const match of text.matchAll(/\s+|[^\s]+/g)) yield [match[0], match.index, match[0].trim()];
  }
}

function showWords() {
  const parts = [];
  for (const [text, index, isWord] of pieces(state.answer)) {
    const part = document.createElement(isWord ? "button" : "span");
    part.textContent = text;
    if (isWord) {
      Object.assign(part, {type: "button", className: "word", tabIndex: state.words.length ? -1 : 0});
      part.setAttribute("aria-pressed", "false");
      state.words.push({button: part, first: index, after: index + text.length});
    }
    parts.push(part);
  }
  if (!state.words.length) return;
  $("answer").replaceChildren(...parts);
  $("hint").hidden = false;
  $("all").hidden = true;
}

let anchor = 0; // the words from here to `end` are chosen
let end = 0;

function wordAt(element) {
  return state.words.findIndex(({button}) => button === element);
}

function select(from, to) {
  [anchor, end] = [from, to];
  const [low, high] = [Math.min(from, to), Math.max(from, to)];
  state.words.forEach(({button}, index) => {
    button.setAttribute("aria-pressed", index >= low && index <= high);
    button.tabIndex = index === to ? 0 : -1;
  });
}

function showSelected() {
  const [low, high] = [Math.min(anchor, end), Math.max(anchor, end)];
  $("all").hidden = false;
  showMap([state.words[low].first, state.words[high].after]).catch(showError);
}

function selectAll() {
  for (const {button} of state.words) button.setAttribute("aria-pressed", "false");
  $("all").hidden = true;
  showMap(null).catch(showError);
}

function addWordEvents() {
  let dragging = false;
  const target = (event) => wordAt(document.elementFromPoint(event.clientX, event.clientY));
  $("answer").addEventListener("pointerdown", (event) => {
    const index = wordAt(event.target);
    if (index < 0 || event.button !== 0) return;
    dragging = true;
    select(event.shiftKey ? anchor : index, index);
  });
  addEventListener("pointermove", (event) => {
    const index = dragging ? target(event) : -1;
    if (index >= 0 && index !== end) select(anchor, index);
  });
  addEventListener("pointerup", () => {
    if (dragging) showSelected();
    dragging = false;
  });
  addEventListener("pointercancel", () => { dragging = false; });
  $("answer").addEventListener("keydown", (event) => {
    const index = wordAt(event.target);
    if (index < 0) return;
    const last = state.words.length - 1;
    const goal = {ArrowLeft: Math.max(index - 1, 0), ArrowRight: Math.min(index + 1, last),
      Home: 0, End: last, Enter: index, " ": index}[event.key];
    if (event.key === "Escape") selectAll();
    if (goal === undefined) return;
    event.preventDefault();
    select(event.shiftKey ? anchor : goal, goal);
    state.words[goal].button.focus();
    showSelected();
  });
  $("answer").addEventListener("click", (event) => {
    const index = wordAt(event.target);
    if (index < 0 || event.detail) return; // not a pointer's, but a screen reader's
    select(index, index);
    showSelected();
  });
  $("all").addEventListener("click", () => {
    state.words[end]?.button.focus();
    selectAll();
  });
}

/* The heat map. */

/* `part`: the first character and the one after the last; null: the whole answer. */
async function showMap(part) {
  const signal = started("mapping");
  const key = String(part);
  $("map").hidden = false;
  $("map").setAttribute("aria-busy", "true");
  $("turn").disabled = true;
  $("peak").textContent = "Computing the map…";
  try {
    let map = state.maps.get(key);
    if (!map) {
      const {panorama, question, answer, maps} = state;
      // The server counts characters, JavaScript halves of some.
      const count = (place) => [...answer.slice(0, place)].length;
      const asked = {panorama: panorama.name, question, answer, part: part && part.map(count)};
      map = await (await post("/look/maps", asked, signal)).json();
      maps.set(key, map);
    }
    if (signal.aborted) return;
    viewer.setMap(map);
    showPeak(map, part);
  } catch (error) {
    if (error.name !== "AbortError") {
      viewer.setMap(null);
      $("peak").textContent = "There is no map of these words.";
    }
    throw error;
  } finally {
    if (!signal.aborted) $("map").removeAttribute("aria-busy");
  }
}

let peak = {yaw: 0, pitch: 0};

function showPeak({width, height, values}, part) {
  const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
  const place = bytes.indexOf(bytes.reduce((most, value) => Math.max(most, value), 0));
  if (bytes[place] < 26) { // a tenth
    $("peak").textContent = "No direction mattered much for these words.";
    return;
  }
  peak = {
    yaw: ((place % width) + 0.5) / width * 360 - 180,
    pitch: 90 - (Math.floor(place / width) + 0.5) / height * 180,
  };
  const words = part ? `“${state.answer.slice(...part)}”` : "The whole answer";
  const text = `${words}: most of all ${directionName(peak)} (yaw ${degrees(peak.yaw)}, `
    + `pitch ${degrees(peak.pitch)}).`;
  $("peak").textContent = text;
  $("turn").disabled = false;
  say(text);
  const {yaw, fov} = viewer.direction();
  const away = Math.abs(((peak.yaw - yaw + 540) % 360 + 360) % 360 - 180);
  if (away > 0.45 * fov) turn(); // it is out of sight
}

function turn() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  viewer.look(peak.yaw, peak.pitch, still ? 0 : 600);
}

function degrees(value) {
  return `${Math.round(value)}°`.replace("-", "−");
}

function directionName({yaw, pitch}) {
  const names = ["in front", "in front on the right", "on the right", "behind on the right",
    "behind", "behind on the left", "on the left", "in front on the left"];
  const name = names[((Math.round(yaw / 45) % 8) + 8) % 8];
  if (Math.abs(pitch) > 60) return pitch > 0 ? "above" : "below";
  return name;
}

/* The address: a reload keeps panorama and question. */

function remember() {
  const parameters = new URLSearchParams();
  if (state.panorama) parameters.set("panorama", state.panorama.name);
  if ($("question").value) parameters.set("question", $("question").value);
  history.replaceState(null, "", `#${parameters}`);
}

async function recall() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const name = parameters.get("panorama");
  if (!name) return false;
  const entry = await (await request(`/look/panoramas/${encodeURIComponent(name)}`)).json();
  await choose(entry, parameters.get("question") ?? "");
  return true;
}

/* Start. */

function addEvents() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (question) ask(question).catch(showError);
  });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // so that the same file can be chosen again
    if (file) upload(file).catch(showError);
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("upload").classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("upload").classList.remove("over");
  });
  addEventListener("drop", (event) => {
    event.preventDefault(); // the browser would leave the page
    $("upload").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) upload(file).catch(showError);
  });
  $("outlines").addEventListener("change", () => {
    viewer.setOutlines($("outlines").checked ? state.start.outlines : []);
  });
  $("strength").addEventListener("input", () => viewer.setStrength($("strength").value / 100));
  $("turn").addEventListener("click", turn);
  let typing;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => browse(0).catch(showError), 200);
  });
  $("previous").addEventListener("click", () => browse(state.page - 1).catch(showError));
  $("next").addEventListener("click", () => browse(state.page + 1).catch(showError));
  addEventListener("hashchange", () => recall().catch(showError));
  addWordEvents();
}

async function start() {
  PanoramaViewer.drawLegend(document.querySelector(".legend"));
  state.start = await (await request("/look/start")).json();
  $("model").textContent = state.start.title;
  $("about").textContent = state.start.about;
  addEvents();
  showExamples();
  const split = state.start.split;
  $("no-gallery").hidden = Boolean(split);
  $("browse").hidden = !split;
  const panoramas = split ? await browse(0) : [];
  let lost = null;
  try {
    if (await recall()) return;
  } catch (error) {
    lost = error;
  }
  if (panoramas.length) await choose(panoramas[0]);
  if (lost) showError(lost);
}

start().catch(showError);
