/** Graph: an attribution graph traced, pruned, read, grouped and tested; and files of other tools. */
import { html, useEffect, useState } from "../vendor/preact.js";
import { post } from "../api.js";
import { GraphPlot } from "../graphplot.js";
import { Picture } from "../marks.js";
import { AsJob, Busy, Copy, MethodPanel, Refusal, save, useAnswer, useDone } from "../panel.js";
import { DELTA, Sides, useSide } from "../sides.js";
import { number, share } from "../strip.js";
import { address, choose, chosen, model, useSignal } from "../state.js";
import { Agreement } from "../scatter.js";
import { Circuit } from "./circuit.js";
import { Grouping } from "./groups.js";

export const listed = (name) => chosen(name).split(",").filter(Boolean);
export const grouped = () => { try { return Object(JSON.parse(chosen("groups") || "{}")); } catch { return {}; } };
const NONE = { node: "", pinned: "", groups: "" };

const TABS = { "": "Attribution graph", circuit: "Circuit" };

export function Graph() {
  useSignal(address);
  const tab = chosen("drawn") === "circuit" ? "circuit" : "";
  return html`<div class=choices><span class=tabs role=tablist>${Object.entries(TABS).map(([t, words]) => html`<button key=${t} type=button role=tab
      aria-selected=${t === tab ? "true" : "false"} onClick=${() => choose({ drawn: t, node: "" })}>${words}</button>`)}</span></div>
    ${tab ? html`<${Circuit} />` : html`<${Attribution} />`}`;
}

function Attribution() {
  const name = useSignal(model)?.name, [round, again] = useState(0);
  const { answer, refusal } = useAnswer("graphs", { model: name }, round + useDone());
  const first = answer && (chosen("graph") || newest(answer.graphs, chosen("prompt")) || answer.graphs[0]?.id);
  const second = answer && (chosen("second") || newest(answer.graphs, chosen("other")));
  const side = useSide(second || chosen("other"));
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return html`<section class=panel><${Busy} text="the model is being loaded" /></section>`;
  const opened = (graph) => { again((n) => n + 1); choose({ ...NONE, [side === "B" ? "second" : "graph"]: graph }); };
  const at = side === "B" ? second : first;
  return html`<${Tracer} key=${side} known=${answer} name=${name} first=${first} second=${second} side=${side} opened=${opened} />
    ${side === DELTA && first && second ? html`<${Beside} key=${`${first} ${second}`} name=${name} first=${first} second=${second} known=${answer} />`
    : at && side !== DELTA ? html`<${Shown} key=${at} name=${name} graph=${at} known=${answer} />`
    : html`<p class=empty>${side === "A" ? "No graph yet. Trace the prompt above, or import a graph file of circuit-tracer or Neuronpedia."
    : "No graph of prompt B yet. Choose B above and trace it."}</p>`}`;
}

/** The newest graph of a prompt. */
const newest = (graphs, prompt) => (prompt ? graphs.find((g) => g.prompt === prompt)?.id : undefined);
const named = (g) => `${g.prompt ? `${g.prompt} · ` : ""}${g.id.startsWith("file:") ? g.name : g.id.slice(-12)}`;

