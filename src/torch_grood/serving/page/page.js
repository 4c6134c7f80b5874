"use strict";

const NEIGHBORS = 5;
const byId = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token");
let rate = null;

const ask = (path, options = {}) =>
  fetch(path, { ...options, headers: { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) } });

const say = (text) => { byId("message").textContent = text; };
const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;
const number = (value) => Number(value.toPrecision(4)).toString();

async function describe() {
  const answer = await ask("v1/info");
  byId("token").hidden = answer.status !== 401;
  if (!answer.ok) { byId("rule").textContent = answer.status === 401 ? "This service needs a token." : "Not available."; return; }
  const info = await answer.json();
  rate = info.fpr;
  const classes = `The classifier knows ${info.classes.length.toLocaleString("en")} classes.`;
  byId("rule").textContent = rate === null
    ? `${classes} The detector is not calibrated: it scores, and does not decide.`
    : `${classes} An image is flagged if its p-value is at most ${rate}: of images like the ${info.calibration_images.toLocaleString("en")} of the calibration, at most ${percent(rate)} on average.`;
  showDrift();
}

async function showDrift() {
  const answer = await ask("v1/drift");
  if (!answer.ok) return;
  const drift = await answer.json();
  const last = drift.last;
  byId("drift").textContent = last === null
    ? `Drift: ${drift.current.images.toLocaleString("en")} of the first ${drift.window.toLocaleString("en")} images seen.`
    : `Drift: ${last.alarm ? "ALARM" : "no alarm"}; ${last.flagged} of the last ${last.images.toLocaleString("en")} images flagged, ${number(last.expected)} expected (p = ${number(last.p_value)}).`;
}

function show(file, row) {
  const item = byId("result").content.firstElementChild.cloneNode(true);
  const image = item.querySelector("img.image");
  image.src = URL.createObjectURL(file);
  image.alt = `The image ${file.name}`;
  image.onload = () => { image.classList.toggle("small", image.naturalWidth < 100); URL.revokeObjectURL(image.src); };
  image.onerror = () => { image.remove(); };
  item.querySelector("figcaption").textContent = file.name;
  const [word, text] = item.querySelector(".verdict").children;
  const facts = item.querySelector("dl");
  const add = (name, value) => {
    const term = document.createElement("dt");
    const entry = document.createElement("dd");
    term.textContent = name;
    entry.textContent = value;
    facts.append(term, entry);
  };
  if (row.error !== null) {
    item.classList.add("failed");
    word.textContent = "No score";
    text.textContent = row.error;
  } else {
    const known = row.is_ood === false;
    item.classList.add(row.is_ood === null ? "undecided" : known ? "known" : "ood");
    word.textContent = row.is_ood === null ? "No decision" : known ? "Known" : "Unknown";
    text.textContent = row.is_ood === true
      ? "The classifier’s answer should not be relied on."
      : row.is_ood === false ? "It is like what the classifier was trained on." : "The detector is not calibrated.";
    add("classifier says", row.label);
    if (row.prototype_label !== row.label) add("nearest prototype", row.prototype_label);
    add("score", `${number(row.score)} (higher is less known)`);
    if (row.p_value !== null) {
      add("p-value", `${number(row.p_value)}${rate === null ? "" : row.is_ood ? ` ≤ ${rate}` : ` > ${rate}`}`);
    }
    const shown = row.neighbors.filter((one) => one.image);
    if (shown.length) showNeighbors(item.querySelector(".neighbors"), shown);
    else add("nearest training image", row.neighbors.map((one) => `number ${one.sample}`).join(", "));
  }
  byId("results").prepend(item);
}

function showNeighbors(place, neighbors) {
  place.hidden = false;
  for (const one of neighbors) {
    const item = document.createElement("li");
    const image = document.createElement("img");
    const name = document.createElement("span");
    image.alt = `Training image ${one.sample}`;
    name.textContent = one.name;
    item.append(image, name);
    place.querySelector("ul").append(item);
    // By fetch, which can bring the token.
    ask(one.image.slice(1)).then((answer) => (answer.ok ? answer.blob() : null)).then((content) => {
      if (content) image.src = URL.createObjectURL(content);
    });
  }
}

async function score(file) {
  say(`Scoring ${file.name} …`);
  try {
    const body = new FormData();
    body.append("images", file);
    const answer = await ask(`v1/score?neighbors=${NEIGHBORS}`, { method: "POST", body });
    const found = await answer.json();
    if (found.results) { say(""); show(file, found.results[0]); } else { say(found.error); }
  } catch {
    say("The service cannot be reached.");
  }
}

async function scoreAll(files) {
  for (const file of files) await score(file);
  showDrift();
}

const drop = byId("drop");
byId("files").addEventListener("change", (event) => { scoreAll([...event.target.files]); });
document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  scoreAll([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => { scoreAll([...event.clipboardData.files]); });
byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token-text").value;
  sessionStorage.setItem("token", token);
  describe();
});
describe();
