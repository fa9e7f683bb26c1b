// The page on which people rank. State is in one object; what a person or another model wrote goes into the page as
// text only (textContent), never as markup.
"use strict";

const app = document.getElementById("app");
const { root, mode, store } = app.dataset;
const rates = app.dataset.ratings === "1";
const csrf = document.querySelector("meta[name=csrf]").content;
const LETTERS = "ABCDEFGHI";
const RATINGS = [1, 2, 3, 4, 5, 6, 7];
const PENDING = `pending ${store} `; // what the server has not confirmed yet, by time and key: two tabs have one each
let state = null; // of the item on the page; see `show`
let undone = []; // earlier values of `state.mine` and `state.focus`, for U
let sending = false;
let polling = 0;

const $ = (id) => document.getElementById(id);
const element = (tag, className, text, attributes = {}) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};
const say = (text) => { $("said").textContent = text; };
const banner = (text) => { $("banner").textContent = text; $("banner").hidden = !text; };
const remember = (place, value) => {
  try { localStorage.setItem(place, value); } catch { /* it is full, or forbidden: all is on the page, and goes to the server */ }
};
const typing = (target) => target.matches("textarea, input:not([type=checkbox])");

// --- The server ----------------------------------------------------------------------------------------------------

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(root + path, { ...options, credentials: "same-origin" });
  } catch {
    throw Object.assign(new Error("no connection"), { again: true });
  }
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  throw Object.assign(new Error(content.error || `error ${response.status}`), { again: response.status === 429 || response.status >= 500 });
}

// Asks until there is an answer: a lost connection costs time, never a judgement.
async function insist(path, body, what) {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const content = await call(path, body);
      banner("");
      return content;
    } catch (error) {
      if (!error.again) throw error;
      banner(`${what}: ${error.message}. Trying again; you can leave this page open.`);
      await new Promise((go) => { setTimeout(go, wait); addEventListener("online", go, { once: true }); });
    }
  }
}

async function load(query, push) {
  show(await insist(`/api/item${query}`, undefined, "Cannot load"), push);
}

async function send(body, place = `${PENDING}${Date.now()} ${body.key}`) {
  remember(place, JSON.stringify(body));
  try {
    await insist("/api/judgement", body, "Not saved yet");
    localStorage.removeItem(draftName(body.item, body.repeat));
    return true;
  } catch (error) {
    banner(`Not saved: ${error.message}`);
    return false;
  } finally {
    localStorage.removeItem(place); // saved, or refused for good: the reason is on the page
  }
}

// While the work is under way, nothing on the page changes: a key that comes early must not go to the item that leaves.
async function alone(work) {
  if (sending) return;
  sending = true;
  document.body.classList.add("busy");
  try {
    await work();
  } catch (error) {
    banner(error.message);
  } finally {
    sending = false;
    document.body.classList.remove("busy");
  }
}

// --- The item ------------------------------------------------------------------------------------------------------

const draftName = (item, repeat) => `draft ${store} ${mode} ${item} ${repeat}`;

function blank(count) {
  return { ranks: Array(count).fill(0), ratings: Array(count).fill(null), flags: [], note: "", pairs: { groups: [[0]], low: 0, high: 1, asked: [] } };
}

function show({ item, standing }, push) {
  clearTimeout(polling);
  showStanding(standing);
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  undone = [];
  const there = Boolean(item);
  $("nothing").hidden = there;
  for (const id of ["prompt", "answers", "tray"]) $(id).hidden = !there;
  if (!there) {
    state = null;
    history.replaceState(null, "", `${root}/`);
    polling = setTimeout(() => alone(() => load("", false)), 15000);
    say("Nothing is left for you");
    return;
  }
  const address = `${root}/?item=${encodeURIComponent(item.id)}&repeat=${item.repeat}`;
  if (location.pathname + location.search !== address) history[push ? "pushState" : "replaceState"](null, "", address);
  const mine = blank(item.answers.length);
  if (item.mine) {
    Object.assign(mine, { flags: item.mine.flags, note: item.mine.note });
    if (item.mine.ranks && mode === "rank") mine.ranks = item.mine.ranks;
    if (item.mine.ratings) mine.ratings = item.mine.ratings;
    if (mode === "pairs") mine.flags = mine.flags.filter(([flag]) => flag !== "bad");
  }
  const draft = localStorage.getItem(draftName(item.id, item.repeat));
  state = { item, mine: draft ? JSON.parse(draft) : mine, focus: 0, seconds: 0, since: document.hidden ? null : performance.now() };
  $("again").hidden = !item.mine;
  $("note").value = state.mine.note;
  $("note-row").hidden = !state.mine.note;
  showPrompt();
  build();
  update();
  scrollTo(0, 0);
  $("prompt").scrollTop = 0;
  mark(compared()[0], true);
  say(`${item.answers.length} answers to rank`);
}

