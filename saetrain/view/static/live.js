// What needs the model: the features of a pasted text, and steering.

import { get, lines, send } from "/static/api.js";
import { chip, even, featureLink, h, section, short, visible } from "/static/dom.js";
import { chooser } from "/static/tokens.js";

const EXAMPLE = "Our thanks are due to Almighty God, and to the farmers of this country.";

function needsModel(main, title) {
  main.append(h("h1", {}, title), h("p.empty", {}, "This needs the model: start the page with ", h("code", {}, "saetrain view FEATURES --model NAME"), "."));
}

export async function text(main, { facts, query, go }) {
  if (!facts.model) return needsModel(main, "Features of a text");
  const given = query.get("t") ?? "";
  const area = h("textarea", { id: "pasted", rows: 4, "aria-label": "Text to read", placeholder: EXAMPLE }, given);
  main.append(
    h("h1", {}, "Features of a text"),
    h(
      "form.card",
      {
        onsubmit: (event) => {
          event.preventDefault();
          go(`/text?t=${encodeURIComponent(area.value || EXAMPLE)}`);
        },
      },
      area,
      h("div.bar", {}, h("span.note.grow", {}, `${facts.model.name}, layer ${facts.model.layer}`), h("button", { type: "submit" }, "Read")),
    ),
  );
  if (!given) return;
  const found = await send("text", { text: given });
  const names = new Map();
  const shown = h("div.card");
  const details = h("div.card");
  let [token, feature] = [null, found.whole[0] ?? null];
  const name = async (id) => {
    if (!names.has(id)) names.set(id, await get(`feature/${id}`).catch(() => ({ label: "", tokens: [] })));
    return names.get(id);
  };
  const row = (id, value) => {
    const about = h("span.tokens");
    name(id).then((f) => about.append(f.label ? h("span.label", {}, f.label) : "", ...f.tokens.slice(0, 4).map((t) => chip(t.text ?? String(t.id)))));
    const over = found.whole.find((one) => one.id === id);
    const mark = over && h("button.quiet.small", { type: "button", "aria-label": `Mark feature ${id} in the text`, "aria-pressed": String(over === feature), onclick: () => { feature = over; draw(); } }, over === feature ? "marked" : "mark");
    return h("li", {}, featureLink(id), about, h("span.size", {}, even(value)), h("span.along", {}, mark));
  };
  function draw() {
    const most = feature ? feature.value : 1;
    const pick = (i) => {
      token = token === i ? null : i;
      draw();
    };
    shown.replaceChildren(
      h("p.note", {}, feature ? ["Marked: ", featureLink(feature.id), ". Choose a token to see its features."] : "No feature is active.", found.heavy.length ? ` Left out as heavy rows (attention sinks): ${found.heavy.map((i) => visible(found.tokens[i])).join(" ")}.` : ""),
      chooser(found.tokens, feature && feature.acts, most, pick, token),
    );
    const list = token === null ? found.whole.map((one) => [one.id, one.value]) : found.features[token];
    details.replaceChildren(
      h("h2", {}, token === null ? "Most active anywhere in the text" : ["Most active on ", h("code", {}, visible(found.tokens[token]))]),
      h("ul.near", {}, list.map(([id, value]) => row(id, value))),
    );
  }
  draw();
  main.append(shown, details);
}

