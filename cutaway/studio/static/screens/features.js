/** Features: the latents of a store, sorted, filtered and searched; one of them in full; all of them on the prompt. */
import { html, useEffect, useState } from "../vendor/preact.js";
import { AsJob, Busy, MethodPanel, Refusal, useAnswer } from "../panel.js";
import { number, shade, share } from "../strip.js";
import { beside, DELTA, Sides, useSide } from "../sides.js";
import { address, choose, chosen, model, useSignal } from "../state.js";
import { Latent } from "./latent.js";

const TABS = { table: "Latents", prompt: "On the prompt", compare: "Compare", harvest: "Harvest" };

export function Features() {
  useSignal(address);
  const name = useSignal(model)?.name, [round, again] = useState(0);
  const { answer, refusal } = useAnswer("stores", { model: name }, round);
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return html`<section class=panel><${Busy} text="the model is being loaded" /></section>`;
  const { stores, dictionaries } = answer;
  const store = stores.find((s) => s.id === chosen("store")) ?? stores[0];
  const names = Object.keys(store?.dictionaries ?? {});
  const dictionary = names.includes(chosen("dictionary")) ? chosen("dictionary") : names[0];
  const tabs = Object.keys(TABS).filter((t) => (t === "harvest" ? dictionaries.length > 0 : store));
  const tab = tabs.includes(chosen("tab")) ? chosen("tab") : tabs[0];
  const at = store && { model: name, store: store.id, dictionary };
  return html`<div class=choices>
      ${store && html`<label>Store <select value=${store.id} onChange=${(e) => choose({ store: e.target.value, dictionary: "", latent: "" })}>
        ${stores.map((s) => html`<option key=${s.id} value=${s.id}>${Object.keys(s.dictionaries).map(short).join(", ")} · ${s.tokens.toLocaleString("en")} tokens (${s.name})</option>`)}</select></label>`}
      ${names.length > 1 && html`<label>Dictionary <select value=${dictionary} onChange=${(e) => choose({ dictionary: e.target.value, latent: "" })}>
        ${names.map((d) => html`<option key=${d} value=${d}>${short(d)}, ${store.dictionaries[d].toLocaleString("en")} latents</option>`)}</select></label>`}
      <span class=tabs role=tablist>${tabs.map((t) => html`<button key=${t} type=button role=tab aria-selected=${t === tab ? "true" : "false"}
        onClick=${() => choose({ tab: t })}>${TABS[t]}</button>`)}</span></div>
    ${!tab && html`<p class=empty>No store is open, and no dictionary ships with this model. Harvest one (<code>cutaway features harvest</code>)
      and start with <code>cutaway studio --open STORE</code>.</p>`}
    ${tab === "table" && html`<div class=browse><${Latents} at=${at} /><${Chosen} at=${at} /></div>`}
    ${tab === "prompt" && html`<div class=browse><${OnPrompt} at=${at} /><${Chosen} at=${at} /></div>`}
    ${tab === "compare" && html`<${Compare} at=${at} stores=${stores} />`}
    ${tab === "harvest" && html`<${Harvest} name=${name} dictionaries=${dictionaries} done=${() => again((n) => n + 1)} />`}`;
}

export const short = (name) => name.replaceAll(/(\w+)\.(\d+)…\1\.(\d+)/g, "$1.$2–$3").replace(">", " → ");
const latent = () => (chosen("latent") === "" ? null : Number(chosen("latent")));

function Chosen({ at }) {
  const one = latent();
  return one === null ? html`<section class="panel beside"><p class=empty>Choose a latent: its page has where it fires, what it writes, what it is
    like, and what its ablation changes.</p></section>` : html`<${Latent} key=${`${at.store} ${at.dictionary} ${one}`} at=${at} latent=${one} />`;
}

// --- the table and the search

const COLUMNS = { latent: "Latent", density: "Density", F1: "Rule F1", largest: "Max", label: "Label" };
const ONLY = { alive: "that fire", ruled: "with a rule that holds", unruled: "without one", dense: "dense (> 10 %)", rare: "rare (< 10 tokens)",
  start: "at the start of contexts", dead: "dead", all: "all" };

