/** Intervene: a drawer beside every screen. Its changes stand in the address, so that a link shows the same. */
import { html, useEffect, useState } from "./vendor/preact.js";
import { post } from "./api.js";
import { Busy, Copy, Refusal, useAnswer, useRefined } from "./panel.js";
import { Picture } from "./marks.js";
import { about, address, choose, chosen, jobs, model, useSignal } from "./state.js";

const KINDS = {
  zero: "set to zero", mean: "set to the mean over the prompt", resample: "exchange among the tokens", scale: "scale by",
  patch: "patch from prompt B", steer: "steer by a direction", latent: "steer by a latent",
};
const WORDS = 12; // tokens of a continuation, asked for when the numbers are there
const NUMBER = { scale: "factor", steer: "strength", latent: "strength" };
const HINTS = { steer: "file:ID of a direction", latent: "file:ID or miniworld/NAME" };
const FIRST = { scale: 0, steer: 4, latent: 4 };

/** The changes that the address names. */
export function edits() {
  try { const found = JSON.parse(chosen("edits") || "[]"); return Array.isArray(found) ? found : []; } catch { return []; }
}

const write = (list) => choose({ edits: list.length ? JSON.stringify(list) : "" });

/** The button in the head. */
export function Toggle() {
  useSignal(address);
  const open = chosen("drawer") === "1", count = edits().length;
  return html`<button type=button class=intervene aria-expanded=${open ? "true" : "false"} aria-controls=drawer
    onClick=${() => choose({ drawer: open ? "" : "1" })}>Intervene${count > 0 ? html` <span class=count>${count}</span>` : ""}</button>`;
}

/** The place that the selection means. */
function selected() {
  const layer = chosen("layer").replace(/\D/g, ""), head = chosen("head").replace(/\D/g, ""), position = chosen("position");
  if (!layer) return null;
  if (head) return { address: `z.${layer}.${head}`, positions: [] };
  return position ? { address: `resid_post.${layer}`, positions: [Number(position)] } : { address: `mlp_out.${layer}`, positions: [] };
}

const said = (place) => place.address + (place.positions.length ? ` at token ${place.positions.join(", ")}` : "");

export function Drawer() {
  useSignal(address);
  if (chosen("drawer") !== "1") return null;
  const list = edits(), place = selected() ?? { address: "z.0.0", positions: [] };
  const change = (i, part) => write(list.map((e, j) => (i === j ? { ...e, ...part } : e)));
  return html`<aside id=drawer class=drawer aria-label=Intervene onKeyDown=${(e) => e.key === "Escape" && choose({ drawer: "" })}>
    <div class=drawerhead><h2>Intervene</h2>
      <button type=button aria-label="Close the drawer" onClick=${() => choose({ drawer: "" })}>×</button></div>
    <p class=note>Change something inside the run of the prompt. A click on a head, a component or a cell of any picture fills in its
      place.</p>
    <ol class=edits>${list.map((e, i) => html`<${Entry} key=${i} edit=${e} change=${(part) => change(i, part)}
      drop=${() => write(list.filter((_, j) => j !== i))} />`)}</ol>
    <p class=adding><button type=button class=${list.length ? "" : "main"}
      onClick=${() => write([...list, { kind: "zero", ...place }])}>Change <code>${said(place)}</code></button>
      ${list.length > 0 && html`<button type=button onClick=${() => write([])}>Undo all</button>`}</p>
    ${list.length > 0 && html`<${Answer} list=${list} />`}
    <${Files} />
  </aside>`;
}

