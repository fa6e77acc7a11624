/** A panel: one question put to the server, with its cost before it runs, its picture, its control, and how to repeat it. */
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { post, remove } from "./api.js";
import { Picture } from "./marks.js";
import { DELTA, Sides, useSide } from "./sides.js";
import { jobs, large, methods, model, ready, useSignal } from "./state.js";

/**
 * The answer to a question, asked again whenever it changes; the last answer stays until the next one is there.
 * `question` is null while there is nothing to ask; another `round` asks the same again.
 */
export function useAnswer(action, question, round = 0) {
  const [state, set] = useState({ busy: false });
  const loaded = useSignal(ready), body = question && JSON.stringify(question);
  useEffect(() => {
    if (!body || !loaded) { set({ busy: Boolean(body) }); return undefined; }
    const control = new AbortController();
    set((old) => ({ ...old, busy: true, refusal: undefined }));
    post(action, JSON.parse(body), control.signal)
      .then((answer) => set({ answer, of: body, busy: false }))
      .catch((refusal) => { if (refusal.name !== "AbortError") set({ refusal, busy: false }); });
    return () => control.abort();
  }, [action, body, loaded, round]);
  return state;
}

/** The number of jobs that are done: lists of results are asked for again when it changes. */
export const useDone = () => useSignal(jobs).filter((j) => j.state === "done").length;

/**
 * The answer to a question on a large model: first that of the same question with `less` (fewer controls), which is
 * soon there, and then the whole one in its place. On a small model the whole one is asked at once.
 */
export function useRefined(action, question, less) {
  const early = useSignal(large) && question && less(question);
  const first = useAnswer(action, early || null), there = !early || first.of === JSON.stringify(early) || first.refusal;
  const whole = useAnswer(action, there ? question : null);
  return early && !whole.answer ? { ...first, busy: !whole.refusal, early: Boolean(first.answer), refusal: whole.refusal ?? first.refusal } : whole;
}

/** The same call of a method with one sample of its control. */
const sampled = (question) => ({ ...question, values: { ...question.values, samples: 1 } });

/** A refusal: what, why, and what instead. */
export const Refusal = ({ refusal }) => html`<div class=refusal role=alert>
  <p><b>${refusal.what}</b></p><p>${refusal.why}</p><p class=instead>Instead: ${refusal.instead}</p></div>`;

export const Busy = ({ done = 0, total = 0, text = "at work" }) => html`<p class=busy role=status>
  ${total ? html`<progress max=${total} value=${done}></progress>` : html`<span class=spin></span>`}<span>${text}</span></p>`;

/**
 * A method with given values. `auto` asks at once; otherwise a button shows the cost first and runs it as a job.
 * `fields` are those drawn, in order; `lead(field, place, axes)` says what a click selects.
 */
export function MethodPanel({ method, values, other, fields = [], title, auto = true, lead, note, done }) {
  const card = useSignal(methods).get(method), name = useSignal(model)?.name;
  const question = values && { model: name, method, values };
  return html`<section class=panel>
    <h2>${title ?? card?.answers ?? method}</h2>
    <p class=about><code>${method}</code>${card && html` <${Badges} card=${card} />`}</p>
    ${note && html`<p class=note>${note}</p>`}
    ${!values ? html`<p class=empty>Give a prompt above.</p>`
      : auto && other ? html`<${Compared} first=${question} second=${{ ...question, values: other }} fields=${fields} lead=${lead} />`
      : auto ? html`<${Asked} question=${question} fields=${fields} lead=${lead} />`
      : html`<${AsJob} key=${JSON.stringify(question)} question=${question} fields=${fields} lead=${lead} done=${done} />`}
  </section>`;
}

const WORDS = { observational: "reads only", interventional: "intervenes", counterfactual: "counterfactual" };

/** The rung and the control of a method. */
export const Badges = ({ card }) => html`<span class=badge data-tip=${RUNGS[card.rung] ?? ""}>${WORDS[card.rung] ?? card.rung}</span>
  <span class=badge data-tip=${`Every effect stands beside this control.\n${card.paper}`}>control: ${spoken(card.control)}</span>`;

const RUNGS = {
  observational: "Rung: observational.\nThe numbers say what goes together, not what causes it.",
  interventional: "Rung: interventional.\nThe numbers say what changes when this is changed.",
  counterfactual: "Rung: counterfactual.\nThe numbers say what would have been.",
};

export const spoken = (word) => String(word ?? "").replaceAll("_", " ");

function Asked({ question, fields, lead }) {
  const refines = useSignal(methods).get(question.method)?.form.some((e) => e.name === "samples");
  const { answer, refusal, busy, early } = useRefined("run", question, refines ? sampled : () => null);
  return html`<div aria-busy=${busy}>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${busy && html`<${Busy} text=${early ? "with one control; more are at work" : answer ? "asking again" : "at work"} />`}
    ${answer && html`<${Result} shown=${answer} fields=${fields} lead=${lead} />`}</div>`;
}

/** The same question of two prompts: A, B, or A minus B. */
function Compared({ first, second, fields, lead }) {
  const side = useSide();
  const a = useAnswer("run", first), b = useAnswer("run", second);
  const both = a.answer && b.answer && { model: first.model, first: a.answer.id, second: b.answer.id, fields };
  const d = useAnswer("difference", side === DELTA ? both : null);
  const { answer, refusal, busy } = { A: a, B: b, [DELTA]: { ...d, refusal: d.refusal ?? a.refusal ?? b.refusal } }[side];
  return html`<div aria-busy=${busy}><${Sides} />
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${busy && html`<${Busy} />`}
    ${answer && html`<${Result} key=${side} shown=${answer} fields=${fields} lead=${lead} stored=${side !== DELTA} />`}</div>`;
}