function showStanding({ done, left, pace }) {
  $("progress").max = Math.max(1, done + left);
  $("progress").value = done;
  const minutes = pace && Math.ceil((pace * left) / 60);
  const parts = [`${done} done`, `${left} left`];
  if (pace) parts.push(`${Math.round(pace)} s each`);
  if (minutes > 1 && left) parts.push(minutes < 90 ? `about ${minutes} min` : `about ${Math.round(minutes / 60)} h`);
  $("standing").textContent = parts.join(" · ");
}

function showPrompt() {
  const { turns, prompt } = state.item;
  const dialogue = turns.some((turn) => turn.role);
  const asText = !dialogue || localStorage.getItem("view") === "text";
  $("view").hidden = !dialogue;
  $("view").firstChild.textContent = asText ? "Show as dialogue " : "Show as text ";
  const shown = asText ? [{ role: "", text: prompt }] : turns;
  $("turns").replaceChildren(...shown.map(({ role, text }) => {
    const turn = element("div", `turn ${role}`);
    if (role) turn.append(element("span", "role", role));
    turn.append(element("p", "text", text));
    return turn;
  }));
}

function build() {
  const count = state.item.answers.length;
  $("answers").dataset.count = count;
  $("answers").replaceChildren(...state.item.answers.map((answer, index) => {
    const card = element("article", "card", undefined, { tabindex: "0", "data-index": index });
    const head = element("div", "head");
    head.append(element("span", "letter", LETTERS[index], { "data-drag": index }), element("span", "place"), element("span", "tags"));
    card.append(head, element("p", "text", answer));
    if (mode === "rank") card.append(digits("ranks", index, Array.from({ length: count }, (_, i) => i + 1), "Rank"));
    if (rates) card.append(digits("ratings", index, RATINGS, "Rating"));
    card.addEventListener("focus", () => mark(index, false));
    return card;
  }));
  const slots = [["", 0], ...Array.from({ length: count }, (_, i) => [String(i + 1), i + 1])];
  $("slots").replaceChildren(...slots.map(([name, rank]) => {
    const slot = element("div", rank ? "slot" : "slot pool", undefined, { "data-rank": rank });
    slot.append(element("span", "rank", name || "no rank"), element("span", "chips"));
    return slot;
  }));
  $("slots").hidden = mode === "pairs";
}

function digits(kind, index, values, title) {
  const row = element("div", `digits ${kind}`, undefined, { role: "group", "aria-label": `${title} of answer ${LETTERS[index]}` });
  row.append(element("span", "title", title));
  for (const value of values) {
    const button = element("button", "", String(value), { type: "button", "aria-label": `${title} ${value}`, "data-value": value });
    button.addEventListener("click", () => (kind === "ranks" ? rank(index, value) : rate(index, value)));
    row.append(button);
  }
  return row;
}