/** What is traced, what is open, and files of others. */
function Tracer({ known, name, first, second, side, opened }) {
  const here = side === "B" ? second : first, two = second || chosen("other");
  const [units, set] = useState(known.transcoders[0] ?? "neurons"), [refusal, refuse] = useState(null), [open, unfold] = useState(!here);
  const prompt = chosen(side === "B" ? "other" : "prompt"), target = chosen("target"), foil = chosen("foil"), versus = chosen("versus") === "1" && target && foil;
  const values = prompt && { prompts: prompt, ...(units === "neurons" ? { neurons: true, nodes: 600 } : { transcoders: units }), ...(versus ? { targets: [`"${target}"-"${foil}"`] } : {}) };
  const question = values && { model: name, method: "graphs.trace", values };
  const take = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try { opened((await post("import_graph", { model: name, name: file.name.slice(0, 200), data: parsed(await file.text(), file.name) })).id); refuse(null); } catch (error) { refuse(error); }
  };
  const choice = (words, key, value, none) => html`<label>${words} <select value=${value ?? ""} onChange=${(e) => choose({ ...NONE, [key]: e.target.value })}>
    ${none && html`<option value="">${none}</option>`}${known.graphs.map((g) => html`<option key=${g.id} value=${g.id}>${named(g)}</option>`)}</select></label>`;
  return html`<section class="panel tracer">${two && html`<${Sides} />`}<div class=choices>
      ${known.graphs.length > 0 && side !== "B" && choice(two ? "A" : "Graph", "graph", first)}
      ${known.graphs.length > 0 && (side !== "A" || !two) && choice("B", "second", second, "no other")}
      ${side !== DELTA && html`<button type=button aria-expanded=${open ? "true" : "false"} onClick=${() => unfold(!open)}>Trace the prompt …</button>
      <label class=file><span>Import a graph file …</span><input type=file accept=".json,application/json" onChange=${take} /></label>`}</div>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${open && side !== DELTA && html`<div class=choices><label>Units <select value=${units} onChange=${(e) => set(e.target.value)}>
        ${[...known.transcoders, "neurons"].map((t) => html`<option key=${t} value=${t}>${t}</option>`)}</select></label>
      <label>Explain <select value=${versus ? "1" : ""} onChange=${(e) => choose({ versus: e.target.value })}><option value="">the likeliest next tokens</option>
        ${target && foil && html`<option value=1>“${target.trim()}” over “${foil.trim()}”</option>`}</select></label></div>
      ${question ? html`<${AsJob} key=${JSON.stringify(question)} question=${question} done=${(id) => { unfold(false); opened(id); }} quiet=${true} />` : html`<p class=empty>Give a prompt above.</p>`}`}
  </section>`;
}

function parsed(text, name) {
  const refused = (why) => Object.assign(new Error(why), { what: `file “${name}”`, why, instead: "give a graph file of circuit-tracer or Neuronpedia, at most 32 MiB" });
  if (text.length > 32 << 20) throw refused("it is larger than 32 MiB");
  let data;
  try { data = JSON.parse(text); } catch { throw refused("it is no JSON"); }
  if (data === null || typeof data !== "object" || Array.isArray(data)) throw refused("it holds no graph");
  return data;
}

/** How the address prunes graphs. */
function pruning(known) {
  const part = (n) => (chosen(n) === "" ? null : Number(chosen(n)));
  return { preset: known.presets[chosen("preset")] ? chosen("preset") : "circuit-tracer", nodes: part("nodes"), edges: part("edges") };
}

const question = (page) => (page.targets.length ? `Why “${page.targets.map((t) => t.trim()).join("”, “")}” after “${page.prompt.trim()}”?` : `An imported graph of “${page.prompt.trim()}”`);

function Shown({ name, graph, known }) {
  const pinned = listed("pinned"), selected = chosen("node");
  const asked = { model: name, graph, ...pruning(known), pinned, supernodes: grouped() };
  const { answer: page, refusal, busy } = useAnswer("graph", asked);
  const pick = (n) => choose({ node: n === selected ? "" : n });
  if (!page) return refusal ? html`<${Refusal} refusal=${refusal} />` : html`<section class=panel><${Busy} text="opening the graph" /></section>`;
  return html`<div aria-busy=${busy}>${refusal && html`<${Refusal} refusal=${refusal} />`}
    <section class="panel graphed"><h2>${question(page)}</h2>
      <${Scores} page=${page} />
      ${page.whole && html`<${Sliders} page=${page} presets=${known.presets} preset=${asked.preset} />`}
      <${GraphPlot} page=${page} selected=${selected} pinned=${pinned} pick=${pick} />
      <${Keys} hidden=${page.hidden} />
      <div class=folds><${Picture} markup=${page.how} /><p class=repeat><${Copy} text=${page.python} name=Python /><${Copy} text=${page.command} name=Command />
        <${Copy} text=${() => JSON.stringify(page, null, 1)} name=JSON /><a href=${`api/v1/results/${graph}/file`} download hidden=${graph.startsWith("file:")}>File</a>
        ${page.whole && html`<button type=button data-tip="a graph file of circuit-tracer and Neuronpedia, as pruned and grouped here" onClick=${() => post("export_graph", asked).then(({ data }) =>
    save(`${graph.replace(":", "-")}.json`, new Blob([JSON.stringify(data)], { type: "application/json" })))}>Graph file</button>`}</p></div></section>
    <div class=browse><${List} page=${page} selected=${selected} pinned=${pinned} pick=${pick} />
      <div class=beside>${selected && page.whole && html`<${Node} key=${selected} name=${name} graph=${graph} node=${selected} pinned=${pinned} />`}
        ${selected && !page.whole && html`<${Ends} page=${page} node=${selected} />`}
        ${page.whole && html`<${Grouping} name=${name} graph=${graph} page=${page} pinned=${pinned} />`}
        ${page.call && html`<${Verified} name=${name} call=${page.call} />`}</div></div></div>`;
}

