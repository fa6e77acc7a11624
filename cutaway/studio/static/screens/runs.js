/** Runs: what was asked in the background, how far it is, and its result. */
import { html, useState } from "../vendor/preact.js";
import { remove } from "../api.js";
import { Refusal, Stored } from "../panel.js";
import { address, choose, chosen, jobs, useSignal } from "../state.js";

export function Runs() {
  const all = useSignal(jobs);
  useSignal(address);
  const open = all.find((j) => j.id === chosen("job"));
  return html`<section class=panel><h2>What was asked in the background</h2>
    ${all.length === 0 && html`<p class=empty>Nothing yet: methods that take long run here, and stay when the studio stops.</p>`}
    ${all.length > 0 && html`<div class=cw-scroll><table class=runs><thead><tr><th>Method</th><th>Values</th><th>Model</th><th>State</th><th></th></tr></thead>
      <tbody>${all.map((j) => html`<tr key=${j.id} aria-current=${j === open ? "true" : undefined}>
        <td><code>${j.method}</code></td><td class=values>${said(j.values)}</td><td>${j.model}</td>
        <td class=${`state ${j.state}`}>${j.state}${j.state === "running" && j.total > 0 ? html` <progress max=${j.total} value=${j.done}></progress>` : ""}</td>
        <td>${["waiting", "running"].includes(j.state) ? html`<${Cancel} id=${j.id} />`
          : html`<button type=button onClick=${() => choose({ job: j === open ? "" : j.id })}>${j === open ? "Close" : "Open"}</button>`}</td>
      </tr>`)}</tbody></table></div>`}</section>
    ${open && html`<section class=panel><h2>${open.method}</h2>${open.refusal && html`<${Refusal} refusal=${open.refusal} />`}
      ${open.result && html`<${Stored} key=${open.id} result=${open.result} />`}</section>`}`;
}

function Cancel({ id }) {
  const [asked, ask] = useState(false);
  return html`<button type=button disabled=${asked} onClick=${() => { ask(true); remove(`jobs/${id}`).catch(() => ask(false)); }}>Cancel</button>`;
}

const said = (values) => Object.entries(values).map(([k, v]) => `${k} ${Array.isArray(v) ? v.join(",") : v}`).join(", ");