// What `state.mine` says, shown on the page.
function update() {
  const { mine } = state;
  const pair = compared();
  $("answers").classList.toggle("pair", mode === "pairs");
  for (const card of document.querySelectorAll(".card")) {
    const index = Number(card.dataset.index);
    card.hidden = !pair.includes(index);
    const letter = mode === "pairs" ? "AB"[pair.indexOf(index)] : LETTERS[index];
    if (letter) card.querySelector(".letter").textContent = letter;
    const value = mine.ranks[index];
    card.classList.toggle("ranked", value > 0);
    card.setAttribute("aria-label", `Answer ${letter}${mode === "rank" ? (value ? `, rank ${value} of ${pair.length}` : ", not ranked") : ""}`);
    card.querySelector(".place").textContent = mode === "rank" && value ? placeName(index) : "";
    card.querySelector(".tags").replaceChildren(...tags(index));
    for (const kind of ["ranks", "ratings"]) {
      for (const button of card.querySelectorAll(`.${kind} button`)) {
        button.setAttribute("aria-pressed", String(Number(button.dataset.value) === mine[kind][index]));
      }
    }
  }
  for (const slot of document.querySelectorAll(".slot")) {
    const inside = mine.ranks.flatMap((value, index) => (value === Number(slot.dataset.rank) ? [index] : []));
    slot.querySelector(".chips").replaceChildren(
      ...inside.map((index) => element("span", index === state.focus ? "chip marked" : "chip", LETTERS[index], { "data-drag": index })));
    slot.classList.toggle("tie", Number(slot.dataset.rank) > 0 && inside.length > 1);
  }
  $("prompt-flags").replaceChildren(...tags("prompt"));
  const complete = mine.ranks.every(Boolean);
  $("submit").classList.toggle("ready", complete);
  // Two at a time, the last choice submits. Where that was refused, all answers are there, to be sent again.
  $("submit").hidden = mode === "pairs" && !complete;
  $("choices").hidden = mode === "rank" || complete;
}

const tags = (place) => state.mine.flags.filter(([, at]) => at === place).map(([flag]) => element("span", "tag warn", flagText(flag)));
const flagText = (flag) => document.querySelector(`#flag-dialog input[value=${CSS.escape(flag)}]`)?.dataset.text || flag;

function placeName(index) {
  const value = state.mine.ranks[index];
  const tied = state.mine.ranks.flatMap((other, i) => (other === value && i !== index ? [LETTERS[i]] : []));
  return `rank ${value}${tied.length ? `, tied with ${tied.join(", ")}` : ""}`;
}

// Kept in this browser until it is submitted, so that a reload loses nothing.
function keep() {
  remember(draftName(state.item.id, state.item.repeat), JSON.stringify(state.mine));
}

function change(edit) {
  if (sending) return;
  undone.push({ mine: structuredClone(state.mine), focus: state.focus });
  edit(state.mine);
  keep();
  update();
}

// --- Ranks ---------------------------------------------------------------------------------------------------------

function mark(index, focus) {
  state.focus = index;
  for (const card of document.querySelectorAll(".card")) card.classList.toggle("marked", Number(card.dataset.index) === index);
  for (const chip of document.querySelectorAll(".chip")) chip.classList.toggle("marked", Number(chip.dataset.drag) === index);
  if (focus) document.querySelector(`.card[data-index="${index}"]`)?.focus({ preventScroll: false });
}

function rank(index, value) {
  if (sending || value > state.item.answers.length) return;
  change((mine) => { mine.ranks[index] = value; });
  const left = state.mine.ranks.filter((each) => !each).length;
  say(`Answer ${LETTERS[index]}: ${value ? placeName(index) : "no rank"}. ${left ? `${left} left` : "All ranked: Enter submits"}`);
  // The next answer without a rank, from here on; where there is none, this one stays marked.
  const order = state.mine.ranks.map((_, i) => (index + 1 + i) % state.mine.ranks.length);
  const next = value ? order.find((i) => !state.mine.ranks[i]) : index;
  mark(next ?? index, true);
}

function rate(index, value) {
  change((mine) => { mine.ratings[index] = mine.ratings[index] === value ? null : value; });
  say(`Answer ${LETTERS[index]}: rating ${state.mine.ratings[index] ?? "taken away"}`);
}

function submit() {
  const missing = state.mine.ranks.flatMap((value, index) => (value ? [] : [index]));
  if (missing.length) {
    banner(`No rank yet: ${missing.map((index) => LETTERS[index]).join(", ")}`);
    mark(missing[0], true);
    return;
  }
  finish({ ranks: state.mine.ranks, skipped: "" });
}

function finish(verdict) {
  const { item, mine } = state;
  const key = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const seconds = (state.seconds + (state.since === null ? 0 : performance.now() - state.since)) / 1000;
  const rated = mine.ratings.some((value) => value !== null);
  const body = { key, item: item.id, repeat: item.repeat, ...verdict, flags: mine.flags, ratings: rated ? mine.ratings : null, note: $("note").value, seconds, compared: mine.pairs.asked ?? [] };
  alone(async () => {
    if (!(await send(body))) return;
    say(verdict.ranks ? "Saved" : "Skipped");
    await load("", true);
  });
}