/** One change: what, where, at which tokens, how much. */
function Entry({ edit, change, drop }) {
  const number = NUMBER[edit.kind], file = HINTS[edit.kind];
  const turn = (kind) => change({ kind, number: FIRST[kind] ?? 1, file: "", latent: 0 });
  const positions = (text) => change({ positions: text.split(/[\s,]+/).filter(Boolean).map(Number).filter(Number.isInteger) });
  return html`<li>
    <label class=kind><span>Change</span><select value=${edit.kind} onChange=${(e) => turn(e.target.value)}>
      ${Object.entries(KINDS).map(([k, words]) => html`<option key=${k} value=${k}>${words}</option>`)}</select></label>
    ${number && html`<label class=number><span>${number}</span><input type=number step=any value=${edit.number}
      onChange=${(e) => change({ number: Number(e.target.value) })} /></label>`}
    <label class=place><span>at</span><input type=text value=${edit.address} spellcheck=${false} autocomplete=off
      onChange=${(e) => change({ address: e.target.value.trim() })} /></label>
    <label class=positions><span>tokens</span><input type=text value=${(edit.positions ?? []).join(" ")} placeholder=all inputmode=numeric
      onChange=${(e) => positions(e.target.value)} /></label>
    ${file && html`<label class=source><span>${edit.kind === "latent" ? "dictionary" : "direction"}</span><input type=text value=${edit.file}
      placeholder=${file} list=directions autocomplete=off onChange=${(e) => change({ file: e.target.value.trim() })} /></label>`}
    ${edit.kind === "latent" && html`<label class=number><span>latent</span><input type=number min=0 step=1 value=${edit.latent}
      onChange=${(e) => change({ latent: Math.max(0, Math.round(Number(e.target.value))) })} /></label>`}
    <button type=button class=drop aria-label=${`Undo the change of ${edit.address}`} onClick=${drop}>×</button></li>`;
}

/** Files and results that hold a direction. */
function Files() {
  const found = useSignal(jobs).filter((j) => j.result && j.method.startsWith("directions."));
  const { files } = useSignal(about);
  return html`<datalist id=directions>${files.map((f) => html`<option key=${f.id} value=${`file:${f.id}`}>${f.name}</option>`)}
    ${found.map((j) => html`<option key=${j.id} value=${`file:${j.result}`}>${j.method}</option>`)}</datalist>`;
}

function Answer({ list }) {
  const prompt = chosen("prompt"), name = useSignal(model)?.name;
  const lacking = list.find((e) => HINTS[e.kind] && !e.file);
  const question = prompt && !lacking && { model: name, prompt, other: chosen("other"), target: chosen("target"), foil: chosen("foil"),
    edits: list };
  const { answer, refusal, busy, early } = useRefined("intervene", question || null, (q) => ({ ...q, samples: 2 }));
  const texts = useAnswer("intervene", answer && question && !early ? { ...question, words: WORDS, samples: 1 } : null);
  if (!prompt) return html`<p class=empty>Give a prompt first.</p>`;
  if (lacking) return html`<p class=note>Name the ${lacking.kind === "latent" ? "dictionary" : "direction"} of the change at <code>${lacking.address}</code>.</p>`;
  return html`<div class=answer aria-busy=${busy} aria-live=polite>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${busy && html`<${Busy} text=${early ? "with two controls; more are at work" : answer ? "asking again" : "at work"} />`}
    ${answer && !refusal && html`<${Outcome} key=${name} answer=${answer} texts=${texts} />`}</div>`;
}