const Keys = ({ hidden }) => html`<p class="note keys"><span><i class="key unit"></i>feature or neuron, by influence</span><span><i class="key error"></i>error: what the dictionary misses</span><span><i class="key token"></i>token</span>
  <span><i class="key weak"></i>pale: random targets are reached as far</span><span><b class=plus>—</b> raises</span><span><b class=minus>—</b> lowers</span>
  ${hidden > 0 && html`<span>${hidden.toLocaleString("en")} smaller edges are not drawn</span>`}</p>`;

/** The largest units removed one by one: what the graph predicts beside what is measured. */
function Verified({ name, call }) {
  const [result, set] = useState("");
  return html`<${MethodPanel} method="graphs.validate" values=${{ ...call, top: 12 }} auto=${false} title="Do its features do what it says?" done=${set} fields=${["effect", "agreement"]}
      note="Removes the twelve largest units one by one: measured effects beside what the graph predicts along all paths." />
    ${result && html`<${Agreement} name=${name} result=${result} axis=node />`}`;
}

/** What the graph explains, always in sight. */
function Scores({ page: { whole, drawn, nodes, edges, hidden, all_nodes: allNodes, all_edges: allEdges } }) {
  const fact = (words, value, beside, tip) => html`<div data-tip=${tip}><dt>${words}</dt><dd>${value} <small>${beside}</small></dd></div>`;
  const kept = (n) => (drawn ? `drawn ${drawn[n].toFixed(2)}` : "");
  return html`<dl class="facts scores">${whole ? html`
      ${fact("replacement", whole.replacement.toFixed(2), kept("replacement"), "replacement\nthe share of influence that comes from tokens, not from errors or units left out; of the whole graph, and of what is drawn")}
      ${fact("completeness", whole.completeness.toFixed(2), kept("completeness"), "completeness\nthe share of inputs that is not error or units left out, weighted by influence")}
      ${fact("error share", share(whole.error_share), "", "error share\nthe share of influence that ends in what the dictionary misses")}
      ${fact("units left out", share(whole.others_share ?? 0), "", "units left out\nthe share of influence that ends in units that are no nodes of their own")}`
    : html`<div><dt>scores</dt><dd><small>not in the file: it holds a pruned graph</small></dd></div>`}
    ${fact("nodes", nodes.length, allNodes ? `of ${allNodes.toLocaleString("en")}` : "")}${fact("edges", (edges.length + hidden).toLocaleString("en"), allEdges ? `of ${allEdges.toLocaleString("en")}` : "")}</dl>`;
}

function Sliders({ page, presets, preset }) {
  const slide = (key, words, value) => html`<label>${words} <input type=range min=0 max=1 step=0.01 value=${value} aria-label=${words}
    onChange=${(e) => choose({ [key]: e.target.value })} /><output>${value.toFixed(2)}</output></label>`;
  return html`<div class="choices sliders"><label>Convention <select value=${preset} onChange=${(e) => choose({ preset: e.target.value, nodes: "", edges: "" })}>
      ${Object.keys(presets).map((p) => html`<option key=${p} value=${p}>${p}</option>`)}</select></label>
    ${slide("nodes", "Nodes hold", page.node_share)}${slide("edges", "Edges hold", page.edge_share)}</div>`;
}

/** Two graphs beside each other, and the influences of their nodes. */
function Beside({ name, first, second, known }) {
  return html`<div class=pair><${Side} name=${name} graph=${first} known=${known} side=A /><${Side} name=${name} graph=${second} known=${known} side=B /></div>
    <${Changes} name=${name} first=${first} second=${second} />`;
}

