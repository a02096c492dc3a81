"use strict";
// Draws the bars, the lines, the heat map of the states, and the table. Text from the server or the
// user becomes text nodes and attribute values, and is never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";
// The line plot and the heat map below it share these margins, so that their columns align.
const MARGIN = { left: 46, right: 104, top: 10, bottom: 30 };
const LINES = 6;

function percent(probability) {
  const digits = probability > 0 && probability < 0.0995 ? 1 : 0;
  return `${(100 * probability).toFixed(digits)} %`;
}

function shown(character) {
  return character === " " ? "␣" : character;
}

/** Returns the characters of `text` separated by spaces; invisible characters become U+XXXX. */
function spelledOut(text) {
  const code = (character) => character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return [...text].map((character) =>
    /[\p{L}\p{N}\p{P}\p{S}]/u.test(character) ? character : `U+${code(character)}`).join(" ");
}

function html(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Draws [{language, probability}] as bars, and marks the languages in the set `weak`. */
function drawBars(list, languages, weak) {
  while (list.children.length > languages.length) list.lastElementChild.remove();
  languages.forEach(({ language, probability }, place) => {
    // Reuse the items, so that a bar's width changes smoothly.
    let item = list.children[place];
    if (!item) {
      item = html("li");
      const track = html("span", "track");
      track.setAttribute("aria-hidden", "true");
      track.append(html("span", `fill rank-${place}`));
      item.append(html("span", "language"), track, html("span", "percent"));
      list.append(item);
    }
    const [name, track, number] = item.children;
    name.textContent = name.title = language;
    item.classList.toggle("weak", weak.has(language));
    track.firstElementChild.style.width = `${100 * probability}%`;
    number.textContent = percent(probability);
  });
}

/** Returns the indices of the most probable languages after the last character. */
function leading(probabilities) {
  const last = probabilities[probabilities.length - 1];
  return [...last.keys()].sort((a, b) => last[b] - last[a]).slice(0, LINES);
}

/** Draws the probabilities of the leading languages after each character as lines. */
function drawLines(picture, { characters, languages, probabilities }) {
  const width = picture.clientWidth;
  const height = picture.clientHeight;
  const column = (width - MARGIN.left - MARGIN.right) / characters.length;
  const bottom = height - MARGIN.bottom;
  const x = (place) => MARGIN.left + (place + 0.5) * column;
  const y = (probability) => bottom - probability * (bottom - MARGIN.top);
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.replaceChildren();
  for (const level of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(level), y2: y(level) }),
      svg("text", { class: "scale-label", x: MARGIN.left - 6, y: y(level) + 4 }, `${100 * level} %`));
  }
  // If columns are too narrow for letters, only the table shows the letters.
  const size = column >= 11 ? "" : column >= 7 ? " small" : " none";
  characters.forEach((character, place) => {
    const letter = { class: `character${size}`, x: x(place), y: height - 8 };
    picture.append(svg("text", letter, shown(character)));
  });
  const leaders = leading(probabilities);
  // Draw the most probable language last, so that its line is on top.
  leaders.map((language, rank) => [language, rank]).reverse().forEach(([language, rank]) => {
    const points = probabilities.map((row, place) => [x(place), y(row[language])]);
    picture.append(svg("polyline", { class: `rank-${rank}`, points: points.join(" ") }));
    if (column < 8) return;
    for (const [cx, cy] of points) picture.append(svg("circle", { class: `rank-${rank}`, cx, cy, r: 3.5 }));
  });
  labelLines(picture, leaders, languages, probabilities, y, x(characters.length - 1) + 22);
}

/** Labels the end of each line with its language, and keeps the labels from overlapping. */
function labelLines(picture, leaders, languages, probabilities, y, left) {
  const last = probabilities[probabilities.length - 1];
  let lowest = MARGIN.top - 8;
  const places = leaders.map((language) => (lowest = Math.max(lowest + 15, y(last[language]))));
  // Move labels up again if some were pushed below the plot.
  let highest = y(0) + 15;
  for (let rank = places.length - 1; rank >= 0; rank--) {
    highest = places[rank] = Math.min(places[rank], highest - 15);
  }
  leaders.forEach((language, rank) => {
    const name = languages[language];
    const short = name.length > 12 ? `${name.slice(0, 11)}…` : name;
    const end = y(last[language]);
    if (Math.abs(end - places[rank]) > 6) {
      // Connect a label that was moved to the end of its line.
      picture.append(svg("line", { class: "pointer", x1: left - 16, y1: end, x2: left - 2, y2: places[rank] }));
    }
    picture.append(svg("text", { class: `rank-${rank}`, x: left, y: places[rank] + 4 }, short));
  });
}

/** Returns a colour that the style sheet defines as "#rrggbb", as three numbers. */
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
}

/** Draws the states, a column per character and a row per unit; returns the end of the scale. */
function drawStates(canvas, states, directions) {
  const units = states[0].length;
  const most = states.flat().reduce((found, value) => Math.max(found, Math.abs(value)), 1);
  const [low, middle, high] = ["--low", "--middle", "--high"].map(colour);
  const order = unitOrder(states, directions);
  canvas.width = states.length;
  canvas.height = units;
  const context = canvas.getContext("2d");
  const image = context.createImageData(states.length, units);
  order.forEach((unit, row) => states.forEach((state, column) => {
    const value = state[unit] / most;
    const end = value < 0 ? low : high;
    const at = 4 * (row * states.length + column);
    for (let part = 0; part < 3; part++) {
      image.data[at + part] = middle[part] + Math.abs(value) * (end[part] - middle[part]);
    }
    image.data[at + 3] = 255;
  }));
  context.putImageData(image, 0, 0);
  const width = canvas.parentElement.clientWidth - MARGIN.left - MARGIN.right;
  canvas.style.width = `${width}px`;
  canvas.style.marginLeft = `${MARGIN.left}px`;
  return most;
}

/**
 * Returns the units of each direction, sorted by the signs of their states from the last character
 * back to the first, then by the last state. Units with similar histories become neighbours.
 */
function unitOrder(states, directions) {
  const size = states[0].length / directions;
  const backwards = [...states].reverse();
  const compare = (a, b) => {
    const parting = backwards.find((state) => (state[a] > 0) !== (state[b] > 0));
    return parting ? parting[b] - parting[a] : backwards[0][b] - backwards[0][a];
  };
  return Array.from({ length: directions }, (_, direction) =>
    Array.from({ length: size }, (_, unit) => direction * size + unit).sort(compare)).flat();
}

/** Writes the probabilities of the leading languages after each character as a table. */
function drawTable(table, { characters, languages, probabilities }) {
  const leaders = leading(probabilities);
  const head = html("tr");
  head.append(html("th", "", "after"), ...leaders.map((place) => html("th", "", languages[place])));
  for (const cell of head.children) cell.scope = "col";
  const rows = characters.map((_, place) => {
    const row = html("tr");
    const begin = html("th", "", characters.slice(0, place + 1).map(shown).join(""));
    begin.scope = "row";
    row.append(begin, ...leaders.map((leader) => html("td", "", percent(probabilities[place][leader]))));
    return row;
  });
  const [top, body] = [html("thead"), html("tbody")];
  top.append(head);
  body.append(...rows);
  table.replaceChildren(top, body);
}
