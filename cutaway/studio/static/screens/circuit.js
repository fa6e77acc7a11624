/** Circuit: edges scored, the first of them drawn, what they carry, what cutting the rest hides, and the truth if it is known. */
import { html, useState } from "../vendor/preact.js";
import { GraphPlot } from "../graphplot.js";
import { Picture } from "../marks.js";
import { AsJob, Busy, Copy, MethodPanel, Refusal, useAnswer, useDone } from "../panel.js";
import { number } from "../strip.js";
import { address, choose, chosen, methods, model, useSignal } from "../state.js";

const USUAL = "circuits.eap_ig", PROMPTS = 16, MOST = 100;

export function Circuit() {
  useSignal(address);
  const name = useSignal(model)?.name, [round, again] = useState(0);
  const { answer, refusal } = useAnswer("circuits", { model: name }, round + useDone());
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return html`<section class=panel><${Busy} text="the model is being loaded" /></section>`;
  const at = answer.circuits.find((c) => c.id === chosen("circuit"))?.id ?? answer.circuits[0]?.id;
  const opened = (circuit) => { again((n) => n + 1); choose({ circuit, size: "", node: "" }); };
  return html`<${Scorer} known=${answer.circuits} at=${at} name=${name} opened=${opened} />
    ${at ? html`<${Shown} key=${at} name=${name} circuit=${at} />` : html`<p class=empty>No scores of edges yet. Score those of a task above: which edges between heads
      and MLPs make its answer?</p>`}`;
}

/** The scores that are open, and new ones: by a method, on a task. */
function Scorer({ known, at, name, opened }) {
  const scorers = [...useSignal(methods).values()].filter((m) => m.results.includes("EdgeScores")), tasks = useSignal(model)?.tasks ?? [];
  const [open, unfold] = useState(!at), [method, by] = useState(USUAL), [picked, pick] = useState("");
  const prompt = chosen("prompt"), other = chosen("other"), target = chosen("target"), foil = chosen("foil"), sentence = prompt && target && foil;
  const task = picked || (tasks[0]?.name ?? "sentence");
  const card = scorers.find((m) => m.name === method), takes = (n) => card?.form.some((e) => e.name === n), asks = takes("task");
  const values = takes("prompts") ? prompt && { prompts: prompt } : !asks ? {} : task !== "sentence" ? { task, task_n: PROMPTS } : sentence && { task, task_sentence: prompt, task_target: target, task_foil: foil, ...(other ? { task_corrupt: other } : {}) };
  const question = values && { model: name, method, values };
  return html`<section class="panel tracer"><div class=choices>
      ${known.length > 0 && html`<label>Scores <select value=${at} onChange=${(e) => choose({ circuit: e.target.value, size: "", node: "" })}>
        ${known.map((c) => html`<option key=${c.id} value=${c.id}>${c.method.split(".")[1] ?? c.id} · ${c.task}</option>`)}</select></label>`}
      <button type=button aria-expanded=${open ? "true" : "false"} onClick=${() => unfold(!open)}>Score edges …</button></div>
    ${open && html`<div class=choices><label>Method <select value=${method} onChange=${(e) => by(e.target.value)}>
        ${scorers.map((m) => html`<option key=${m.name} value=${m.name}>${m.name.split(".")[1]}</option>`)}</select></label>
      ${asks && html`<label>Task <select value=${task} onChange=${(e) => pick(e.target.value)}>${tasks.map((t) => html`<option key=${t.name} value=${t.name}>${t.name.replaceAll("_", " ")}</option>`)}
        <option value=sentence>the prompt above</option></select></label>`}</div>
      ${card && html`<p class=note>${card.answers}</p>`}
      ${question ? html`<${AsJob} key=${JSON.stringify(question)} question=${question} done=${(id) => { unfold(false); opened(id); }} quiet=${true} />`
    : html`<p class=empty>Give a prompt${asks ? ", a target and a foil" : ""} above.</p>`}`}
  </section>`;
}

const SHIFT = { q: -7, k: 0, v: 7 };
const component = (n) => (/^z\.\d/.test(n.name) ? `head ${n.title}` : n.title);

