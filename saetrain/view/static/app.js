// The address is the state: each view is drawn from it alone.  Keys: j k next and previous, / search, c compare.

import { get } from "/static/api.js";
import { h, link, whole } from "/static/dom.js";
import { compare, feature } from "/static/feature.js";
import { steer, text } from "/static/live.js";
import { overview, searched } from "/static/overview.js";
import { interactions } from "/static/pairs.js";
import { run } from "/static/run.js";

const main = document.getElementById("main");
const status = document.getElementById("status");
const search = document.getElementById("search");
const tray = document.getElementById("tray");
const VIEWS = { "": overview, search: searched, feature, compare, text, steer, interactions, run };
const MOST_PINS = 4;
let facts = null;
let around = {};
let turn = 0;

function tell(message) {
  status.textContent = message;
  setTimeout(() => { if (status.textContent === message) status.textContent = ""; }, 6000);
}

function go(address, { stay = false } = {}) {
  history.pushState(null, "", address);
  if (!stay) draw();
}

function pins() {
  return JSON.parse(sessionStorage.getItem("pins") ?? "[]");
}

function pin(id) {
  const held = pins();
  const next = held.includes(id) ? held.filter((one) => one !== id) : [...held, id].slice(-MOST_PINS);
  sessionStorage.setItem("pins", JSON.stringify(next));
  drawTray();
  tell(next.includes(id) ? `Feature ${whole(id)} is in the comparison` : `Feature ${whole(id)} is out of the comparison`);
}

function drawTray() {
  const held = pins();
  tray.hidden = !held.length;
  tray.replaceChildren(
    ...held.map((id) => h("button.chip", { type: "button", "aria-label": `Leave out feature ${id}`, onclick: () => pin(id) }, `${whole(id)}  ✕`)),
    held.length > 1 ? link(`/compare?ids=${held.join(",")}`, h("span.button", {}, `Compare ${held.length}`)) : h("span.note", {}, "choose another to compare"),
  );
}

async function draw() {
  const mine = ++turn;
  const address = new URL(location.href);
  const [, view, id] = address.pathname.split("/");
  const page = h("div.page");
  around = {};
  try {
    facts ??= await get("facts");
    document.getElementById("name").textContent = facts.name;
    const draws = VIEWS[view];
    if (!draws) throw new Error(`there is no page ${address.pathname}`);
    const found = await draws(page, { facts, id, query: address.searchParams, go, tell, pin });
    if (mine !== turn) return;
    around = found ?? {};
    if (view === "feature") around.id = Number(id);
  } catch (error) {
    if (mine !== turn) return;
    page.replaceChildren(h("h1", {}, "This cannot be shown"), h("p.empty", {}, error.message));
  }
  main.replaceChildren(page);
  document.title = `${page.querySelector("h1")?.textContent ?? ""} · ${facts ? facts.name : "saetrain"}`;
  document.getElementById("query").value = view === "search" ? (address.searchParams.get("q") ?? "") : "";
  const named = [["/", "Features", ""], ["/text", "Text", "text"], ["/steer", "Steer", "steer"], ...(facts?.interactions.length || view === "interactions" ? [["/interactions", "Interactions", "interactions"]] : []), ["/run", "Run", "run"]];
  document.getElementById("nav").replaceChildren(
    ...named.map(([href, name, which]) => {
      const made = link(href, name);
      if (which === view) made.setAttribute("aria-current", "page");
      return made;
    }),
  );
  drawTray();
  main.dataset.ready = String(mine);
  window.scrollTo(0, 0);
}

document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a[data-link]");
  if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  go(anchor.getAttribute("href"));
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    document.getElementById("query").focus();
  } else if (event.key === "j" && around.next !== undefined && around.next !== null) go(`/feature/${around.next}${around.tail}`);
  else if (event.key === "k" && around.previous !== undefined && around.previous !== null) go(`/feature/${around.previous}${around.tail}`);
  else if (event.key === "c" && around.id !== undefined) pin(around.id);
});

search.addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = document.getElementById("query").value.trim();
  document.getElementById("query").blur();
  if (facts && /^\d+$/.test(asked) && Number(asked) < facts.latents) go(`/feature/${Number(asked)}`);
  else go(`/search?q=${encodeURIComponent(asked)}`);
});

document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const next = (document.documentElement.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
});

if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
window.addEventListener("popstate", draw);
draw();