function Latents({ at }) {
  const query = chosen("query"), [draft, set] = useState(query);
  const ask = (event) => { event.preventDefault(); choose({ query: draft.trim() }); };
  return html`<section class="panel latents">
    <form class=find onSubmit=${ask} role=search>
      <input type=search value=${draft} placeholder="label words, token:…, raises:…" aria-label="Search latents" onInput=${(e) => { set(e.target.value);
    if (!e.target.value) choose({ query: "" }); }} /><button>Search</button></form>
    <p class=note>${WAYS.map(([text, says]) => html`<button type=button class=way key=${text} data-tip=${says}
      onClick=${() => { set(text); choose({ query: text }); }}>${text}</button>`)}</p>
    ${query ? html`<${Found} at=${at} query=${query} />` : html`<${Table} at=${at} />`}</section>`;
}

const WAYS = [["city", "words of labels (BM25)"], ['token:" the"', "most of its largest examples stand on this token"],
  ["phrase:the city", "active at the end of this phrase"], ['fires-on:"mary went to the market"', "strong and rare on this text"],
  ["raises:oslo", "its decoder row raises this logit most"], ["like:17", "the most similar decoder rows"]];

function Table({ at }) {
  const sort = chosen("sort") || "density", descending = chosen("up") !== "1", only = chosen("only") || "alive";
  const [text, set] = useState(chosen("words"));
  const asked = { ...at, sort, descending, only, text: chosen("words"), most: 40 };
  const key = JSON.stringify(asked), [cursors, go] = useState({ key, all: [""] });
  const all = cursors.key === key ? cursors.all : [""];
  const { answer, refusal, busy } = useAnswer("latents", { ...asked, after: all[all.length - 1] });
  const by = (column) => choose(column === sort ? { up: descending ? "1" : "" } : { sort: column, up: ["latent", "label"].includes(column) ? "1" : "" });
  return html`<form class=choices onSubmit=${(e) => { e.preventDefault(); choose({ words: text.trim() }); }}>
      <label>Latents <select value=${only} onChange=${(e) => choose({ only: e.target.value })}>
        ${Object.entries(ONLY).map(([k, words]) => html`<option key=${k} value=${k}>${words}</option>`)}</select></label>
      <label class=grow><input type=search placeholder="label holds …" aria-label="label holds" value=${text}
        onInput=${(e) => set(e.target.value)} onBlur=${() => choose({ words: text.trim() })} /></label></form>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${!answer && busy && html`<${Busy} text="reading the store" />`}
    ${answer && html`<div class=cw-scroll><table class=latents><thead><tr>${Object.entries(COLUMNS).map(([c, words]) => html`<th key=${c} class=${c}
        aria-sort=${c === sort ? (descending ? "descending" : "ascending") : undefined}><button type=button onClick=${() => by(c)}>${words}<i
        aria-hidden=true>${c === sort ? (descending ? "↓" : "↑") : ""}</i></button></th>`)}</tr></thead>
      <tbody>${answer.rows.map((r) => html`<${Row} key=${r.latent} row=${r} />`)}</tbody></table></div>
    ${answer.rows.length === 0 && html`<p class=empty>None of the latents is so.</p>`}
    <p class=pager><button type=button disabled=${all.length < 2} onClick=${() => go({ key, all: all.slice(0, -1) })}>Before</button>
      <span class=soft>${answer.total.toLocaleString("en")} latents, ${(40 * (all.length - 1) + 1).toLocaleString("en")}–${(40 * (all.length - 1)
    + answer.rows.length).toLocaleString("en")}</span>
      <button type=button disabled=${!answer.next} onClick=${() => go({ key, all: [...all, answer.next] })}>Next</button></p>`}`;
}

function Row({ row: r }) {
  const s = r.scores, open = () => choose({ latent: String(r.latent) });
  return html`<tr aria-current=${r.latent === latent() ? "true" : undefined} onClick=${open}>
    <td class=latent><button type=button onClick=${(e) => { e.stopPropagation(); open(); }}>${r.latent}</button></td>
    <td class=amount data-tip=${`density ${share(r.density)}\n95 % [${share(r.interval[0])}, ${share(r.interval[1])}] of tokens (Wilson)`}>
      <span class=meter><i style=${`width:${logBar(r.density)}%`}></i></span>${share(r.density)}</td>
    <td class=amount data-tip=${scoresTip(s)}>${s.F1 === undefined ? "" : html`<span class=meter><i style=${`width:${100 * s.F1}%`}></i></span>${s.F1.toFixed(2)}`}</td>
    <td class="amount largest">${number(r.largest)}</td>
    <td class=label data-tip=${r.label ? `${r.source}\n${r.label}` : "no label"}><${Said} text=${r.label} />${r.flags.map((f) => html` <span
      class=flag key=${f} data-tip=${FLAGS[f]}>${f}</span>`)}${!r.label && html`<span class=soft>peak “${r.peak.trim()}”</span>`}</td></tr>`;
}

