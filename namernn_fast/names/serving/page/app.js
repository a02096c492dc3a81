"use strict";
// The page sends a request while the user types. A new name aborts the requests for earlier names.

const WAIT = 100; // milliseconds between the last keystroke and the request
const SPEAK = 700; // milliseconds before a screen reader announces the result
const TOP = 6;
const byId = (id) => document.getElementById(id);

let model = null; // the response of /health
let reading = null; // the last response of /states, to redraw after a resize
let question = new AbortController();
let waiting = 0;
let speaking = 0;

async function ask(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (response.status === 503) throw new Error("The server is busy; try again in a moment.");
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function tell(name) {
  question.abort();
  question = new AbortController();
  const { signal } = question;
  clearTimeout(speaking);
  if (!name.trim()) return clear();
  try {
    model ??= await health(signal);
    const { results: [result] } = await ask("predict", { names: [name], top: TOP }, signal);
    if (signal.aborted) return;
    if (result.error) return problem(`This name cannot be read: ${result.error}.`);
    showLanguages(result);
    byId("too-long").hidden = name.length <= model.limits.states_length;
    if (!byId("too-long").hidden) return showReading(null);
    const answer = await ask("states", { name }, signal);
    if (!signal.aborted) showReading(answer);
  } catch (error) {
    if (signal.aborted) return;
    problem(error instanceof TypeError ? "The server does not answer." : error.message);
  }
}

async function health(signal) {
  const response = await fetch("health", { signal });
  return response.json();
}

function clear() {
  byId("answers").hidden = true;
  byId("problem").hidden = true;
  byId("read").replaceChildren();
  byId("summary").textContent = "";
  reading = null;
}

function problem(text) {
  clear();
  byId("problem").textContent = text;
  byId("problem").hidden = false;
}

function showLanguages({ name, languages, unusual, dropped }) {
  byId("problem").hidden = true;
  byId("answers").hidden = false;
  const weak = new Set(model.weak_languages);
  drawBars(byId("bars"), languages, weak);
  byId("unusual").hidden = !unusual;
  byId("weak").hidden = !languages.some(({ language }) => weak.has(language));
  byId("read").replaceChildren();
  if (dropped) {
    byId("read").append("Not read: ", html("bdi", "", spelledOut(dropped)));
  }
  speaking = setTimeout(() => {
    const found = languages.slice(0, 3)
      .map(({ language, probability }) => `${language} ${percent(probability)}`).join(", ");
    const warning = unusual ? "an unusual name; " : "";
    byId("summary").replaceChildren(html("bdi", "", name), `: ${warning}${found}`);
  }, SPEAK);
}

function showReading(answer) {
  reading = answer;
  byId("reading").hidden = answer === null;
  if (answer) draw();
}

function draw() {
  if (!reading) return;
  const { characters, languages, probabilities, states } = reading;
  drawLines(byId("lines"), reading);
  const best = languages[leading(probabilities)[0]];
  byId("lines").setAttribute("aria-label",
    `Lines of the probabilities after each of the characters ${characters.map(shown).join(" ")}; `
    + `${best} leads at the end. The table below has the numbers.`);
  byId("path").hidden = states === null;
  drawTable(byId("table"), reading);
  if (states === null) return;
  const directions = model.model.options.bidirectional ? 2 : 1;
  const most = drawStates(byId("states"), states, directions);
  byId("least").textContent = `−${Number(most.toPrecision(3))}`;
  byId("most").textContent = `${Number(most.toPrecision(3))}`;
  byId("units").textContent = `one column a character, one row for each of ${states[0].length} `
    + "units; units whose values have the same signs stand together"
    + (directions === 2 ? "; the lower half has read the name from its end" : "");
  byId("states").setAttribute("aria-label",
    `Heat map of ${states[0].length} units of the state after each of ${states.length} characters`);
}

async function introduce() {
  try {
    model = await health();
  } catch {
    return problem("The server does not answer.");
  }
  const { networks, parameters, options } = model.model;
  const { source, rows, training_names: names, is_sample: isSample } = model.data;
  const kind = options
    ? `one network of ${options.num_layers} layer${options.num_layers > 1 ? "s" : ""} with `
      + `${options.hidden_size} units${options.bidirectional ? " in each direction" : ""}`
    : `${networks} networks whose answers are averaged`;
  const count = (number, what) => (number === null ? "" : `${number.toLocaleString("en")}${what}`);
  const data = source === null ? "data that its file does not name"
    : `${count(names, " names") || "a part"} of ${source}${rows === null ? "" : `, which has ${count(rows, " rows")}`}`;
  byId("model").textContent = `The model: ${kind}, ${parameters.toLocaleString("en")} parameters, `
    + `${model.languages.length} languages, trained on ${data}.`;
  byId("sample").hidden = !isSample;
}

byId("name").addEventListener("input", (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(tell, WAIT, event.target.value);
});
byId("examples").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  clearTimeout(waiting);
  byId("name").value = event.target.textContent;
  tell(byId("name").value);
});
new ResizeObserver(draw).observe(byId("answers"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
introduce();
// A link may contain a name. Otherwise, keep the field, which browsers may restore on a reload.
byId("name").value = new URLSearchParams(location.search).get("name") ?? byId("name").value;
if (byId("name").value) tell(byId("name").value);