export async function steer(main, { facts, query, go, tell }) {
  if (!facts.model) return needsModel(main, "Steering");
  const ids = (query.get("feature") ?? "").split(",").filter(Boolean);
  const field = (id, name, attributes) => h("label", { for: id }, name, h("input", { id, ...attributes }));
  const option = (value, chosen) => h("option", { value, selected: value === chosen }, value);
  const prompt = h("textarea", { id: "prompt", rows: 3, "aria-label": "Prompt" }, query.get("prompt") ?? (facts.model.chat ? "What are you?" : "I think"));
  const strength = h("input", { id: "strength", type: "range", min: 0, max: 1, step: 0.05, value: query.get("value") ?? 0.45 });
  const told = h("output", { for: "strength" });
  const unit = h("select", { id: "unit" }, ["norm", "max"].map((one) => option(one, query.get("unit") ?? "norm")));
  const turned = [];
  // The strength in all units, for the first feature that is turned.
  const tellStrength = () => {
    const [value, f, norm] = [Number(strength.value), turned[0], facts.model.median_norm];
    const known = f && f.max && f.length && norm;
    const activation = known && (unit.value === "norm" ? (value * norm) / f.length : value * f.max);
    told.textContent = known ? `${short(value)}: activation ${short(activation)}, ${short((activation * f.length) / norm)} of the norm, ${short(activation / f.max)} of its largest` : short(value);
  };
  const bound = () => { strength.max = unit.value === "norm" ? 1 : 4; };
  bound();
  strength.value = query.get("value") ?? 0.45;
  strength.addEventListener("input", tellStrength);
  unit.addEventListener("change", () => { bound(); tellStrength(); });
  tellStrength();
  const method = h("select", { id: "method" }, ["clamp", "add", "ablate"].map((one) => option(one, query.get("method") ?? "clamp")));
  const chosen = field("features", "Features", { value: ids.join(","), inputmode: "numeric", placeholder: "603 or 603,88" });
  const seed = field("seed", "Seed", { type: "number", min: 0, value: query.get("seed") ?? 0 });
  const warmth = field("temperature", "Temperature", { type: "number", min: 0, max: 2, step: 0.1, value: query.get("temperature") ?? 0 });
  const tokens = field("tokens", "Tokens", { type: "number", min: 1, max: facts.model.most_tokens, value: query.get("tokens") ?? 48 });
  const button = h("button", { type: "submit" }, "Write");
  const nothing = () => h("span.note", {}, "Nothing is written yet.");
  const [plain, steered, cost] = [h("p.written", {}, nothing()), h("p.written", {}, nothing()), h("p.note")];
  const about = h("p.note");
  for (const id of ids) {
    get(`feature/${id}`)
      .then((f) => {
        about.append(h("span.turned", {}, featureLink(f.id, f.label, "Feature "), ...f.tokens.slice(0, 4).map((t) => chip(t.text ?? String(t.id))), `largest activation ${short(f.max)}`));
        turned.push(f);
        tellStrength();
      })
      .catch((error) => tell(error.message));
  }
  const value = (label) => label.querySelector("input").value;
  const form = h(
    "form.card.steering",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        const list = value(chosen).split(/[\s,]+/).filter(Boolean);
        const wrong = list.filter((id) => !/^\d+$/.test(id));
        if (wrong.length) return tell(`Features are given by their numbers, as 603,88; not ${wrong.join(", ")}.`);
        const state = { feature: list.join(","), prompt: prompt.value, value: strength.value, unit: unit.value, method: method.value, seed: value(seed), temperature: value(warmth), tokens: value(tokens) };
        go(`/steer?${new URLSearchParams(state)}`, { stay: true });
        for (const part of [plain, steered, cost]) part.replaceChildren();
        button.disabled = true;
        button.textContent = "Writing…";
        try {
          const turns = list.map((id) => ({ feature: Number(id), method: method.value, value: Number(strength.value), unit: unit.value }));
          const body = { turns, prompt: prompt.value, chat: facts.model.chat, tokens: Number(state.tokens), seed: Number(state.seed), temperature: Number(state.temperature) };
          for await (const piece of lines("steer", body)) {
            if (piece.which === "plain") plain.append(piece.text);
            else if (piece.which === "steered") steered.append(piece.text);
            else if (piece.which === "end") cost.append(`Edited rows moved by ${short(piece.moved)} of their length on average.`);
            else tell(piece.text);
          }
        } catch (error) {
          tell(error.message);
        } finally {
          button.disabled = false;
          button.textContent = "Write";
        }
      },
    },
    h("label", { for: "prompt" }, "Prompt"),
    prompt,
    h("div.fields", {}, chosen, h("label", { for: "method" }, "Method", method), h("label.double", { for: "strength" }, "Strength", strength, told), h("label", { for: "unit" }, "In shares of", unit), seed, warmth, tokens),
    h("div.bar", {}, h("span.note.grow", {}, `norm: the layer's median, ${short(facts.model.median_norm)}; max: the feature's largest activation. From 0.3 to 0.6 of the norm is a good beginning; more destroys the text.`), button),
  );
  main.append(h("h1", {}, "Steering"), about, form, h("div.two", {}, section("Plain", plain), section("Steered", steered)), cost);
}

