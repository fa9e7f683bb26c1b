"use strict";
/* The samples: one page of prompts with all their answers, sorted, searched, and with the differences marked. */

const Samples = (() => {
  const PAGE = 10;
  const { make, show } = Curves;
  const state = { collections: [], seed: 0, chosen: 0, sort: "order", query: "", page: 0, marks: true };
  const texts = new WeakMap(); // row -> all its text in lower case
  const at = (id) => document.getElementById(id);

  /** A number from 0 to 1 that follows from a seed and a row (FNV-1a, then a mix). */
  const chance = (seed, id) => {
    let hash = 2166136261 ^ seed;
    for (const character of id) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
    hash = Math.imul(hash ^ (hash >>> 15), 2246822507);
    hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
    return ((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32;
  };

  const keys = {
    gain: (row) => row.gain === null ? null : -row.gain, loss: (row) => row.gain,
    change: (row) => row.change === null ? null : -row.change, same: (row) => row.change,
    longest: (row) => row.length === null ? null : -row.length, shortest: (row) => row.length,
    random: (row) => chance(state.seed, row.id),
  };

  const text = (row) => {
    if (!texts.has(row)) texts.set(row, [row.id, row.prompt, ...Object.values(row.answers).map((each) => each.parts.join(""))].join("\n").toLowerCase());
    return texts.get(row);
  };

  const found = () => {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = state.collections[state.chosen].rows.filter((row) => words.every((word) => text(row).includes(word)));
    const key = keys[state.sort];
    // Rows without the measure come last; the sort is stable, so that equal ones stay in order.
    return key ? rows.map((row) => [key(row), row]).sort(([a], [b]) => (a ?? Infinity) - (b ?? Infinity) || 0).map(([, row]) => row) : rows;
  };

  const short = (value) => Number.isInteger(value) ? show(value) : (Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(3)).replace("-", "−");
  const signed = (value) => (value > 0 ? "+" : "") + short(value);

  const answer = (collection, name, own) => {
    const role = name === collection.old && collection.old !== collection.new ? "old" : name === collection.new ? "new" : "";
    const box = make("div", "", { class: `answer ${role}` });
    const head = make("h4", collection.sources[name]);
    const numbers = Object.entries(own.numbers).map(([kind, value]) => `${{ length: "tokens", kl: "KL" }[kind] ?? kind} ${short(value)}`);
    if (!own.ended) numbers.push("no EOS");
    head.append(make("span", numbers.join(" · "), { class: "ci" }));
    const body = make("p", "", { class: "text", dir: "auto" });
    own.parts.forEach((part, index) => {
      const words = part.trimStart(); // the blanks before a word are not marked
      if (index % 2) body.append(part.slice(0, part.length - words.length), make(role === "old" ? "del" : "ins", words));
      else body.append(part);
    });
    if (!body.textContent) body.append(make("i", "(empty)"));
    box.append(head, body);
    return box;
  };

  const card = (collection, row) => {
    const box = make("article", "", { class: "sample", "aria-label": row.head });
    const head = make("header");
    head.append(make("h3", row.head, { dir: "auto" }));
    if (row.gain !== null) head.append(make("span", `${collection.measure} ${signed(row.gain)}`, { class: `tag ${row.gain > 0 ? "good" : row.gain < 0 ? "bad" : ""}` }));
    if (row.change !== null) head.append(make("span", row.change ? `${Math.round(100 * row.change)} % changed` : "unchanged", { class: "tag" }));
    const details = make("details");
    details.append(make("summary", "Prompt"), make("div", row.prompt, { class: "text", dir: "auto" }));
    const answers = make("div", "", { class: "answers", tabindex: "0", role: "group", "aria-label": "Answers" });
    for (const name of Object.keys(collection.sources)) if (row.answers[name]) answers.append(answer(collection, name, row.answers[name]));
    box.append(head, details, answers);
    return box;
  };

  const render = () => {
    const collection = state.collections[state.chosen], rows = found();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    at("rows").replaceChildren(...rows.slice(PAGE * state.page, PAGE * (state.page + 1)).map((row) => card(collection, row)));
    at("rows").classList.toggle("marked", state.marks);
    at("page").textContent = `Page ${state.page + 1} of ${pages}`;
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page === pages - 1;
    at("counted").textContent = rows.length === collection.rows.length ? `${rows.length} prompts` : `${rows.length} of ${collection.rows.length} prompts`;
    at("sort").value = state.sort;
    for (const button of document.querySelectorAll("[data-sort]")) button.setAttribute("aria-pressed", button.dataset.sort === state.sort);
    for (const button of document.querySelectorAll("[data-collection]")) {
      button.textContent = state.collections[button.dataset.collection].words;
      button.setAttribute("aria-pressed", Number(button.dataset.collection) === state.chosen);
    }
    const legend = at("legend");
    legend.replaceChildren();
    if (collection.old !== collection.new) {
      legend.className = "quiet marked";
      legend.append("Marked: ", make("del", `only ${collection.sources[collection.old]}`), ", ", make("ins", `only ${collection.sources[collection.new]}`), `. Gain: ${collection.sources[collection.new]} minus ${collection.sources[collection.old]}${collection.measure ? `, by ${collection.measure}` : ""}.`);
    }
  };

  const change = (values) => { Object.assign(state, { page: 0 }, values); render(); };
  const turn = (by) => { state.page += by; render(); at("samples").scrollIntoView(); };

  return {
    state, found,
    /** Show these collections; what the reader has chosen stays. */
    mount(collections, seed) {
      if (!at("rows")) return;
      Object.assign(state, { collections, seed, chosen: Math.min(state.chosen, collections.length - 1) });
      if (at("rows").dataset.bound) return render();
      at("rows").dataset.bound = "yes";
      at("search").value = state.query;
      at("search").addEventListener("input", (event) => change({ query: event.target.value }));
      at("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
      at("marks").addEventListener("change", (event) => { state.marks = event.target.checked; render(); });
      at("previous").addEventListener("click", () => turn(-1));
      at("next").addEventListener("click", () => turn(1));
      for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => change({ sort: button.dataset.sort === state.sort ? "order" : button.dataset.sort }));
      for (const button of document.querySelectorAll("[data-collection]")) button.addEventListener("click", () => change({ chosen: Number(button.dataset.collection) }));
      render();
    },
  };
})();
