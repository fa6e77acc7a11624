/** Heads: all of them by two metrics, and one of them: where it looks, its page, its circuits through the vocabulary. */
import { html, useRef, useState } from "../vendor/preact.js";
import { Looks } from "../looks.js";
import { AsJob, Busy, MethodPanel, Refusal, Result, useAnswer } from "../panel.js";
import { address, choose, chosen, jobs, large, methods, model, useSignal } from "../state.js";

const PARTS = { score: "attention to", weighted: "attention × value norm on", raises: "raises" };
const PAGE = ["score", "effect", "matched", "distance", "looks", "writes"];
const KEYS = ["score", "weighted", "raises", "copying", "distance"];

export function Heads() {
  useSignal(address);
  const name = useSignal(model)?.name;
  const question = { model: name, method: "heads.classify", values: {} }, cards = useSignal(methods);
  const job = useSignal(jobs).find((j) => j.method === question.method && j.model === name && j.result && !Object.keys(j.values).length);
  const few = !useSignal(large); // more are a job with progress
  const run = useAnswer("run", few && !job ? question : null);
  const result = job?.result ?? (few ? run.answer?.id : undefined);
  const data = useAnswer("data", result ? { model: name, result, fields: [] } : null);
  const layer = chosen("layer").replace(/\D/g, ""), head = chosen("head").replace(/\D/g, "");
  const one = layer !== "" && head !== "" && `${layer}.${head}`;
  return html`
    ${[run.refusal, data.refusal].filter(Boolean).map((r) => html`<${Refusal} refusal=${r} />`)}
    ${!data.answer && !run.refusal && html`<section class=panel><h2>Which heads do what?</h2>${few || result
    ? html`<${Busy} text="every head is measured" />` : html`<${AsJob} key=${name} question=${question} fields=${["score"]} about=${bound(cards, question.method)} />`}</section>`}
    ${data.answer && result && html`<${All} data=${data.answer} one=${one} />`}
    <${Looks} layer=${layer || "0"} head=${head} />
    ${one ? html`<div class=panels>
      <${Circuits} key=${one} one=${one} name=${name} />
      ${few ? html`<${MethodPanel} key=${`card ${one}`} method="heads.card" values=${{ head: one }} auto=${false} title=${`The page of head ${one}`}
        fields=${PAGE} />` : html`<section class=panel key=${`card ${one}`}><h2>The page of head ${one}</h2><p class=about><code>heads.card</code></p>
        <${AsJob} question=${{ model: name, method: "heads.card", values: { head: one } }} fields=${PAGE} about=${bound(cards, "heads.card")} /></section>`}</div>`
    : html`<p class=empty>Choose a head above to see its page and its circuits.</p>`}`;
}

/** The metrics of a result, each with a function that gives value, interval and control of a head. */
function metrics(data) {
  const f = data.fields, types = data.labels.type ?? [], found = [];
  const beside = (field, end) => f[field === "score" ? end : `${field}_${end}`]?.values;
  for (const field of KEYS) {
    const values = f[field]?.values, interval = beside(field, "interval"), chance = beside(field, "null");
    if (!values) continue;
    if (!f[field].axes.includes("type")) {
      found.push({ key: field, name: field === "copying" ? "copying (Σλ / Σ|λ|)" : "distance, in tokens back",
        of: (l, h) => ({ value: values[l][h], interval: interval?.[l][h], chance: chance?.[l][h] }) });
    } else {
      types.forEach((type, t) => found.push({ key: `${field}:${type}`, type, name: `${PARTS[field]} ${spoken(type)}`,
        of: (l, h) => ({ value: values[t][l][h], interval: interval?.[t][l][h], chance: chance?.[t][l][h] }) }));
    }
  }
  return found.filter((m) => points(data, m, m).length > 0);
}

const spoken = (type) => String(type).replaceAll("_", " ");
const number = (v, digits = 2) => (v == null ? "–" : v.toFixed(digits).replace("-", "−"));

/** All heads that have both metrics. */
function points(data, x, y) {
  const { values } = data.fields.claimed, types = data.labels.type ?? [], layers = data.labels.layer;
  const out = [];
  values[0].forEach((row, l) => row.forEach((_, h) => {
    const a = x.of(l, h), b = y.of(l, h);
    if (a.value == null || b.value == null) return;
    const layer = layers?.[l] ?? l;
    out.push({ name: `${layer}.${h}`, layer: String(layer), head: String(h), depth: l, x: a, y: b,
      types: types.filter((__, t) => values[t][l][h] === 1) });
  }));
  return out;
}