const logBar = (d) => (d > 0 ? Math.max(2, 100 * (1 + Math.log10(d) / 5)) : 0);
export const FLAGS = { dead: "dead\nactive on no token of the harvest", rare: "rare\nactive on fewer than ten tokens", dense: "dense\nactive on more than a tenth of tokens",
  start: "start\nover half of its largest examples stand on the first two positions" };

/** A label; one that says that no rule holds is pale. */
export const Said = ({ text }) => (text ? html`<span class=${text.startsWith("no short rule") ? "soft" : ""}>${text}</span>` : "");

const range = (v) => (v ? ` [${v[0].toFixed(2)}, ${v[1].toFixed(2)}]` : "");
export const scoresTip = (s) => (s.F1 === undefined ? "no score" : [`F1 ${s.F1.toFixed(2)}${range(s["F1 interval"])} on held-out documents`,
  `precision ${s.precision.toFixed(2)}${range(s["precision interval"])}, recall ${s.recall.toFixed(2)}${range(s["recall interval"])}`,
  `by chance ${(s["F1 by chance"] ?? 0).toFixed(2)}; random features ${(s["F1 of random features"] ?? []).map((v) => v.toFixed(2)).join(", ")}`].join("\n"));

function Found({ at, query }) {
  const { answer, refusal, busy } = useAnswer("find", { ...at, query });
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return busy && html`<${Busy} text="searching" />`;
  return html`<ul class=hits aria-label=${`by ${answer.by}`}>${answer.hits.map((h) => html`<li key=${`${h.dictionary} ${h.latent}`}
      aria-current=${h.latent === latent() && h.dictionary === at.dictionary ? "true" : undefined}>
      <button type=button onClick=${() => choose({ latent: String(h.latent), dictionary: h.dictionary })}><b>${h.latent}</b>
        <span>${h.label ? html`<${Said} text=${h.label} />` : html`<span class=soft>no label</span>`}<small>${h.dictionary === at.dictionary ? "" : `${short(h.dictionary)}: `}${h.why}</small></span></button></li>`)}</ul>
    ${answer.hits.length === 0 && html`<p class=empty>No latent was found.</p>`}`;
}

// --- prompt × features

function OnPrompt({ at }) {
  const prompt = chosen("prompt"), other = chosen("other"), dense = chosen("dense") === "1" ? 1 : 0.1, side = useSide(other), delta = side === DELTA;
  const { answer, refusal, busy } = useAnswer("read", prompt && { ...at, text: prompt, other, dense, top: 6 });
  const tokens = answer && readSide(answer, side);
  return html`<section class="panel latents"><h2>${delta ? "Which latents are more active in A than in B?" : "Which latents are active on each token?"}</h2>
    <p class=note>${delta ? html`The largest differences of each token, as a share of the latent's largest activation in the store:
      <b class=more>more in A</b>, <b class=less>more in B</b>.` : `The strongest of each token, by activation as a share of the latent's largest in the store. “Missed” is the share of the token that the dictionary
      does not explain: 0 % is perfect.`}</p>
    ${other && html`<${Sides} />`}
    <div class=choices><label><input type=checkbox checked=${dense === 1} onChange=${(e) => choose({ dense: e.target.checked ? "1" : "" })} />with latents that are active on
      over a tenth of all tokens</label></div>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}${!answer && busy && html`<${Busy} />`}
    ${delta && answer?.apart && html`<p class=empty>${answer.apart}</p>`}
    ${tokens?.length > 0 && html`<div class=cw-scroll><table class="latents onprompt"><thead><tr><th>Token</th>${delta ? "" : html`<th>Missed</th><th>Active</th>`}<th>Strongest</th></tr></thead>
      <tbody>${tokens.map((t, i) => html`<tr key=${i} class=${t.special ? "special" : ""}><th scope=row>${t.text}</th>${t.special ? html`<td colspan=3 class=soft>special: not among the tokens that stores count</td>`
    : html`${delta ? "" : html`<td class=amount>${share(t.error)}</td><td class=amount>${t.active}</td>`}<td class=chips>${t.top.map((a) => html`<${Chip} key=${a.latent} active=${a} />`)}
        ${t.top.length === 0 && html`<span class=soft>${delta ? "the same" : "none"}</span>`}</td>`}</tr>`)}</tbody></table></div>`}</section>`;
}

