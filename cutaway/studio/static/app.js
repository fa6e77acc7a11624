/** The page: its head, the prompt that all screens share, and the screen that the address names. */
import { html, render, useEffect, useState } from "./vendor/preact.js";
import { effect } from "./vendor/signals.js";
import { listen, post, refresh } from "./api.js";
import { Drawer, Toggle } from "./drawer.js";
import "./marks.js";
import { about, address, choose, chosen, connected, jobs, model, screen, useSignal, written } from "./state.js";
import { SCREENS } from "./screens/index.js";

function App() {
  const now = useSignal(screen), shown = SCREENS.find((s) => s.name === now) ?? SCREENS[0];
  useSignal(address);
  useEffect(() => { document.title = `${shown.title} · cutaway studio`; }, [shown]);
  return html`<a class=skip href="#main">Skip to the answers</a>
    <${Head} shown=${shown} />
    <main id=main tabindex=-1>
      ${shown.prompt && html`<${PromptBar} shown=${shown} />`}
      <${shown.view} key=${shown.name} />
    </main>
    <${Drawer} />
    <footer><p>Every number stands beside its control and its interval where one was computed. This page asks nothing of any
      other machine.</p></footer>`;
}

function Head({ shown }) {
  const running = useSignal(jobs).filter((j) => ["waiting", "running"].includes(j.state)).length;
  const values = useSignal(address).values;
  useEffect(() => document.querySelector(".top [aria-current]")?.scrollIntoView({ inline: "nearest", block: "nearest" }), [shown]);
  return html`<header class=top>
    <a class=brand href="#/why"><img src="icon.svg" width=22 height=22 alt="" />cutaway</a>
    <nav aria-label=Screens><ul>${SCREENS.map((s) => html`<li key=${s.name}>
      <a href=${written({ screen: s.name, values })} aria-current=${s === shown ? "page" : undefined}
        onClick=${(event) => { event.preventDefault(); choose({}, s.name); }}>${s.title}${s.name === "runs" && running > 0
    ? html` <span class=count>${running}</span>` : ""}</a></li>`)}</ul></nav>
    <${Toggle} /><${Models} /><${Theme} /></header>`;
}

function Models() {
  const { models } = useSignal(about), now = useSignal(model), alive = useSignal(connected);
  const state = alive ? now?.state ?? "loading" : "gone";
  return html`<label class=models><span class=${`dot ${state}`} data-tip=${STATES[state]}></span>
    <select aria-label=Model value=${now?.name} onChange=${(event) => choose({ model: event.target.value })}>
      ${models.map((m) => html`<option key=${m.name} value=${m.name}>${m.name}</option>`)}</select></label>`;
}

const STATES = { ready: "the model is ready", loading: "the model is being loaded", absent: "the model is loaded when it is asked",
  failed: "the model could not be loaded", gone: "the studio does not answer" };

function Theme() {
  const modes = ["auto", "light", "dark"], [mode, set] = useState(() => localStorage.getItem("cutaway-theme") ?? "auto");
  useEffect(() => {
    if (mode === "auto") delete document.body.dataset.theme; else document.body.dataset.theme = mode;
    localStorage.setItem("cutaway-theme", mode);
  }, [mode]);
  return html`<button type=button class=theme data-tip=${`theme: ${mode}`} aria-label=${`theme: ${mode}`}
    onClick=${() => set(modes[(modes.indexOf(mode) + 1) % 3])}>◐</button>`;
}

/** Prompt A, and where the screen asks for them prompt B, target and foil; asked on Enter. */
function PromptBar({ shown }) {
  const names = shown.prompt, tasks = useSignal(model)?.tasks ?? [];
  useSignal(address);
  const [draft, set] = useState({});
  useEffect(() => set({}), [address.value]);
  const value = (n) => draft[n] ?? chosen(n);
  const ask = (event) => { event?.preventDefault(); choose(draft); };
  const take = (event) => {
    const t = tasks.find((x) => x.name === event.target.value);
    if (t) choose({ prompt: t.example, other: names.includes("other") ? t.corrupt : "", target: t.target, foil: t.foil, task: "" });
    event.target.value = "";
  };
  return html`<form class=prompts onSubmit=${ask}>
    ${names.map((n) => html`<label key=${n} class=${n}><span>${LABELS[n]}</span>
      <input type=text value=${value(n)} placeholder=${HINTS[n]} spellcheck=${false} autocomplete=off maxlength=20000
        onInput=${(e) => set({ ...draft, [n]: e.target.value })} /></label>`)}
    <div class=asking><button class=main>Ask</button>
      <select aria-label="An example" onChange=${take}><option value="">An example …</option>
        ${tasks.map((t) => html`<option key=${t.name} value=${t.name}>${t.name.replaceAll("_", " ")}</option>`)}</select></div>
  </form>`;
}

const LABELS = { prompt: "Prompt", other: "Prompt B", target: "Target", foil: "Foil" };
const HINTS = { prompt: "a text that the model goes on with", other: "the same with a word changed", target: "the answer",
  foil: "rather than this" };

/** A model that the address names is loaded. */
effect(() => {
  const now = model.value;
  if (now?.state === "absent") post(`models/${encodeURIComponent(now.name)}`).then(refresh).catch(() => undefined);
});

/** Without a prompt, the first example is shown. */
effect(() => {
  const first = model.value?.tasks?.[0];
  if (first && !chosen("prompt")) choose({ prompt: first.example, target: first.target, foil: first.foil });
});

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
refresh().catch(() => undefined);
listen();
