/** The page of a latent: where it fires, what it writes, what it is like; what its ablation changes, and its dose. */
import { html, useState } from "../vendor/preact.js";
import { post } from "../api.js";
import { AsJob, Busy, MethodPanel, Refusal, Result, useAnswer } from "../panel.js";
import { number, share, Strip } from "../strip.js";
import { DELTA, Sides, useSide } from "../sides.js";
import { address, choose, chosen, useSignal } from "../state.js";
import { FLAGS, readSide, Said, scoresTip, short } from "./features.js";

const FIELDS = ["histogram", "raises", "lowers", "neighbour", "together", "quantile"];

export function Latent({ at, latent }) {
  useSignal(address);
  const { answer, refusal, busy } = useAnswer("feature", { ...at, latent });
  const lead = (field, { row }) => { const [, n] = /(\d+)$/.exec(row) ?? []; if (n && ["neighbour", "together"].includes(field)) choose({ latent: n }); };
  return html`<div class=beside aria-busy=${busy}>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}${!answer && busy && html`<section class=panel><${Busy} text="reading" /></section>`}
    ${answer && html`<${Head} page=${answer} /><${Mine} at=${at} latent=${latent} /><${Examples} page=${answer} />
      <section class="panel numbers"><h2>What it writes, and what it is like</h2><${Result} shown=${answer.shown} fields=${FIELDS} lead=${lead} /></section>
      <${Causes} at=${at} latent=${latent} />`}</div>`;
}

function Head({ page: { row: r, labels, dictionary } }) {
  return html`<section class="panel head"><h2>Latent ${r.latent} <small>of ${short(dictionary)}</small>${r.flags.map((f) => html` <span class=flag key=${f}
      data-tip=${FLAGS[f]}>${f}</span>`)}</h2>
    ${labels.map((l) => html`<p class=said key=${l.source}><span class=badge>${l.source}</span> <${Said} text=${l.text} /></p>
      ${l.scores.F1 !== undefined && html`<${Scores} scores=${l.scores} />`}`)}
    ${labels.length === 0 && html`<p class=note>No label yet: no rule was looked for, or it is active on too few tokens.</p>`}
    <dl class=facts><${Fact} name=density value=${share(r.density)} beside=${`[${share(r.interval[0])}, ${share(r.interval[1])}]`} tip="share of tokens on which it is active, 95 % (Wilson)" />
      <${Fact} name="largest activation" value=${number(r.largest)} /><${Fact} name="mean where active" value=${number(r.mean)} />
      <${Fact} name="peak token" value=${`“${r.peak}”`} tip="the token on which most of its largest examples stand" /></dl></section>`;
}

const Fact = ({ name, value, beside = "", tip }) => html`<div data-tip=${tip}><dt>${name}</dt><dd>${value} <small>${beside}</small></dd></div>`;

const Scores = ({ scores: s }) => html`<dl class=facts data-tip=${scoresTip(s)}>
  ${["precision", "recall", "F1", "AUROC"].filter((n) => s[n] !== undefined).map((n) => html`<${Fact} key=${n} name=${n} value=${s[n].toFixed(2)}
    beside=${s[`${n} interval`] ? `[${s[`${n} interval`].map((v) => v.toFixed(2)).join(", ")}]` : ""} />`)}
  <${Fact} name="F1 by chance" value=${(s["F1 by chance"] ?? 0).toFixed(2)} beside=${`· random ${(s["F1 of random features"] ?? []).map((v) => v.toFixed(2)).join(", ")}`} />
  <${Fact} name="held-out tokens" value=${s["held-out tokens"] ?? ""} /></dl>`;

