"use strict";
/* A few trajectories token by token: each is coloured by one measure, and says all of them. */

const Tokens = (() => {
  const { make, show } = Curves;
  const at = (id) => document.getElementById(id);
  const difference = (row) => row.logprobs.map((value, index) => value === null || row.ref_logprobs[index] === null ? null : value - row.ref_logprobs[index]);
  const measures = {
    advantages: { words: "advantage", of: (row) => row.advantages },
    ratio: { words: "log-prob minus reference", of: difference },
    logprobs: { words: "log-prob", of: (row) => row.logprobs },
    ref_logprobs: { words: "reference log-prob", of: (row) => row.ref_logprobs },
    values: { words: "value", of: (row) => row.values },
  };
  let looks = [], chosen = "advantages";

  const strip = (row, most) => {
    const values = measures[chosen].of(row);
    const body = make("p", "", { class: "strip", role: "group", "aria-label": "Tokens", dir: "auto" });
    row.tokens.forEach((text, index) => {
      const value = values[index];
      const token = make("span", text.replaceAll("\n", "⏎\n"), { tabindex: index ? "-1" : "0", "data-index": index });
      const share = value === null || !most ? 0 : Math.round(70 * Math.min(1, Math.abs(value) / most));
      token.style.background = `color-mix(in srgb, var(--${value < 0 ? "s1" : "s0"}) ${share}%, transparent)`;
      body.append(token);
    });
    const say = (event) => {
      const index = event.target.dataset.index;
      if (index === undefined) return;
      const said = Object.values(measures).map(({ words, of }) => [words, of(row)]).filter(([, own]) => own).map(([words, own]) => `${words} ${show(own[index])}`);
      at("token").textContent = `“${row.tokens[index]}”: ${said.join(", ")}`;
    };
    body.addEventListener("pointerover", say);
    body.addEventListener("focusin", say);
    body.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: event.target.previousElementSibling, ArrowRight: event.target.nextElementSibling }[event.key];
      if (to) { to.focus(); event.preventDefault(); }
    });
    return body;
  };

  const render = () => {
    // One scale for all: a colour is the same number in every trajectory.
    const all = looks.flatMap((row) => measures[chosen].of(row) ?? []).filter((value) => value !== null).map(Math.abs);
    const most = Math.max(0, ...all);
    at("strips").replaceChildren(...looks.map((row) => {
      const box = make("article", "", { class: "sample", "aria-label": `Trajectory ${row.id}` });
      const head = make("header");
      head.append(make("h3", row.id), make("span", `step ${row.step}`, { class: "tag" }), make("span", `score ${show(row.score)}`, { class: "tag" }), ...(row.ended ? [] : [make("span", "no EOS", { class: "tag warn" })]));
      const details = make("details");
      details.append(make("summary", "Prompt"), make("div", row.prompt, { class: "text", dir: "auto" }));
      box.append(head, details, strip(row, most));
      return box;
    }));
  };

  return {
    /** Show these trajectories; the measure that the reader has chosen stays. */
    mount(found) {
      if (!at("strips")) return;
      const same = JSON.stringify(found) === JSON.stringify(looks);
      looks = found;
      if (!at("measure").options.length) {
        const known = Object.entries(measures).filter(([, { of }]) => of(looks[0]));
        at("measure").append(...known.map(([name, { words }]) => make("option", words, { value: name })));
        at("measure").addEventListener("change", (event) => { chosen = event.target.value; render(); });
      } else if (same) return;
      render();
    },
  };
})();