function Side({ name, graph, known, side }) {
  const selected = chosen("node");
  const { answer: page, refusal } = useAnswer("graph", { model: name, graph, ...pruning(known) });
  return html`<section class="panel graphed">${refusal && html`<${Refusal} refusal=${refusal} />`}${!page && !refusal && html`<${Busy} text="opening the graph" />`}
    ${page && html`<h2><b class=${side === "A" ? "more" : "less"}>${side}</b> ${question(page)}</h2><${Scores} page=${page} />
      <${GraphPlot} page=${page} selected=${selected} pinned=${[]} pick=${(n) => choose({ node: n === selected ? "" : n })} /><${Keys} hidden=${page.hidden} />`}</section>`;
}

/** Influences in A less those in B, the largest first; what one graph has alone is named. */
function Changes({ name, first, second }) {
  const { answer, refusal } = useAnswer("compare_graphs", { model: name, graph: first, other: second }), [only, show] = useState("all"), selected = chosen("node");
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return html`<section class=panel><${Busy} text="comparing" /></section>`;
  const kinds = { all: () => true, both: (r) => r.first !== null && r.second !== null, A: (r) => r.second === null, B: (r) => r.first === null };
  const rows = answer.rows.filter(kinds[only]), most = Math.max(1e-12, ...answer.rows.map((r) => Math.abs(r.change)));
  const amount = (v) => (v === null ? html`<span class=soft>absent</span>` : share(v));
  return html`<section class="panel latents changes"><h2>Influence in A less that in B</h2>
    <p class=note>${answer.common.toLocaleString("en")} of ${answer.nodes.toLocaleString("en")} nodes are in both whole graphs; ${share(answer.first_only)} of A's influence and ${share(answer.second_only)} of B's
      belong to nodes that the other graph lacks. ${answer.pooled}${answer.nodes > answer.rows.length ? ` The ${answer.rows.length} largest differences are listed.` : ""}</p>
    <div class=choices><label>Nodes <select value=${only} onChange=${(e) => show(e.target.value)}><option value=all>all</option><option value=both>in both</option>
      <option value=A>only in A</option><option value=B>only in B</option></select></label></div>
    ${rows.length === 0 && html`<p class=empty>None of the listed nodes is so.</p>`}
    ${rows.length > 0 && html`<div class="cw-scroll tall"><table class="latents nodes"><thead><tr><th>Node</th><th>A</th><th>A − B</th><th>B</th></tr></thead>
      <tbody>${rows.map((r) => html`<tr key=${r.node} aria-current=${r.node === selected ? "true" : undefined} onClick=${() => choose({ node: r.node === selected ? "" : r.node })}>
        <td class=label><button type=button onClick=${(e) => { e.stopPropagation(); choose({ node: r.node === selected ? "" : r.node }); }}>${r.node}</button><span>${r.title}</span></td>
        <td class=amount>${amount(r.first)}</td><td class=amount><span class=meter><i class=${r.change < 0 ? "less" : "more"} style=${`width:${(100 * Math.abs(r.change)) / most}%`}></i></span>${points(r.change)}</td>
        <td class=amount>${amount(r.second)}</td></tr>`)}</tbody></table></div>`}</section>`;
}

const points = (v) => `${v > 0 ? "+" : v < 0 ? "−" : ""}${share(Math.abs(v))}`;

const KINDS = { unit: "", error: "error", others: "left out", token: "token", target: "target" };

/** All nodes by influence; the keyboard's way through the graph. */
function List({ page, selected, pinned, pick }) {
  const rank = (n) => n.influence ?? (n.cumulative ? 1 - n.cumulative : 0), most = Math.max(1e-12, ...page.nodes.map(rank));
  const [words, find] = useState(""), rows = [...page.nodes].sort((a, b) => rank(b) - rank(a))
    .filter((n) => `${n.name} ${n.title} ${page.columns[n.column]}`.toLowerCase().includes(words.toLowerCase()));
  return html`<section class="panel latents"><h2>Nodes by influence</h2>
    <input type=search class=wide placeholder="find a node" aria-label="find a node" value=${words} onInput=${(e) => find(e.target.value)} />
    <div class="cw-scroll tall"><table class="latents nodes"><thead><tr><th>Node</th><th>Token</th><th>Influence</th><th class=largest>Activation</th><th>Pin</th></tr></thead>
      <tbody>${rows.slice(0, 300).map((n) => html`<tr key=${n.name} class=${n.weak ? "weak" : ""} aria-current=${n.name === selected ? "true" : undefined} onClick=${() => pick(n.name)}>
        <td class=label><button type=button onClick=${(e) => { e.stopPropagation(); pick(n.name); }}>${n.name.split("@")[0]}</button><span>${n.title}${KINDS[n.kind] && !n.title ? html`<i class=soft> ${KINDS[n.kind]}</i>` : ""}</span></td>
        <td class=word>${page.columns[n.column]}</td>
        <td class=amount data-tip=${`influence ${n.influence === null ? "not in the file" : share(n.influence)}\nwith all larger ones ${share(n.cumulative)}${n.weak ? "\nrandom targets are reached as far" : ""}`}>
          <span class=meter><i style=${`width:${(100 * rank(n)) / most}%`}></i></span>${n.influence === null ? (n.cumulative ? `in ${share(n.cumulative)}` : "") : share(n.influence)}</td>
        <td class="amount largest">${n.kind === "unit" ? number(n.activation) : ""}</td>
        <td><input type=checkbox aria-label=${`pin ${n.name}`} checked=${pinned.includes(n.name)} disabled=${!page.whole} onClick=${(e) => e.stopPropagation()} onChange=${() => pin(n.name)} /></td></tr>`)}</tbody></table></div>
  </section>`;
}