function Shown({ name, circuit }) {
  const truth = chosen("truth") === "structural" ? "structural" : "identifiable", size = chosen("size"), selected = chosen("node");
  const { answer: page, refusal, busy } = useAnswer("circuit", { model: name, circuit, truth, edges: size === "" ? null : Number(size) });
  if (!page) return refusal ? html`<${Refusal} refusal=${refusal} />` : html`<section class=panel><${Busy} text="opening the scores" /></section>`;
  const drawn = { ...page, edges: page.edges.map((e) => ({ ...e, shift: SHIFT[/→([qkv])_in/.exec(e.name)?.[1]] ?? 0 })) }, known = page.truths[truth];
  const pick = (n) => { const [, layer, head] = /^z\.(\d+)\.(\d+)/.exec(n) ?? []; choose({ node: n === selected ? "" : n, ...(layer ? { layer, head } : {}) }); };
  const touching = (n) => page.edges.filter((e) => page.nodes[e.source] === n || page.nodes[e.target] === n).length;
  const more = known && page.inside < page.edges.length;
  return html`<div aria-busy=${busy}>${refusal && html`<${Refusal} refusal=${refusal} />`}
    <section class="panel graphed"><h2>The first ${page.inside} of ${page.all_edges.toLocaleString("en")} edges by ${page.method.split(".")[1]}, on ${page.task}</h2>
      <div class="choices sliders"><label>Edges <input type=range min=1 max=${Math.min(MOST, page.all_edges)} step=1 value=${page.inside} aria-label=Edges
        onChange=${(e) => choose({ size: e.target.value })} /><output>${page.inside}</output></label>
        ${Object.keys(page.truths).length > 1 && html`<label>Truth <select value=${truth} onChange=${(e) => choose({ truth: e.target.value })}>
          <option value=identifiable>edges that these prompts can show</option><option value=structural>all edges of the program</option></select></label>`}</div>
      <${GraphPlot} page=${drawn} selected=${selected} pick=${pick} named=${true} tip=${(n) => `${component(n)}\n${touching(n)} of the edges drawn`} />
      <p class="note keys"><span><i class="key unit"></i>head</span><span><i class="key mlp"></i>MLP</span><span><i class="key token"></i>embeddings</span>
        <span>at the left of a head its queries, in the middle keys, at the right values</span><span><b class=plus>—</b> for the answer</span><span><b class=minus>—</b> against it</span>
        ${known && html`<span><b class=soft>╌</b> in the truth, not among these edges</span><span><b class=soft>┈</b> among these edges, not in the truth</span>`}</p>
      ${known && html`<p class=truth>${page.edges.filter((e, i, all) => e.known === "found" && all.findIndex((x) => x.name === e.name) === i).length} of the ${known.length} edges of the truth are among
        these ${page.inside}${more ? "; those that are missed are drawn too" : ""}.</p>`}
      <${Edges} page=${page} selected=${selected} />
      <div class=folds><${Picture} markup=${page.how} /><p class=repeat><${Copy} text=${page.python} name=Python /><${Copy} text=${page.command} name=Command />
        <${Copy} text=${() => JSON.stringify(page, null, 1)} name=JSON /><a href=${`api/v1/results/${circuit}/file`} download hidden=${circuit.startsWith("file:")}>File</a></p></div></section>
    <${Tests} page=${page} known=${known} /></div>`;
}

const KNOWN = { found: "true", missed: "missed", beyond: "not in the program" };
/** Words for an edge beside the truth: one that the prompts cannot show is in the program all the same. */
const judged = (e, { structural }) => (e.known === "beyond" && structural.includes(e.name) ? "true, but these prompts cannot show it" : KNOWN[e.known]);
const range = (ends) => (ends ? `[${ends.map(number).join(", ")}]` : "");

/** The edges with score, interval, control and exact score; of the node that is chosen, if one is. */
function Edges({ page, selected }) {
  const at = page.nodes.findIndex((n) => n.name === selected);
  const once = page.edges.filter((e, i, all) => all.findIndex((x) => x.name === e.name) === i);
  const rows = at < 0 ? once : once.filter((e) => e.source === at || e.target === at), most = Math.max(1e-12, ...once.map((e) => Math.abs(e.weight)));
  const truth = once.some((e) => e.known), exact = once.some((e) => e.exact !== null);
  return html`<div class="cw-scroll tall"><table class="latents edgelist"><thead><tr><th>Edge</th><th>Score <small>${page.unit}</small></th><th>95 %</th><th>Control</th>${exact && html`<th>Exact</th>`}${truth && html`<th>Truth</th>`}</tr></thead>
    <tbody>${rows.map((e) => html`<tr key=${e.name}><td class=label><code>${e.name}</code></td>
      <td class=amount><span class=meter><i class=${e.weight < 0 ? "less" : ""} style=${`width:${(100 * Math.abs(e.weight)) / most}%`}></i></span>${number(e.weight)}</td>
      <td class=amount>${range(e.interval) || html`<span class=soft>one prompt</span>`}</td><td class=amount>${e.control ? `${number(e.control[0])} to ${number(e.control[1])}` : html`<span class=soft>not drawn</span>`}</td>
      ${exact && html`<td class=amount>${e.exact === null ? html`<span class=soft>not audited</span>` : number(e.exact)}</td>`}
      ${truth && html`<td class=${`known ${e.known}`}>${judged(e, page.truths)}</td>`}</tr>`)}</tbody></table></div>
    ${at >= 0 && html`<p class=note>${rows.length} of the edges end at ${component(page.nodes[at])}. <button type=button class=way onClick=${() => choose({ node: "" })}>all edges</button></p>`}`;
}

/** What the ranking carries at each size, what cutting subsets of the rest shows, and how well it finds the truth. */
function Tests({ page, known }) {
  const { circuit, ...task } = page.call;
  if (!task.task) return html`<p class=empty>These scores are of no task that the page knows, so what they carry cannot be measured here: use Methods.</p>`;
  const own = task.task !== "sentence" && task.task_path === undefined, others = own ? { ...task, task_seed: (task.task_seed ?? 0) + 1 } : task;
  const where = own ? "On other prompts than those of the scores. " : "On the prompt of the scores. ";
  return html`<div class=panels>
    ${known && html`<${MethodPanel} method="circuits.compare" values=${{ circuit, reference: known.join(",") }} fields=${["overlap", "auroc"]} title="Does the ranking find the truth?"
      note=${`The program was compiled into the weights, so its ${known.length} edges are known. Precision and recall are those of as many first edges.`} />`}
    <${MethodPanel} method="circuits.faithfulness" values=${{ ...others, circuit }} auto=${false} fields=${["faithfulness", "absolute", "areas"]} title="How much of the answer does each size carry?"
      note=${`${where}All other edges are cut; the band is of random circuits with as many edges between the same layers.`} />
    <${MethodPanel} method="circuits.certify" values=${{ ...others, circuit, circuit_edges: page.inside }} auto=${false} fields=${["deviation"]} title=${`A certificate of the first ${page.inside} edges`}
      note=${`${where}Does the answer stay whatever subset of the rest is cut? Level C: all of it; B: random subsets; A: the worst one that a search finds.`} /></div>`;
}