function undo() {
  if (sending) return;
  if (state && undone.length) {
    Object.assign(state, undone.pop());
    keep();
    update();
    mark(compared().includes(state.focus) ? state.focus : compared()[0], true);
    say("Undone");
    return;
  }
  alone(async () => {
    show(await call("/api/undo", {}), true);
    say("The last judgement is withdrawn; rank it again");
  });
}

// --- Pairs: the order of K answers by asking for two at a time (binary insertion) ----------------------------------

// The answers on the page: all, or the two that are compared.
function compared() {
  const { ranks, pairs } = state.mine;
  if (mode === "rank" || pairs.groups.flat().length === ranks.length) return ranks.map((_, index) => index);
  const middle = Math.floor((pairs.low + pairs.high) / 2);
  return [pairs.groups[middle][0], pairs.groups.flat().length];
}

function choose(choice) {
  if (sending || state.mine.ranks.every(Boolean)) return;
  change(({ pairs, flags, ranks }) => {
    const [old, fresh] = compared();
    const middle = Math.floor((pairs.low + pairs.high) / 2);
    (pairs.asked ??= []).push([old, { a: ">", b: "<" }[choice] ?? "=", fresh]); // ??=: a draft of an earlier page has none
    if (choice === "bad") for (const index of [old, fresh]) if (!flags.some(([flag, at]) => flag === "bad" && at === index)) flags.push(["bad", index]);
    if (choice === "a") pairs.low = middle + 1;
    else if (choice === "b") pairs.high = middle;
    else pairs.groups[middle].push(fresh);
    const placed = pairs.groups.flat().includes(fresh);
    if (!placed && pairs.low === pairs.high) pairs.groups.splice(pairs.low, 0, [fresh]);
    if (pairs.groups.flat().includes(fresh)) Object.assign(pairs, { low: 0, high: pairs.groups.length });
    if (pairs.groups.flat().length === ranks.length) pairs.groups.forEach((group, place) => group.forEach((index) => { ranks[index] = place + 1; }));
  });
  if (state.mine.ranks.every(Boolean)) finish({ ranks: state.mine.ranks, skipped: "" });
  else mark(compared()[0], true);
}

// --- Dialogs -------------------------------------------------------------------------------------------------------

function flag(place) {
  const dialog = $("flag-dialog");
  $("flag-title").textContent = place === "prompt" ? "Flag the prompt" : `Flag answer ${document.querySelector(`.card[data-index="${place}"] .letter`).textContent}`;
  // At once, not when the dialog closes: that event may come after the key that submits.
  for (const box of dialog.querySelectorAll("input")) {
    const own = ([flag, at]) => flag === box.value && at === place;
    box.checked = state.mine.flags.some(own);
    box.onchange = () => change((mine) => {
      mine.flags = box.checked ? [...mine.flags, [box.value, place]] : mine.flags.filter((each) => !own(each));
    });
  }
  dialog.showModal();
}

function skip(reason) {
  if (!reason.trim()) return;
  $("skip-dialog").close();
  finish({ ranks: null, skipped: reason.trim() });
}

for (const [id, dialog] of [["skip", "skip-dialog"], ["help", "help-dialog"]]) {
  $(id).addEventListener("click", () => { $("reason").value = ""; $(dialog).showModal(); });
}
$("flag").addEventListener("click", () => flag(document.activeElement === $("prompt") ? "prompt" : state.focus));
$("flag-prompt").addEventListener("click", () => flag("prompt"));
$("undo").addEventListener("click", undo);
$("submit").addEventListener("click", submit);
$("skip-other").addEventListener("click", () => skip($("reason").value));
$("view").addEventListener("click", () => {
  remember("view", localStorage.getItem("view") === "text" ? "dialogue" : "text");
  showPrompt();
});
$("add-note").addEventListener("click", () => { $("note-row").hidden = false; $("note").focus(); });
$("note").addEventListener("input", () => { state.mine.note = $("note").value; keep(); });
for (const button of document.querySelectorAll("[data-reason]")) button.addEventListener("click", () => skip(button.dataset.reason));
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));

// --- Keys ----------------------------------------------------------------------------------------------------------

const clicks = { u: "undo", s: "skip", f: "flag", n: "add-note", v: "view", "?": "help" };
const choices = { a: "a", b: "b", t: "tie", x: "bad" };