/** The tokens of a side of a reading; those of the difference carry the texts of both. */
export function readSide(answer, side) {
  if (side === DELTA) return answer.difference.map((t) => ({ ...t, text: beside(t.text, t.other) }));
  return side === "B" ? answer.other : answer.tokens;
}

/** A latent that is active on a token, or whose activations on two tokens differ. */
function Chip({ active: a }) {
  const delta = a.change !== undefined, part = delta && a.change < 0 ? -a.share : a.share;
  const values = delta ? `A ${number(a.value)}, B ${number(a.other)}, A − B ${number(a.change)}` : number(a.value);
  return html`<button type=button aria-current=${a.latent === latent() ? "true" : undefined} style=${shade(0.6 * part)}
    data-tip=${`latent ${a.latent}: ${values}\n${share(a.share)} of its largest; active on ${share(a.density)} of tokens\n${a.label || "no label"}`}
    onClick=${() => choose({ latent: String(a.latent) })}>${a.latent}</button>`;
}

// --- compare and harvest

function Compare({ at, stores }) {
  const all = stores.flatMap((s) => Object.keys(s.dictionaries).map((d) => ({ key: `${s.id} ${d}`, store: s, dictionary: d })));
  const others = all.filter((x) => x.key !== `${at.store} ${at.dictionary}`), [key, set] = useState(others[0]?.key);
  const other = others.find((x) => x.key === key) ?? others[0];
  if (!other) return html`<p class=empty>There is one dictionary. Harvest another, or open a store that has one.</p>`;
  const own = stores.find((s) => s.id === at.store).opened[at.dictionary], their = other.store.opened[other.dictionary];
  const values = { store: at.store, dictionary: at.dictionary, second_store: other.store.id, second_dictionary: other.dictionary };
  const question = { model: at.model, method: "compare_stores", values };
  const alike = own && their && { dictionary: own, second: their, evidence_tokens: 8192 };
  return html`<div class=choices><label>${short(at.dictionary)} with <select value=${other.key} onChange=${(e) => set(e.target.value)}>
      ${others.map((x) => html`<option key=${x.key} value=${x.key}>${short(x.dictionary)} (${x.store.name})</option>`)}</select></label></div>
    <div class=panels><section class=panel><h2>Which latents fire where those of the other do?</h2>
      <p class=about><code>features.compare</code> <span class=badge>control: moved tokens</span></p>
      <${AsJob} key=${JSON.stringify(question)} question=${question} fields=${["jaccard"]} lead=${(f, { row }) => choose({ latent: row, tab: "table" })}
        about="the best match of each latent by the tokens on which both are active, beside those on text that was moved along; some seconds" /></section>
    ${alike && html`<${MethodPanel} method="dictionaries.compare" values=${alike} auto=${false} title="How alike are the two dictionaries as wholes?" />`}</div>`;
}

function Harvest({ name, dictionaries, done }) {
  const [dictionary, set] = useState(dictionaries[0]), [tokens, count] = useState(20000);
  const question = { model: name, method: "harvest", values: { dictionary, tokens } };
  return html`<section class=panel><h2>Harvest a dictionary that ships with ${name}</h2>
    <p class=note>One pass of the model over its own text: densities, examples and codes of all latents; then short rules, scored on held-out documents beside those of random features.</p>
    <div class=choices><label>Dictionary <select value=${dictionary} onChange=${(e) => set(e.target.value)}>
        ${dictionaries.map((d) => html`<option key=${d} value=${d}>${d}</option>`)}</select></label>
      <label>Tokens <select value=${tokens} onChange=${(e) => count(Number(e.target.value))}>
        ${[5000, 20000, 100000, 500000].map((n) => html`<option key=${n} value=${n}>${n.toLocaleString("en")}</option>`)}</select></label></div>
    <${AsJob} key=${JSON.stringify(question)} question=${question} name=Harvest fields=${["score"]} done=${done}
      about=${`about ${Math.max(5, Math.round(tokens / 2000))} s; it stays in the studio's folder`} />
  </section>`;
}