/** The latent on the prompts of the bar, or on a text of yours. */
function Mine({ at, latent }) {
  const [text, set] = useState(null), [draft, write] = useState("");
  const asked = text ?? chosen("prompt"), other = text === null ? chosen("other") : "", side = useSide(other);
  const { answer, refusal } = useAnswer("read", asked && { ...at, text: asked, other, latent, top: 1 });
  const tokens = answer ? readSide(answer, side).filter((t) => t.value !== null) : [];
  const most = Math.max(0, ...tokens.map((t) => (t.special ? 0 : Math.abs(t.value))));
  const tip = (t) => (t.special ? "special\nnot counted" : `${number(t.value)}\n${share(Math.abs(t.value) / answer.largest)} of its largest in the store`);
  return html`<section class="panel mine"><h2>On ${text === null ? "the prompt" : "your text"}${side === DELTA ? ", more in A than in B" : ""}</h2>
    ${other && html`<${Sides} />`}${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${tokens.length > 0 && html`<p class=strip><${Strip} tokens=${tokens.map((t) => ({ text: t.text, value: t.special ? null : t.value, tip: tip(t) }))} largest=${answer.largest} /></p>
      <p class=note>${most === 0 ? (side === DELTA ? "It is equally active on all tokens of both." : "It is active on none of these tokens.")
    : `At most ${number(most)}${side === DELTA ? " of difference" : ""}, ${share(most / answer.largest)} of its largest in the store.`}</p>`}
    ${side === DELTA && answer?.apart && html`<p class=empty>${answer.apart}</p>`}
    <form class=find onSubmit=${(e) => { e.preventDefault(); set(draft || null); }}><input type=text value=${draft} placeholder="test a text of yours" aria-label="test a text"
      maxlength=20000 spellcheck=${false} onInput=${(e) => write(e.target.value)} /><button>Test</button></form></section>`;
}

function Examples({ page }) {
  const largest = page.row.largest, [all, open] = useState(false);
  const top = page.strips.filter((s) => s.place.startsWith("#")), drawn = page.strips.filter((s) => !s.place.startsWith("#"));
  return html`<section class="panel examples"><h2>Where it fires</h2>
    <p class=note>The largest, then random ones of each octave of activation; q says between which quantiles of its active tokens an octave lies. ★ is a held-out document.</p>
    <${Rows} strips=${top} largest=${largest} /><h3>Random, by octave</h3><${Rows} strips=${all ? drawn : drawn.slice(0, 9)} largest=${largest} />
    ${drawn.length > 9 && html`<button type=button onClick=${() => open(!all)}>${all ? "Fewer" : `All ${drawn.length}`}</button>`}</section>`;
}

const Rows = ({ strips, largest }) => html`<ol class=strips>${strips.map((s, i) => html`<li key=${i}><span class=amount>${number(s.value)}</span>
  <span class=place>${s.place}${s.held_out ? " ★" : ""}</span><${Strip} tokens=${s.tokens} largest=${largest} peak=${s.peak} /></li>`)}</ol>`;

/** The causal card, and steering by the decoder row. */
function Causes({ at, latent }) {
  const card = { model: at.model, method: "causal_card", values: { store: at.store, dictionary: at.dictionary, latent } };
  const [made, make] = useState(null), [refusal, refuse] = useState(null);
  const prompt = chosen("prompt"), target = chosen("target"), foil = chosen("foil");
  const values = made && { task: "sentence", task_sentence: prompt, task_target: target, task_foil: foil, direction: `file:${made.id}`, prompts: prompt };
  return html`<section class=panel><h2>What does its ablation change?</h2>
      <p class=about><code>features.card</code> <span class=badge>intervenes</span> <span class=badge>control: latents of like density, random tokens</span></p>
      <${AsJob} key=${JSON.stringify(card)} question=${card} fields=${["change", "swap"]} about="loss and logits on eight of its examples without it, and its peak token exchanged; a few seconds" /></section>
    ${made ? html`<${MethodPanel} method="directions.steer" values=${values} auto=${false} title="What does a dose of it do to the answer?" fields=${["effect", "perplexity"]}
      note=${`A strength of 1 is its mean activation (${number(made.step)}) of its decoder row at ${made.sites.join(", ")}; positions: all.`} />`
    : html`<section class=panel><h2>What does a dose of it do to the answer?</h2><p class=about><code>directions.steer</code> <span class=badge>control: random directions</span></p>
      ${refusal && html`<${Refusal} refusal=${refusal} />`}
      <p><button type=button disabled=${!(prompt && target && foil)} onClick=${() => post("direction", { ...at, latent }).then(make).catch(refuse)}>Steer by it</button>
        <span class=soft> ${target && foil ? `“${target.trim()}” over “${foil.trim()}” after the prompt` : "give a prompt, a target and a foil above"}</span></p></section>`}`;
}