function All({ data, one }) {
  const known = metrics(data), pick = (name, other) => known.find((m) => m.key === chosen(name)) ?? known.find((m) => m.key === other) ?? known[0];
  const x = pick("x", "score:previous_token"), y = pick("y", "score:induction");
  const heads = points(data, x, y), choice = (name, label, now) => html`<label>${label} <select value=${now.key}
    onChange=${(e) => choose({ [name]: e.target.value })}>${known.map((m) => html`<option key=${m.key} value=${m.key}>${m.name}</option>`)}</select></label>`;
  return html`<section class="panel heads"><h2>Which heads do what?</h2>
    <p class=about><code>heads.classify</code> <span class=badge data-tip="Rung: observational.\nAttention says where a head looks, not what it causes.">reads only</span>
      <span class=badge data-tip="The same rows with their keys shuffled.">control: shuffled keys</span>
      <span>on random tokens, said twice</span></p>
    <div class=choices>${choice("x", "Across", x)}${choice("y", "Up", y)}</div>
    <div class=headsplit><${Scatter} heads=${heads} x=${x} y=${y} one=${one} /><${Table} heads=${heads} x=${x} y=${y} one=${one} /></div>
    <p class=note>A filled point is a head that a type claims: its interval lies above 0.3 and above its control. Dashed lines: the most that
      shuffled keys reach in any head.</p></section>`;
}

/** The declared bound of a method: on a large model a plan, which tries some of the work, takes too long to wait for. */
const bound = (cards, method) => `at most ${cards.get(method)?.cost ?? "some"} (F is one forward)`;

const select = (p) => choose({ layer: p.layer, head: p.head, position: "" });
const tipOf = (p, x, y) => [`head ${p.name}`, `${x.name}: ${facts(p.x)}`, `${y.name}: ${facts(p.y)}`,
  p.types.length ? `claimed: ${p.types.map(spoken).join(", ")}` : "no type claims it"].join("\n");
const facts = (m) => number(m.value) + (m.interval?.[0] != null ? ` [${number(m.interval[0])}, ${number(m.interval[1])}]` : "")
  + (m.chance?.some((v) => v != null) ? `, control ${number(mean(m.chance))}` : "");
const mean = (values) => { const some = values.filter((v) => v != null); return some.reduce((a, b) => a + b, 0) / some.length; };

const WIDE = 560, HIGH = 400, LEFT = 46, ABOVE = 34, BELOW = 50, EDGE = 14;

/** A scatter of heads: one tab stop, arrow keys walk, Enter selects. */
function Scatter({ heads, x, y, one }) {
  const group = useRef(), depth = Math.max(1, ...heads.map((p) => p.depth));
  const [sx, tx] = scale(heads.map((p) => p.x.value), LEFT, WIDE - EDGE), [sy, ty] = scale(heads.map((p) => p.y.value), HIGH - BELOW, ABOVE);
  const order = [...heads].sort((a, b) => a.x.value - b.x.value || a.y.value - b.y.value), first = order.find((p) => p.name === one) ?? order[0];
  const walk = (event) => {
    const items = [...group.current.querySelectorAll("circle")], at = items.indexOf(document.activeElement);
    if (at >= 0 && event.key === "Enter") { select(order[at]); return; }
    const next = items[at + ({ ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -at, End: items.length - 1 - at }[event.key] ?? NaN)];
    if (!next) return;
    event.preventDefault();
    next.focus();
  };
  const limit = (of) => Math.max(...heads.flatMap((p) => of(p).chance ?? []).filter((v) => v != null));
  const [lx, ly] = [limit((p) => p.x), limit((p) => p.y)];
  const inside = (v, [low, high]) => Number.isFinite(v) && v >= low && v <= high;
  const ends = (ticks) => [ticks[0], ticks[ticks.length - 1]];
  return html`<svg class=scatter viewBox=${`0 0 ${WIDE} ${HIGH}`} role=group aria-label=${`Heads: ${x.name} across, ${y.name} up`}>
    ${tx.map((v) => html`<g key=${`x${v}`} class=tick><line x1=${sx(v)} x2=${sx(v)} y1=${ABOVE} y2=${HIGH - BELOW} />
      <text x=${sx(v)} y=${HIGH - BELOW + 17} text-anchor=middle>${short(v)}</text></g>`)}
    ${ty.map((v) => html`<g key=${`y${v}`} class=tick><line x1=${LEFT} x2=${WIDE - EDGE} y1=${sy(v)} y2=${sy(v)} />
      <text x=${LEFT - 8} y=${sy(v) + 4} text-anchor=end>${short(v)}</text></g>`)}
    ${inside(lx, ends(tx)) && html`<line class=limit x1=${sx(lx)} x2=${sx(lx)} y1=${ABOVE} y2=${HIGH - BELOW} />`}
    ${inside(ly, ends(ty)) && html`<line class=limit x1=${LEFT} x2=${WIDE - EDGE} y1=${sy(ly)} y2=${sy(ly)} />`}
    <text class=axis x=${WIDE - EDGE} y=${HIGH - 8} text-anchor=end>${x.name} →</text>
    <text class=axis x=2 y=15>↑ ${y.name}</text>
    <g ref=${group} onKeyDown=${walk}>${order.map((p) => html`<circle key=${p.name} cx=${sx(p.x.value)} cy=${sy(p.y.value)} r=${p.name === one ? 8 : 5.5}
      class=${`${p.types.length ? "claimed" : ""} ${p.name === one ? "chosen" : ""}`} style=${`--depth:${p.depth / depth}`} role=button
      tabindex=${p === first ? "0" : "-1"} aria-label=${tipOf(p, x, y).replaceAll("\n", ", ")} data-tip=${tipOf(p, x, y)} onClick=${() => select(p)} />`)}</g>
    ${labelled(order, one, sx, sy).map((t) => html`<text key=${`t${t.name}`} class=name x=${t.x} y=${t.y}
      text-anchor=${t.end ? "end" : "start"}>${t.name}</text>`)}</svg>`;
}