function Outcome({ answer, texts }) {
  const { tokens, effect, divergence, target, foil } = answer;
  const most = Math.max(...tokens.flatMap((t) => t.probability), 1e-9);
  return html`
    <dl class=measures>
      <dt>${foil ? html`<q>${target.trim()}</q> − <q>${foil.trim()}</q>` : html`<q>${target.trim()}</q>`}</dt>
      <dd><${Amount} effect=${effect} unit=${answer.unit} digits=2 signed /></dd>
      <dt>divergence</dt><dd><${Amount} effect=${divergence} unit=nats digits=3 /></dd></dl>
    <table class=nexts><thead><tr><th>Next</th><th>before</th><th>after</th><th>Δ in points, band</th></tr></thead>
      <tbody>${tokens.map((t) => html`<tr key=${t.id} class=${t.text === target ? "is-target" : t.text === foil ? "is-foil" : ""}>
        <th scope=row>${t.text}</th>
        ${t.probability.map((p, i) => html`<td key=${i} data-tip=${`logit ${t.logit[i].toFixed(2)}`} tabindex=0><span class=amount>${percent(p)}</span>
          <span class=bar><i class=${i ? "after" : ""} style=${`width:${100 * p / most}%`}></i></span></td>`)}
        <td><${Band} token=${t} /></td></tr>`)}</tbody></table>
    <p class=note>● marks a change outside the band ${answer.band}.</p>
    <div class=spoken aria-busy=${texts.busy}>${texts.answer ? html`<p><b>before</b> <span>${texts.answer.text || "–"}</span></p>
      <p class=${texts.answer.text === texts.answer.edited_text ? "" : "other"}><b>after</b> <span>${texts.answer.edited_text || "–"}</span></p>`
    : texts.busy && html`<${Busy} text="going on" />`}</div>
    <div class=folds><${Picture} markup=${answer.how} />
      <p class=repeat><${Copy} text=${answer.python} name=Python /><${Copy} text=${answer.command} name=Command />
        <${Copy} text=${JSON.stringify(answer, null, 1)} name=JSON /></p></div>
    <${Save} values=${{ ...answer.values, words: WORDS }} />`;
}

const tipOf = (e, unit, digits) => `${signed(e.value, digits)} ${unit}\nband ${signed(e.low, digits)} to ${signed(e.high, digits)}\n${e.marked
  ? "outside the band" : "within the band: no more than the same elsewhere"}`;

const Amount = ({ effect, unit, digits, signed: plus }) => html`<span tabindex=0 class=${effect.marked ? "marked" : ""} data-tip=${tipOf(effect, unit, digits)}>
  ${effect.marked ? "● " : ""}${plus ? signed(effect.value, digits) : effect.value.toFixed(digits)} <small>${
  `${unit}; band ${signed(effect.low, digits)} to ${signed(effect.high, digits)}`}</small></span>`;

/** The change of a token's probability on a line from −1 to 1, drawn by its root so that small ones are seen. */
function Band({ token }) {
  const { change, logit_change: logit } = token, at = (v) => 50 + 50 * Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v)));
  const [a, b, x] = [change.low, change.high, change.value].map(at);
  return html`<span class=${`band ${change.marked ? "marked" : ""}`} tabindex=0
    data-tip=${`${tipOf(change, "probability", 4)}\nlogit ${tipOf(logit, "", 2)}`}>
    <span class=line><i class=chance style=${`left:${a}%;width:${Math.max(b - a, 1)}%`}></i>
      <i class=${`dot ${change.marked ? (change.value > 0 ? "up" : "down") : ""}`} style=${`left:${x}%`}></i></span>
    <span class=amount>${points(change.value)}</span></span>`;
}

/** Keep the changes, the prompt and the numbers as a run. */
function Save({ values }) {
  const [job, set] = useState(null), [refusal, refuse] = useState(null), name = useSignal(model)?.name;
  const known = useSignal(jobs).find((j) => j.id === job), key = JSON.stringify(values);
  useEffect(() => { set(null); refuse(null); }, [key]);
  const keep = () => post("jobs", { model: name, method: "patching.intervene", values }).then((j) => set(j.id)).catch(refuse);
  return html`<p class=saving>${job ? html`<span class=soft>${known?.state === "done" ? "Saved." : "Saving …"}</span>
      <button type=button onClick=${() => choose({ job, drawer: "" }, "runs")}>Show it under Runs</button>`
    : html`<button type=button onClick=${keep}>Save as experiment</button>`}</p>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}`;
}

const signed = (v, digits) => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(digits)}`;
const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.001 ? `${(100 * p).toPrecision(2)} %` : "< 0.1 %");
const points = (v) => (Math.abs(v) < 0.0005 ? "0" : `${v < 0 ? "−" : "+"}${(100 * Math.abs(v)).toFixed(1)}`);
