"use strict";
/* The page: its controls, light and dark, and, while a run goes on, the news from its server. */

(() => {
  const at = (id) => document.getElementById(id);
  const read = (page) => JSON.parse(page.getElementById("data").textContent);
  const POLL_MS = 2000;
  const parts = (page) => new Map([...page.querySelectorAll("[data-part]")].map((part) => [part.dataset.part || part.id, part]));
  // As the server has sent them. Only parts that differ are put in anew, so that place, zoom and what is open stay.
  const before = new Map([...parts(document)].map(([id, part]) => [id, part.innerHTML]));

  const mount = (data) => {
    Curves.mount(data.charts);
    Samples.mount(data.samples, data.seed);
    Tokens.mount(data.tokens);
  };

  const label = () => { at("window").textContent = Curves.settings.half ? `${2 * Curves.settings.half + 1} steps` : "none"; };
  if (at("smoothing")) {
    Curves.settings.half = Number(at("smoothing").value);
    label();
    at("smoothing").addEventListener("input", (event) => { Curves.settings.half = Number(event.target.value); label(); Curves.redraw(); });
    at("raw").addEventListener("change", (event) => { Curves.settings.raw = event.target.checked; Curves.redraw(); });
    at("reset").addEventListener("click", () => Curves.reset());
  }
  // On paper the colours are the light ones, and the columns narrower.
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", () => Curves.redraw());
  mount(read(document));

  const links = new Map([...document.querySelectorAll(".bar nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) for (const [id, link] of links) id === target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) if (at(id)) seen.observe(at(id));

  if (!("live" in document.body.dataset)) return;
  let state = document.body.dataset.live;
  const refresh = async () => {
    const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    const [now, here] = [parts(page), parts(document)];
    if ([...now.keys()].join() !== [...here.keys()].join()) return location.reload();
    for (const [id, part] of now) {
      if (before.get(id) === part.innerHTML) continue;
      if (part.id !== "samples" && part.id !== "tokens") { // those two are made from the data
        const open = [...here.get(id).querySelectorAll("details[id][open]")].map((each) => each.id);
        here.get(id).replaceChildren(...[...part.childNodes].map((node) => document.importNode(node, true)));
        for (const each of open) if (at(each)) at(each).open = true;
      }
      before.set(id, part.innerHTML);
    }
    mount(read(page));
    state = page.body.dataset.live;
  };
  const say = (words) => { if (at("live").textContent !== words) at("live").textContent = words; };
  const poll = async () => {
    try {
      if (await (await fetch("/state")).text() !== state) await refresh();
      say("live");
    } catch { say("server away"); }
    setTimeout(poll, POLL_MS);
  };
  poll();
})();