/** Names of points, the chosen one and the farthest out first, as long as none lies on another. */
function labelled(heads, one, sx, sy) {
  const far = (p) => (p.name === one ? Infinity : Math.hypot(sx(p.x.value) - LEFT, HIGH - BELOW - sy(p.y.value))), out = [];
  for (const p of [...heads].sort((a, b) => far(b) - far(a))) {
    const end = sx(p.x.value) > WIDE - 60, t = { name: p.name, end, x: sx(p.x.value) + (end ? -10 : 10), y: sy(p.y.value) + 4 };
    const on = (o, from) => Math.abs(sy(o.y.value) - t.y + 4) < 11 && Math.abs(sx(o.x.value) - from) < 20;
    const taken = out.some((o) => Math.abs(o.x - t.x) < 30 && Math.abs(o.y - t.y) < 13);
    if (p.name === one || !(taken || heads.some((o) => o !== p && on(o, t.x + (end ? -12 : 12))))) out.push(t);
  }
  return out.slice(0, 24);
}

const short = (v) => String(Math.round(v * 1e6) / 1e6).replace("-", "−");

/** A linear scale to pixels, and round ticks. */
function scale(values, from, to) {
  const low = Math.min(0, ...values), high = Math.max(low + 1e-9, ...values), rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((s) => s * unit >= rough) * unit;
  const start = Math.floor(low / step) * step, end = Math.ceil(high / step) * step;
  const ticks = Array.from({ length: Math.round((end - start) / step) + 1 }, (_, i) => start + i * step);
  return [(v) => from + ((v - start) / (end - start)) * (to - from), ticks];
}

/** The same heads as a table, sorted by a column. */
function Table({ heads, x, y, one }) {
  const [by, sort] = useState("y"), rows = [...heads].sort((a, b) => (by === "name" ? a.depth - b.depth || a.head - b.head : b[by].value - a[by].value));
  const column = (key, words) => html`<th aria-sort=${by === key ? (key === "name" ? "ascending" : "descending") : undefined}>
    <button type=button onClick=${() => sort(key)}>${words}${by === key ? (key === "name" ? " ↑" : " ↓") : ""}</button></th>`;
  return html`<div class=headtable tabindex=0 aria-label="Heads as a table"><table class=runs><thead><tr>${column("name", "Head")}${column("x", x.name)}${column("y", y.name)}<th>Types</th></tr></thead>
    <tbody>${rows.map((p) => html`<tr key=${p.name} aria-current=${p.name === one ? "true" : undefined}>
      <td><button type=button onClick=${() => select(p)}>${p.name}</button></td><td data-tip=${facts(p.x)}>${number(p.x.value)}</td>
      <td data-tip=${facts(p.y)}>${number(p.y.value)}</td><td class=soft>${p.types.map(spoken).join(", ")}</td></tr>`)}</tbody></table></div>`;
}

const SIDES = { attends: ["From this token …", "it looks at", "QK"], writes: ["Where it looks at …", "it raises", "OV"] };

/** The strongest pairs of tokens of a head's two circuits, by its weights alone. */
function Circuits({ one, name }) {
  const run = useAnswer("run", { model: name, method: "weights.circuits", values: { heads: [one] } });
  const data = useAnswer("data", run.answer && { model: name, result: run.answer.id, fields: ["same", "strength"] });
  const refusal = run.refusal ?? data.refusal, { labels, fields, reasons } = data.answer ?? {};
  return html`<section class=panel><h2>What head ${one} matches and writes, by its weights</h2>
    <p class=about><code>weights.circuits</code> <span class=badge data-tip="Rung: observational.\nWeights on bare embeddings: what the head does in a text may differ.">reads only</span>
      <span class=badge data-tip="Targets of other sources.">control: exchanged targets</span></p>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${!data.answer && !refusal && html`<${Busy} />`}
    ${data.answer && html`<div class=circuits>${labels.circuit.map((circuit, c) => html`<div key=${circuit}><h3>${SIDES[circuit]?.[2] ?? circuit}</h3>
      ${reasons[circuit] ? html`<p class=note>${reasons[circuit]}</p>` : html`<table class=runs><thead><tr><th>${SIDES[circuit]?.[0]}</th>
        <th>${SIDES[circuit]?.[1]}</th><th data-tip="Standard deviations above the mean of the vocabulary.">σ</th></tr></thead>
        <tbody>${labels.source[c][0].map((source, i) => html`<tr key=${i}><td class=word>${source}</td><td class=word>${labels.target[c][0][i]}</td>
          <td>${number(fields.strength.values[c][0][i], 1)}</td></tr>`)}</tbody></table>`}</div>`)}</div>
      <${Result} shown=${run.answer} fields=${["same", "copying"]} />`}</section>`;
}
