/** Graph: an attribution graph traced, pruned, read, grouped and tested; and files of other tools. */
import { html, useEffect, useState } from "../vendor/preact.js";
import { post } from "../api.js";
import { GraphPlot } from "../graphplot.js";
import { Picture } from "../marks.js";
import { AsJob, Busy, Copy, MethodPanel, Refusal, save, useAnswer } from "../panel.js";
import { number, share } from "../strip.js";
import { address, choose, chosen, model, useSignal } from "../state.js";
import { Agreement } from "../scatter.js";
import { Grouping } from "./groups.js";

export const listed = (name) => chosen(name).split(",").filter(Boolean);
export const grouped = () => { try { return Object(JSON.parse(chosen("groups") || "{}")); } catch { return {}; } };
const NONE = { node: "", pinned: "", groups: "" };

export function Graph() {
  useSignal(address);
  const name = useSignal(model)?.name, [round, again] = useState(0);
  const { answer, refusal } = useAnswer("graphs", { model: name }, round);
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return html`<section class=panel><${Busy} text="the model is being loaded" /></section>`;
  const at = chosen("graph") || answer.graphs[0]?.id;
  const opened = (graph) => { again((n) => n + 1); choose({ ...NONE, graph }); };
  return html`<${Tracer} known=${answer} name=${name} graph=${at} opened=${opened} />
    ${at ? html`<${Shown} key=${at} name=${name} graph=${at} known=${answer} />`
      : html`<p class=empty>No graph yet. Trace the prompt above, or import a graph file of circuit-tracer or Neuronpedia.</p>`}`;
}

/** What is traced, what is open, and files of others. */
function Tracer({ known, name, graph, opened }) {
  const [units, set] = useState(known.transcoders[0] ?? "neurons"), [refusal, refuse] = useState(null), [open, unfold] = useState(!graph);
  const prompt = chosen("prompt"), target = chosen("target"), foil = chosen("foil"), versus = chosen("versus") === "1" && target && foil;
  const values = prompt && { prompts: prompt, ...(units === "neurons" ? { neurons: true, nodes: 600 } : { transcoders: units }), ...(versus ? { targets: [`"${target}"-"${foil}"`] } : {}) };
  const question = values && { model: name, method: "graphs.trace", values };
  const take = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try { opened((await post("import_graph", { model: name, name: file.name.slice(0, 200), data: parsed(await file.text(), file.name) })).id); refuse(null); } catch (error) { refuse(error); }
  };
  return html`<section class="panel tracer"><div class=choices>
      ${known.graphs.length > 0 && html`<label>Graph <select value=${graph} onChange=${(e) => choose({ ...NONE, graph: e.target.value })}>
        ${known.graphs.map((g) => html`<option key=${g.id} value=${g.id}>${g.prompt ? `${g.prompt} · ` : ""}${g.id.startsWith("file:") ? g.name : g.id.slice(-12)}</option>`)}</select></label>`}
      <button type=button aria-expanded=${open ? "true" : "false"} onClick=${() => unfold(!open)}>Trace the prompt …</button>
      <label class=file><span>Import a graph file …</span><input type=file accept=".json,application/json" onChange=${take} /></label></div>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${open && html`<div class=choices><label>Units <select value=${units} onChange=${(e) => set(e.target.value)}>
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

function Shown({ name, graph, known }) {
  const pinned = listed("pinned"), selected = chosen("node"), preset = known.presets[chosen("preset")] ? chosen("preset") : "circuit-tracer";
  const part = (n) => (chosen(n) === "" ? null : Number(chosen(n)));
  const asked = { model: name, graph, preset, nodes: part("nodes"), edges: part("edges"), pinned, supernodes: grouped() };
  const { answer: page, refusal, busy } = useAnswer("graph", asked);
  const pick = (n) => choose({ node: n === selected ? "" : n });
  if (!page) return refusal ? html`<${Refusal} refusal=${refusal} />` : html`<section class=panel><${Busy} text="opening the graph" /></section>`;
  return html`<div aria-busy=${busy}>${refusal && html`<${Refusal} refusal=${refusal} />`}
    <section class="panel graphed"><h2>${page.targets.length ? `Why “${page.targets.map((t) => t.trim()).join("”, “")}” after “${page.prompt.trim()}”?` : `An imported graph of “${page.prompt.trim()}”`}</h2>
      <${Scores} page=${page} />
      ${page.whole && html`<${Sliders} page=${page} presets=${known.presets} preset=${preset} />`}
      <${GraphPlot} page=${page} selected=${selected} pinned=${pinned} pick=${pick} />
      <p class="note keys"><span><i class="key unit"></i>feature or neuron, by influence</span><span><i class="key error"></i>error: what the dictionary misses</span><span><i class="key token"></i>token</span>
        <span><i class="key weak"></i>pale: random targets are reached as far</span><span><b class=plus>—</b> raises</span><span><b class=minus>—</b> lowers</span>
        ${page.hidden > 0 && html`<span>${page.hidden.toLocaleString("en")} smaller edges are not drawn</span>`}</p>
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