export function pin(node) {
  const pinned = listed("pinned");
  choose({ pinned: (pinned.includes(node) ? pinned.filter((n) => n !== node) : [...pinned, node]).join(",") });
}

/** A node with the largest edges into it and out of it, of the whole graph. */
function Node({ name, graph, node, pinned }) {
  const { answer: n, refusal, busy } = useAnswer("node", { model: name, graph, node });
  return html`<section class="panel node"><h2>${node} ${n?.title && html`<small>${n.title}</small>`}</h2>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}${!n && busy && html`<${Busy} />`}
    ${n && html`<dl class=facts>
      <div data-tip="the sum over all paths to the targets, and the largest of the same for random targets"><dt>influence</dt><dd>${share(n.influence)} <small>${n.null === null ? "" : `random targets ${share(n.null)}`}</small></dd></div>
      ${n.value !== null && html`<div data-tip="what its inputs sum to, biases included"><dt>value</dt><dd>${number(n.value)}</dd></div>`}
      ${n.activation !== 0 && html`<div><dt>activation</dt><dd>${number(n.activation)}</dd></div>`}
      <div class=acts>${n.page && html`<button type=button data-tip=${`latent ${n.page.latent} of ${n.page.dictionary}`}
        onClick=${() => choose({ store: n.page.store, dictionary: n.page.dictionary, latent: String(n.page.latent), tab: "" }, "features")}>Its page</button>`}
        <button type=button onClick=${() => pin(node)}>${pinned.includes(node) ? "Unpin" : "Pin"}</button></div></dl>
      <${Links} title="What it reads" links=${n.inputs} empty="Nothing: it is a source." /><${Links} title="What reads it" links=${n.outputs} empty="Nothing among the nodes." />`}</section>`;
}

/** The ends of a node's edges in an imported graph, which has no others. */
function Ends({ page, node }) {
  const at = page.nodes.findIndex((n) => n.name === node);
  const ends = (own, far) => page.edges.filter((e) => e[own] === at).map((e) => ({ node: page.nodes[e[far]].name, title: page.nodes[e[far]].title, weight: e.weight, share: null })).slice(0, 12);
  return html`<section class="panel node"><h2>${node}</h2><${Links} title="What it reads" links=${ends("target", "source")} empty="Nothing in the file." />
    <${Links} title="What reads it" links=${ends("source", "target")} empty="Nothing in the file." /></section>`;
}

function Links({ title, links, empty }) {
  const most = Math.max(1e-12, ...links.map((l) => Math.abs(l.weight)));
  return html`<h3>${title}</h3>${links.length === 0 && html`<p class=note>${empty}</p>`}
    <ul class=links>${links.map((l) => html`<li key=${l.node}><button type=button onClick=${() => choose({ node: l.node })} data-tip=${`${l.node} ${l.title}\nweight ${number(l.weight)}${l.share === null ? "" : `, ${share(l.share)} of all that is read there`}`}>
      <span class=name>${l.node}${l.title && html` <small>${l.title}</small>`}</span><span class=line><i class=${l.weight < 0 ? "minus" : "plus"} style=${`width:${(100 * Math.abs(l.weight)) / most}%`}></i></span>
      <span class=amount>${number(l.weight)}</span></button></li>`)}</ul>`;
}
