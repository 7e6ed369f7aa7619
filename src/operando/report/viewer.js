"use strict";
// Draws sibling completions as token heat maps. Reads the JSON in #data; samples.py says how the
// bytes were made: v = sign(q) * scale * (q / 127)^2, and -128 means "no value". Text from a model
// only ever enters the page through textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("viewer");
  const MISSING = -128;
  const state = { run: 0, set: 0, group: 0, channel: 0 };

  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") node.textContent = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  function decode(base64) {
    const text = atob(base64);
    const bytes = new Int8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = (text.charCodeAt(i) << 24) >> 24;
    return bytes;
  }

  function valueOf(q, scale) {
    return Math.sign(q) * scale * (q / 127) * (q / 127);
  }

  function colour(q) {
    if (q === MISSING || q === 0) return "";
    const strength = (0.7 * Math.abs(q)) / 127;
    return `rgba(var(${q > 0 ? "--red" : "--blue"}), ${strength.toFixed(3)})`;
  }

  function number(x) {
    if (x === 0) return "0";
    const size = Math.abs(x);
    const text = size >= 100 ? size.toFixed(0) : size >= 0.001 ? String(Number(size.toPrecision(3))) : size.toExponential(1);
    return (x < 0 ? "\u2212" : "+") + text;
  }

  function shown(token) {
    return token.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5\t");
  }

  const tip = element("div", { id: "tip", hidden: true });
  document.body.append(tip);

  function showTip(event, sample, bytes, i) {
    const lines = data.channels.map((channel, c) => {
      const q = bytes[c * sample.tokens.length + i];
      return `${channel.label}: ${q === MISSING ? "none" : number(valueOf(q, channel.scale))}`;
    });
    tip.textContent = `${JSON.stringify(sample.tokens[i])}  token ${i + 1} of ${sample.tokens.length}\n${lines.join("\n")}`;
    tip.hidden = false;
    const box = event.target.getBoundingClientRect();
    const left = Math.min(box.left, window.innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6;
    const fits = below + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${fits ? below : box.top - tip.offsetHeight - 6}px`;
  }

  function tokens(sample) {
    const bytes = decode(sample.data);
    const offset = state.channel * sample.tokens.length;
    const node = element("div", { class: "tokens" });
    sample.tokens.forEach((token, i) => {
      const span = element("span", { text: shown(token) });
      span.style.backgroundColor = colour(bytes[offset + i]);
      span.addEventListener("pointerenter", (event) => showTip(event, sample, bytes, i));
      span.addEventListener("pointerdown", (event) => showTip(event, sample, bytes, i));
      span.addEventListener("pointerleave", () => { tip.hidden = true; });
      node.append(span);
    });
    return node;
  }

  function card(sample) {
    const parts = Object.entries(sample.parts);
    const head = element("div", { class: "head" },
      element("strong", { text: `sample ${sample.sample}` }),
      element("span", { class: sample.correct ? "right" : "wrong", text: sample.correct ? "right" : "wrong" }),
      element("span", { text: sample.reward === null ? "reward none" : `reward ${number(sample.reward)}` }),
      element("span", { text: `advantage ${number(sample.advantage)}` }));
    if (parts.length > 1) {
      head.append(element("span", { class: "soft", text: parts.map(([k, v]) => `${k} ${number(v)}`).join(", ") }));
    }
    if (sample.truncated) head.append(element("span", { class: "tag warn", text: "truncated" }));
    if (sample.discarded) head.append(element("span", { class: "tag warn", text: "discarded: not trained on" }));
    const node = element("div", { class: sample.discarded ? "sample discarded" : "sample" }, head, tokens(sample));
    if (!["", "right", "wrong"].includes(sample.reason)) node.append(element("div", { class: "reason", text: `Verifier: ${sample.reason}` }));
    return node;
  }

  function select(label, options, chosen, change) {
    const node = element("select", { onchange: (event) => change(Number(event.target.value)) });
    options.forEach((text, i) => node.append(element("option", { value: i, text, selected: i === chosen })));
    return element("label", { text: label }, node);
  }

  function step(by, groups) {
    const to = state.group + by;
    return element("button", {
      type: "button", text: by < 0 ? "Previous" : "Next", disabled: to < 0 || to >= groups.length,
      onclick: () => { state.group = to; draw(); },
    });
  }

  function summary(group) {
    const right = group.samples.filter((s) => s.correct).length;
    // the question itself, not the chat markers or the "A:" around it
    const lines = group.prompt.replace(/<\|[^|]*\|>/g, " ").split("\n").map((l) => l.trim()).filter((l) => l);
    const asked = lines.filter((l) => l.endsWith("?"));
    const text = asked.pop() || lines.slice(-3).sort((x, y) => y.length - x.length)[0] || "";
    const cut = text.length > 72 ? `${text.slice(0, 70)}\u2026` : text;
    return `${right}/${group.samples.length} right: ${cut} (step ${group.step}, group ${group.group})`;
  }

  // siblings that differ are what the update learns from, so the first such group opens
  function firstMixed(groups) {
    const i = groups.findIndex((g) => new Set(g.samples.map((s) => s.reward)).size > 1);
    return Math.max(0, i);
  }

  function key(channel) {
    const stops = [];
    for (let i = -8; i <= 8; i++) {
      const q = Math.sign(i) * Math.sqrt(Math.abs(i) / 8) * 127;
      stops.push(`${colour(q) || "transparent"} ${((i + 8) / 16) * 100}%`);
    }
    const gradient = element("i", {});
    gradient.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const ends = element("span", {},
      ...[-channel.scale, 0, channel.scale].map((x) => element("b", { text: number(x) })));
    return element("div", { class: "key" },
      element("div", { class: "bar" }, gradient, ends),
      element("span", { text: `${channel.label}: ${channel.meaning}. Strength of colour grows with the square root.` }));
  }

  function draw() {
    const run = data.runs[state.run];
    const set = run.sets[state.set];
    tip.hidden = true;
    const controls = element("div", { class: "controls" });
    if (data.runs.length > 1) {
      controls.append(select("run", data.runs.map((r) => r.name), state.run, (i) => choose(i, 0)));
    }
    if (!set) {
      root.replaceChildren(controls, element("p", { class: "soft", text: "This run has recorded no rollouts." }));
      return;
    }
    const group = set.groups[state.group];
    const more = set.groups.length < set.of ? ` (${set.groups.length} of ${set.of} problems are on this page)` : "";
    controls.append(
      select("rollouts of", run.sets.map((s) => s.label), state.set, (i) => choose(state.run, i)),
      select(`problem${more}`, set.groups.map(summary), state.group, (i) => { state.group = i; draw(); }),
      element("div", { class: "toggle" }, step(-1, set.groups), step(1, set.groups)));
    const toggle = element("div", { class: "toggle", role: "group", "aria-label": "colour by" },
      ...data.channels.map((channel, c) => element("button", {
        type: "button", text: channel.label, "aria-pressed": String(c === state.channel),
        onclick: () => { state.channel = c; draw(); },
      })));
    const parts = [controls, toggle, key(data.channels[state.channel])];
    parts.push(element("div", { class: "prompt", text: group.prompt }));
    const note = group.note ? ` ${group.note[0].toUpperCase()}${group.note.slice(1)}.` : "";
    parts.push(element("p", { class: "soft", text: `Gold answer ${group.answer}.${note}` }));
    parts.push(element("div", { class: "siblings" }, ...group.samples.map(card)));
    root.replaceChildren(...parts);
  }

  function choose(run, set) {
    state.run = run;
    state.set = set;
    const chosen = data.runs[run].sets[set];
    state.group = chosen ? firstMixed(chosen.groups) : 0;
    draw();
  }

  window.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  choose(0, 0);
})();
