/** Why this token? What is expected, when it appears along depth, and which components write it. */
import { html } from "../vendor/preact.js";
import { Busy, MethodPanel, Refusal, useAnswer } from "../panel.js";
import { address, choose, chosen, model, useSignal } from "../state.js";

export function Why() {
  useSignal(address);
  const prompt = chosen("prompt"), other = chosen("other"), target = chosen("target"), foil = chosen("foil");
  const answering = (text) => text && { prompts: text, ...(target ? { answer: target } : {}) };
  const between = (text) => text && (target && foil
    ? { task: "sentence", task_sentence: text, task_target: target, task_foil: foil } : answering(text));
  const asked = answering(prompt), against = between(prompt);
  return html`<div class=${other ? "pair" : ""}><${Expected} prompt=${prompt} />
      ${other && html`<${Expected} prompt=${other} title="And with prompt B?" />`}</div>
    <div class=panels>
      <${MethodPanel} method="lenses.lens_grid" values=${asked} other=${answering(other)} title="What would each layer say?" fields=${["probability"]}
        lead=${(field, { row, index }) => choose({ layer: row, position: String(index) })} />
      <${MethodPanel} method="lenses.direct_attribution" values=${against} other=${between(other)} fields=${["effect"]}
        title=${target && foil ? `Which components write “${target.trim()}” rather than “${foil.trim()}”?`
    : "Which components write the answer?"} lead=${(field, { row }) => component(row)} />
      <${MethodPanel} method="lenses.logit_lens" values=${asked} other=${answering(other)} title="Where along depth does the answer appear?"
        fields=${["probability", "rank"]} />
      <${MethodPanel} method="lenses.source_attribution" values=${against} other=${between(other)} fields=${["effect"]}
        title="From which tokens do heads bring it?" lead=${(field, { row }) => component(row)} />
    </div>`;
}

/** A click on a component selects its layer and head. */
function component(text) {
  const [, layer, head] = /(\d+)(?:\.(\d+))?$/.exec(text) ?? [];
  if (layer) choose({ layer, head: head ?? "" });
}

/** The tokens of the prompt, and the most likely next ones; a click makes one target or foil. */
function Expected({ prompt, title = "What does it go on with?" }) {
  const name = useSignal(model)?.name;
  const { answer, refusal, busy } = useAnswer("predict", prompt && { model: name, prompt, top: 8 });
  const target = chosen("target"), foil = chosen("foil");
  const pick = (text) => (!target || target === text ? choose({ target: target === text ? "" : text })
    : choose({ foil: foil === text ? "" : text }));
  return html`<section class="panel expected" aria-busy=${busy}>
    <h2>${title}</h2>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${!answer && busy && html`<${Busy} text="the model is being loaded" />`}
    ${answer && html`<p class=strip>${answer.tokens.map((t, i) => html`<span key=${i} class=token
        data-tip=${`position ${i}\ntoken ${t.id}`}>${t.text}</span>`)}</p>
      <ul class=guesses>${answer.next.map((g) => html`<li key=${g.id} class=${g.text === target ? "is-target" : g.text === foil ? "is-foil" : ""}>
        <button type=button onClick=${() => pick(g.text)} data-tip=${tipOf(g, target, foil)}>
          <span class=bar><i style=${`width:${100 * g.probability}%`}></i></span>
          <b>${g.text}</b><span class=amount>${percent(g.probability)}</span></button></li>`)}</ul>`}
  </section>`;
}

const tipOf = (g, target, foil) => `logit ${g.logit.toFixed(2)}, token ${g.id}\n${g.text === target ? "the target; click to unset"
  : g.text === foil ? "the foil; click to unset" : target ? "click: the foil" : "click: the target"}`;

export const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.001 ? `${(100 * p).toPrecision(2)} %` : "< 0.1 %");