document.addEventListener("keydown", (event) => {
  const dialog = document.querySelector("dialog[open]");
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (dialog) return inDialog(event, dialog);
  if (typing(event.target)) {
    if (event.key === "Escape") mark(state.focus, true);
    return;
  }
  const key = event.key.toLowerCase();
  const digit = /^Digit\d$|^Numpad\d$/.test(event.code) ? Number(event.code.slice(-1)) : /^\d$/.test(key) ? Number(key) : null;
  const onButton = event.target.matches("button, a, summary");
  const used = () => event.preventDefault();
  if (key in clicks && !$(clicks[key]).closest("[hidden]") || key === "u") { used(); $(clicks[key]).click(); }
  if (!state) return;
  const pair = compared();
  const at = pair.indexOf(state.focus);
  if (key === "p") { used(); $("prompt").focus(); }
  else if (mode === "pairs" && key in choices) { used(); choose(choices[key]); }
  else if (rates && event.shiftKey && digit >= 1 && digit <= 7) { used(); rate(state.focus, digit); }
  else if (key === "arrowdown" || key === "arrowup") { used(); mark(pair[Math.min(pair.length - 1, Math.max(0, at + (key === "arrowdown" ? 1 : -1)))], true); }
  else if (key === "enter" && !onButton && !$("submit").hidden) { used(); submit(); }
  else if (mode === "pairs") return;
  else if (digit !== null && !event.shiftKey) { used(); rank(state.focus, digit); }
  else if (key === "backspace" || key === "delete") { used(); rank(state.focus, 0); }
  else if (key === "arrowleft" || key === "arrowright") {
    used();
    const index = state.focus;
    rank(index, Math.min(pair.length, Math.max(1, state.mine.ranks[index] + (key === "arrowright" ? 1 : -1))));
    mark(index, true);
  }
});

function inDialog(event, dialog) {
  if (typing(event.target)) {
    if (event.key === "Enter") { event.preventDefault(); skip($("reason").value); }
    return;
  }
  const choice = dialog.querySelectorAll("[data-reason], input[type=checkbox]")[Number(event.key) - 1];
  if (/^[1-9]$/.test(event.key) && choice) { event.preventDefault(); choice.click(); }
  if (event.key === "Enter" && dialog.id === "flag-dialog") { event.preventDefault(); dialog.close(); }
}

// --- Dragging a letter onto a rank, by mouse or finger ---------------------------------------------------------------

document.addEventListener("pointerdown", (event) => {
  const handle = event.target.closest("[data-drag]");
  if (!handle || mode !== "rank" || sending || event.button) return;
  event.preventDefault();
  const index = Number(handle.dataset.drag);
  const ghost = element("span", "chip ghost", LETTERS[index]);
  document.body.append(ghost);
  document.body.classList.add("dragging");
  mark(index, false);
  let over = null;
  const move = ({ clientX, clientY }) => {
    ghost.style.transform = `translate(${clientX}px, ${clientY}px)`;
    over?.classList.remove("over");
    over = document.elementFromPoint(clientX, clientY)?.closest(".slot");
    over?.classList.add("over");
  };
  const end = (dropped) => () => {
    over?.classList.remove("over");
    ghost.remove();
    document.body.classList.remove("dragging");
    for (const [name, listener] of listeners) removeEventListener(name, listener);
    if (dropped && over) rank(index, Number(over.dataset.rank));
  };
  const listeners = [["pointermove", move], ["pointerup", end(true)], ["pointercancel", end(false)]];
  for (const [name, listener] of listeners) addEventListener(name, listener);
  move(event);
});

// --- Time on the item, going back, and the start --------------------------------------------------------------------

document.addEventListener("visibilitychange", () => {
  if (!state) return;
  if (state.since !== null) state.seconds += performance.now() - state.since;
  state.since = document.hidden ? null : performance.now();
});
addEventListener("popstate", () => alone(() => load(location.search, false)));

alone(async () => {
  for (const place of Object.keys(localStorage).filter((each) => each.startsWith(PENDING)).sort()) {
    const pending = localStorage.getItem(place); // another tab may have sent it meanwhile
    if (pending) await send(JSON.parse(pending), place);
  }
  await load(location.search, false);
});
