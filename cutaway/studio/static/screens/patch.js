/** Patch map: where must activations of one prompt stand in another for its answer to come back? */
import { html, useState } from "../vendor/preact.js";
import { MethodPanel } from "../panel.js";
import { address, choose, chosen, useSignal } from "../state.js";

const SITES = { resid_pre: "stream, by position", z: "heads", mlp_out: "MLPs, by position", attn_out: "attention, by position" };

export function Patch() {
  useSignal(address);
  const [site, set] = useState("resid_pre"), [direction, turn] = useState("denoise");
  const prompt = chosen("prompt"), other = chosen("other"), target = chosen("target"), foil = chosen("foil");
  const task = prompt && target && foil && { task: "sentence", task_sentence: prompt, task_target: target, task_foil: foil,
    ...(other ? { task_corrupt: other } : {}) };
  const values = task && { ...task, site: [site], direction };
  const lead = (field, place, axes) => choose(axes.includes("head")
    ? { layer: place.row, head: place.column } : { layer: place.row, position: String(place.index) });
  return html`<div class=choices>
      <label>Site <select value=${site} onChange=${(e) => set(e.target.value)}>
        ${Object.entries(SITES).map(([s, words]) => html`<option key=${s} value=${s}>${words}</option>`)}</select></label>
      <label>Direction <select value=${direction} onChange=${(e) => turn(e.target.value)}>
        <option value=denoise>clean into corrupt</option><option value=noise>corrupt into clean</option></select></label></div>
    ${!task && html`<p class=empty>Give a prompt, a target and a foil above; without prompt B a word is replaced for you.</p>`}
    <div class=panels>
      <${MethodPanel} method="patching.activation" values=${values} title="Exact: one run a cell" fields=${["effect"]} lead=${lead} />
      <${MethodPanel} method="patching.attribution" values=${values} title="First order: two runs in all, audited" lead=${lead}
        fields=${["effect"]} />
    </div>`;
}
