/** Methods: every row of the table, with its form, its cost before it runs, its picture and its control. */
import { html, useState } from "../vendor/preact.js";
import { AsJob, Badges, spoken } from "../panel.js";
import { about, address, choose, chosen, model, useSignal } from "../state.js";

export function Ask() {
  const { methods } = useSignal(about);
  useSignal(address);
  const [wanted, want] = useState("");
  const found = methods.filter((m) => `${m.name} ${m.answers}`.toLowerCase().includes(wanted.toLowerCase()));
  const card = methods.find((m) => m.name === chosen("method"));
  const rooms = [...new Set(found.map((m) => m.room))];
  return html`<div class=split>
    <nav class=list aria-label=Methods><input type=search placeholder="find a method" aria-label="find a method" value=${wanted}
        onInput=${(e) => want(e.target.value)} />
      ${rooms.map((room) => html`<h3 key=${room}>${room}</h3><ul>${found.filter((m) => m.room === room).map((m) => html`<li key=${m.name}>
        <button type=button aria-current=${m === card ? "true" : undefined} onClick=${() => choose({ method: m.name, values: "" })}
          data-tip=${m.answers}>${spoken(m.name.split(".")[1])}</button></li>`)}</ul>`)}</nav>
    <div class=detail>${card ? html`<${Form} key=${card.name} card=${card} />`
      : html`<p class=empty>Choose a method: each has its form, its cost before it runs, and its control.</p>`}</div></div>`;
}

const LOADING = ["model_dtype", "model_device", "model_attention", "other_dtype", "other_device", "other_attention"];

function Form({ card }) {
  const name = useSignal(model)?.name, { files } = useSignal(about);
  const first = () => ({ ...defaults(card), ...parsed(chosen("values")) });
  const [values, set] = useState(first), [asked, ask] = useState(null);
  const entries = card.form.filter((e) => e.name !== "model" && !LOADING.includes(e.name));
  const rare = entries.filter((e) => !e.required && e.subject && e.name !== e.subject), usual = entries.filter((e) => !rare.includes(e));
  const change = (n, v) => { const next = { ...values, [n]: v }; set(next); choose({ values: JSON.stringify(sent(card, next)) }); };
  const row = (e) => html`<${Entry} key=${e.name} entry=${e} value=${values[e.name]} change=${(v) => change(e.name, v)} />`;
  return html`<section class="panel form"><h2>${card.answers}</h2>
    <p class=about><code>${card.name}</code> <${Badges} card=${card} /></p><p class=note>${card.paper}</p>
    <form onSubmit=${(e) => { e.preventDefault(); ask({ model: name, method: card.name, values: sent(card, values) }); }}>
      <div class=entries>${usual.map(row)}</div>
      ${rare.length > 0 && html`<details><summary>More</summary><div class=entries>${rare.map(row)}</div></details>`}
      ${files.length > 0 && html`<p class=note>Files: ${files.map((f) => html`<code key=${f.id}>file:${f.id}</code> `)}</p>`}
      <p><button class=main>Plan</button></p></form>
    ${asked && html`<${AsJob} key=${JSON.stringify(asked)} question=${asked} />`}</section>`;
}

function Entry({ entry: e, value, change }) {
  const type = { integer: "number", number: "number" }[e.type] ?? "text";
  const control = e.choices.length > 0 && !e.several
    ? html`<select value=${value} onChange=${(x) => change(x.target.value)}>${e.choices.map((c) => html`<option key=${c} value=${c}>${c}</option>`)}</select>`
    : e.type === "boolean" ? html`<input type=checkbox checked=${value} onChange=${(x) => change(x.target.checked)} />`
    : html`<input type=${e.several ? "text" : type} step=${e.type === "number" ? "any" : 1} value=${value} required=${e.required}
        placeholder=${e.nullable ? "none" : ""} spellcheck=${false} onInput=${(x) => change(x.target.value)} />`;
  return html`<label class=${e.type === "boolean" ? "yes" : ""}><span>${spoken(e.name)}</span>${control}<small>${e.help}</small></label>`;
}

const defaults = (card) => Object.fromEntries(card.form.map((e) => [e.name,
  Array.isArray(e.default) ? e.default.join(",") : e.default ?? (e.type === "boolean" ? false : "")]));

const parsed = (text) => { try { return Object.fromEntries(Object.entries(JSON.parse(text)).map(([k, v]) => [k, Array.isArray(v) ? v.join(",") : v])); } catch { return {}; } };

/** The values that differ from the defaults, as JSON has them. */
function sent(card, values) {
  const usual = defaults(card), out = {};
  for (const e of card.form) {
    const v = values[e.name];
    if (e.name === "model" || v === usual[e.name] || v === "" || v === undefined) continue;
    out[e.name] = e.several ? v : e.type === "integer" || e.type === "number" ? Number(v) : v;
  }
  return out;
}