/**
 * A call that takes long: its cost, then a job with its progress, then its result. Jobs that are no methods have no
 * cost to count: `about` says what they take. `done` is called with the result, and `quiet` does not show it.
 */
export function AsJob({ question, fields, lead, about: words, name = "Run", done, quiet = false }) {
  const [job, setJob] = useState(null), [refusal, refuse] = useState(null);
  const known = useSignal(jobs).find((j) => j.id === job);
  const start = () => post("jobs", question).then((j) => { refuse(null); setJob(j.id); }).catch(refuse);
  const state = known?.state ?? (job ? "waiting" : "");
  useEffect(() => { if (known?.result && done) done(known.result); }, [known?.result]);
  return html`<div>
    ${!job && (words === undefined ? html`<${Cost} question=${question} start=${start} />`
    : html`<div class=cost><button type=button class=main onClick=${start}>${name}</button><span class=soft>${words}</span></div>`)}
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${["waiting", "running"].includes(state) && html`<div class=job>
      <${Busy} done=${known?.done} total=${known?.total} text=${state === "waiting" ? "waiting" : "at work"} />
      <button type=button onClick=${() => remove(`jobs/${job}`)}>Cancel</button></div>`}
    ${known?.refusal && html`<${Refusal} refusal=${known.refusal} />`}
    ${state === "cancelled" && html`<p class=empty>Cancelled.</p>`}
    ${["cancelled", "refused", "lost"].includes(state) && html`<button type=button onClick=${start}>Run again</button>`}
    ${known?.result && !quiet && html`<${Stored} result=${known.result} fields=${fields} lead=${lead} />`}</div>`;
}

/** What a call would cost, and the button that makes it. */
function Cost({ question, start }) {
  const { answer, refusal, busy } = useAnswer("cost", question);
  const long = refusal?.status === 504;
  const counted = (n, word) => `${Math.round(n).toLocaleString("en")} ${word}${Math.round(n) === 1 ? "" : "s"}`;
  const many = answer?.forwards == null ? "" : counted(answer.forwards, "forward");
  const back = answer?.backwards ? `, ${counted(answer.backwards, "backward")}` : "";
  return html`<div class=cost>
    <button type=button class=main onClick=${start} disabled=${Boolean(refusal) && !long}>Run</button>
    ${long && html`<span class=soft>no estimate: planning ${refusal.why.replace("it takes", "takes")}; the job tells how far it is</span>`}
    ${busy && html`<span class=soft>planning …</span>`}
    ${answer && html`<span class=soft data-tip=${answer.lines.join("\n")} tabindex=0>
      ${answer.seconds == null ? "" : `about ${seconds(answer.seconds)} here, `}${many}${back}</span>`}
    ${refusal && !long && html`<${Refusal} refusal=${refusal} />`}</div>`;
}

export const seconds = (s) => (s < 1 ? "a second" : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);

/** A result of the folder, shown again. */
export function Stored({ result, fields = [], lead }) {
  const { answer, refusal, busy } = useAnswer("show", { model: model.value?.name, result, fields });
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  return answer ? html`<${Result} shown=${answer} fields=${fields} lead=${lead} />` : busy && html`<${Busy} />`;
}

/** A result: summary, pictures, numbers, how it was computed, and how to repeat it. */
export function Result({ shown, fields = [], lead, stored = true }) {
  const named = fields.length ? fields.map((f) => shown.drawings.find((d) => d.field === f)).filter(Boolean) : shown.drawings;
  const drawings = named.length ? named : shown.drawings;
  return html`<div class=result>
    ${shown.summary.length > 0 && html`<p class=summary>${shown.summary.join(" · ")}</p>`}
    ${drawings.map((d) => html`<${Picture} key=${d.field} markup=${d.html}
      pick=${lead && ((place) => lead(d.field, place, d.axes))} />`)}
    <div class=folds>
      <details><summary>Numbers</summary>${drawings.map((d) => html`<h3>${d.title}</h3><${Picture} markup=${d.numbers} />`)}</details>
      <${Picture} markup=${shown.how} />
      ${stored && html`<${Repeat} shown=${shown} />`}
    </div></div>`;
}

/** Copy as Python, as a command or as JSON; the file; a page. */
function Repeat({ shown }) {
  const ask = { model: model.value?.name, result: shown.id };
  const json = async () => JSON.stringify(await post("data", ask), null, 1);
  const page = async () => {
    const { html: text } = await post("report", ask);
    save(`${shown.id}.html`, new Blob([text], { type: "text/html" }));
  };
  return html`<p class=repeat>
    <${Copy} text=${shown.python} name=Python /><${Copy} text=${shown.command} name=Command /><${Copy} text=${json} name=JSON />
    <a href=${`api/v1/results/${shown.id}/file`} download>File</a>
    <button type=button onClick=${page}>Page</button></p>`;
}

/** A button that copies a text, or what a function returns. */
export function Copy({ text, name }) {
  const [said, say] = useState(""), timer = useRef();
  const copy = async () => {
    const value = typeof text === "function" ? await text() : text;
    try { await navigator.clipboard.writeText(value); say("copied"); } catch { save(`${name}.txt`, new Blob([value])); say("saved"); }
    clearTimeout(timer.current);
    timer.current = setTimeout(() => say(""), 1600);
  };
  const none = typeof text === "string" && (!text || text.startsWith("no "));
  return html`<button type=button onClick=${copy} disabled=${none} data-tip=${none ? text : `copy as ${name}`}>${said || name}</button>`;
}

export function save(name, blob) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
