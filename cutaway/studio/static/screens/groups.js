/** Supernodes: units of a graph that a reader takes for one thing; named, kept in the address, and tested at once. */
import { html, useState } from "../vendor/preact.js";
import { post } from "../api.js";
import { AsJob, MethodPanel, Refusal } from "../panel.js";
import { Agreement } from "../scatter.js";
import { choose } from "../state.js";
import { grouped, pin } from "./graph.js";

const keep = (groups) => choose({ groups: Object.keys(groups).length ? JSON.stringify(groups) : "" });

export function Grouping({ name, graph, page, pinned }) {
  const groups = grouped(), [title, set] = useState(""), [tested, end] = useState(""), [kept, file] = useState(null), [refusal, refuse] = useState(null);
  const units = pinned.filter((n) => page.nodes.some((x) => x.name === n && x.kind === "unit" && !x.group));
  const made = title.trim() || `group ${Object.keys(groups).length + 1}`, written = JSON.stringify(groups);
  const group = () => { choose({ pinned: pinned.filter((n) => !units.includes(n)).join(","), groups: JSON.stringify({ ...groups, [made]: units }) }); set(""); };
  const rename = (old, to) => { if (to.trim() && to !== old && !groups[to]) keep(Object.fromEntries(Object.entries(groups).map(([k, v]) => [k === old ? to.trim() : k, v]))); };
  const suggest = page.call && { model: name, method: "graphs.supernodes", values: { ...page.call, samples: 2 } };
  const taken = (id) => post("data", { model: name, result: id }).then(({ record }) => keep(record.supernodes)).catch(refuse);
  const test = () => post("keep_groups", { model: name, graph, supernodes: groups }).then(({ id }) => { refuse(null); file({ id, written }); }).catch(refuse);
  return html`<section class="panel grouping"><h2>Pinned, and supernodes</h2>
    ${pinned.length === 0 ? html`<p class=note>Pin nodes in the list: they stay in the picture whatever their influence, and can be grouped.</p>`
      : html`<p class=pins>${pinned.map((n) => html`<span class=pin key=${n}>${n}<button type=button aria-label=${`unpin ${n}`} onClick=${() => pin(n)}>×</button></span>`)}</p>`}
    ${units.length > 0 && html`<form class=find onSubmit=${(e) => { e.preventDefault(); group(); }}><input value=${title} maxlength=80 placeholder="name of the group" aria-label="name of the group"
      onInput=${(e) => set(e.target.value)} /><button disabled=${Boolean(groups[made])}>Group ${units.length} ${units.length === 1 ? "unit" : "units"}</button></form>`}
    ${Object.keys(groups).length > 0 && html`<ul class=groups>${Object.entries(groups).map(([k, nodes]) => html`<li key=${k}><input value=${k} maxlength=80 aria-label=${`rename ${k}`} onChange=${(e) => rename(k, e.target.value)} />
      <span class=soft data-tip=${nodes.join("\n")}>${nodes.length} ${nodes.length === 1 ? "unit" : "units"}</span>
      <button type=button onClick=${() => keep(Object.fromEntries(Object.entries(groups).filter(([n]) => n !== k)))}>Dissolve</button></li>`)}</ul>`}
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${Object.keys(groups).length === 0 && suggest && html`<h3>Or let groups be suggested</h3><${AsJob} key=${JSON.stringify(suggest)} question=${suggest} name=Suggest done=${taken} quiet=${true}
      about="units at one position that write alike and are active together; each is tested too" />`}
    ${Object.keys(groups).length > 0 && page.call && html`<p><button type=button onClick=${test}>Test the groups</button><span class=soft> removes each at once</span></p>`}</section>
    ${kept?.written === written && page.call && html`<${MethodPanel} method="graphs.supernodes" values=${{ ...page.call, groups: `file:${kept.id}` }} auto=${false} title="Do the groups act as the graph says?" fields=${["effect"]} done=${end}
      note="What the target loses without each group, beside as many random units of the same layers and positions; and what the graph predicts." />
      ${tested && html`<${Agreement} name=${name} result=${tested} axis=supernode />`}`}`;
}
