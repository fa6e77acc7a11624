/** Attention on the prompt: a strip of tokens that shows where one looks and who looks at it, and every head of the layer. */
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { Busy, Refusal, useAnswer } from "./panel.js";
import { address, choose, chosen, model, useSignal } from "./state.js";

const TILE = 128; // queries at once

export function Looks({ layer, head }) {
  useSignal(address);
  const card = useSignal(model), prompt = chosen("prompt"), start = Number(chosen("tile")) || 0;
  const layers = card?.sizes?.layer ?? 0;
  const { answer, refusal, busy } = useAnswer("attention",
    prompt && { model: card?.name, prompt, layer: Number(layer), top: 8, start, count: TILE });
  const shown = answer?.heads.find((h) => String(h.head) === head) ?? answer?.heads[0];
  const to = answer ? answer.start + (answer.heads[0]?.keys.length ?? 0) : 0;
  return html`<section class="panel looks" aria-busy=${busy}>
    <h2>Where does ${head ? `head ${layer}.${head}` : `layer ${layer}`} look?</h2>
    <p class=about><span class=badge data-tip="Rung: observational.\nAttention says where a head looks, not what it causes: ablate it in the drawer.">reads only</span>
      <span>the 8 largest weights of each token; point at a token, or walk with the arrow keys</span></p>
    <div class=choices><label>Layer <select value=${layer} onChange=${(e) => choose({ layer: e.target.value, position: "" })}>
        ${Array.from({ length: layers }, (_, i) => html`<option key=${i} value=${i}>${i}</option>`)}</select></label>
      ${answer && answer.tokens.length > TILE && html`<span class=tiles>
        <button type=button disabled=${answer.start === 0} onClick=${() => choose({ tile: Math.max(0, answer.start - TILE) || "" })}>←</button>
        <span>tokens ${answer.start} to ${to - 1} of ${answer.tokens.length}</span>
        <button type=button disabled=${to >= answer.tokens.length} onClick=${() => choose({ tile: to })}>→</button></span>`}</div>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${!answer && busy && html`<${Busy} />`}
    ${!prompt && html`<p class=empty>Give a prompt above.</p>`}
    ${answer && shown && html`<${Strip} key=${`${answer.start} ${answer.tokens.length}`} answer=${answer} looks=${shown} />
      <ul class=tilesof aria-label=${`Heads of layer ${layer}`}>${answer.heads.map((h) => html`<${Tile} key=${h.head} looks=${h} start=${answer.start}
        length=${to} layer=${layer} chosen=${h === shown} />`)}</ul>`}
  </section>`;
}

/** Weights from a token, and to it, by position. */
function around(looks, start, at) {
  const row = at - start, out = new Map(), back = new Map();
  (looks.keys[row] ?? []).forEach((k, i) => out.set(k, looks.weights[row][i]));
  looks.keys.forEach((keys, q) => keys.forEach((k, i) => { if (k === at) back.set(q + start, looks.weights[q][i]); }));
  return { out, back };
}

function Strip({ answer, looks }) {
  const { tokens, start } = answer, last = start + looks.keys.length - 1, place = useRef();
  const asked = Number.parseInt(chosen("position"), 10);
  const [at, point] = useState(asked >= start && asked <= last ? asked : last);
  const { out, back } = around(looks, start, at);
  const walk = (event) => {
    const next = at + ({ ArrowRight: 1, ArrowLeft: -1, Home: start - at, End: last - at }[event.key] ?? NaN);
    if (event.key === "Enter") choose({ position: String(at) });
    if (!(next >= start && next <= last)) return;
    event.preventDefault();
    point(next);
    place.current.children[next].focus();
  };
  return html`<div class=lookstrip>
    <p class=strip ref=${place} onKeyDown=${walk}>${tokens.map((t, i) => {
    const a = out.get(i) ?? 0, b = back.get(i) ?? 0;
    return html`<span key=${i} class=${`token ${i === at ? "is-here" : ""}`} role=button tabindex=${i === at ? "0" : "-1"}
      style=${`--out:${Math.round(100 * a)}%;--back:${Math.round(100 * b)}%`}
      data-tip=${`${t.text.trim() || "space"}, token ${i}${i === at ? "" : `\nlooked at: ${a.toFixed(3)}\nlooks here: ${b.toFixed(3)}`}`}
      onMouseEnter=${() => i >= start && i <= last && point(i)} onFocus=${() => i >= start && i <= last && point(i)}
      onClick=${() => choose({ position: String(i) })}>${t.text}</span>`;
  })}</p>
    <div class=lists><${Weights} title=${html`<b class=here>${tokens[at].text.trim()}</b> looks at`} weights=${out} tokens=${tokens} even=${1 / (at + 1)} side=out />
      <${Weights} title=${html`look at <b class=here>${tokens[at].text.trim()}</b>`} weights=${back} tokens=${tokens} side=back /></div></div>`;
}

function Weights({ title, weights, tokens, even, side }) {
  const rows = [...weights].sort((a, b) => b[1] - a[1]).slice(0, 6), rest = 1 - rows.reduce((sum, [, w]) => sum + w, 0);
  return html`<div class=${`weights ${side}`}><h3>${title}</h3>
    ${rows.length === 0 && html`<p class=note>none among its largest weights</p>`}
    <ol>${rows.map(([k, w]) => html`<li key=${k}><span class=word>${tokens[k].text.trim()}</span><small>${k}</small>
      <span class=bar><i style=${`width:${100 * w}%`}></i></span><span class=amount>${w.toFixed(3)}</span></li>`)}</ol>
    ${even != null && html`<p class=note>${rest > 0.0005 ? `all others ${rest.toFixed(3)}; ` : ""}each would have ${even.toFixed(3)} if it looked at all alike</p>`}</div>`;
}

/** The theme in use, which pictures that are painted once must follow. */
function useDark() {
  const query = matchMedia("(prefers-color-scheme: dark)"), [now, set] = useState("");
  useEffect(() => {
    const look = () => set(`${document.body.dataset.theme ?? ""} ${query.matches}`), watch = new MutationObserver(look);
    look();
    query.addEventListener("change", look);
    watch.observe(document.body, { attributeFilter: ["data-theme"] });
    return () => { query.removeEventListener("change", look); watch.disconnect(); };
  }, []);
  return now;
}

/** All weights of a head as a picture, queries down, keys across. */
function Tile({ looks, start, length, layer, chosen: on }) {
  const canvas = useRef(), dark = useDark();
  useEffect(() => {
    const size = Math.min(512, Math.max(96, length * 8)), high = looks.keys.length, c = canvas.current;
    c.width = size;
    c.height = size;
    const pen = c.getContext("2d"), w = size / length, h = size / high;
    pen.fillStyle = getComputedStyle(c).color;
    looks.keys.forEach((keys, q) => keys.forEach((k, i) => {
      pen.globalAlpha = Math.min(1, looks.weights[q][i]);
      pen.fillRect(k * w, q * h, Math.max(1, w - 0.5), Math.max(1, h - 0.5));
    }));
  }, [looks, start, length, dark]);
  return html`<li><button type=button aria-pressed=${on ? "true" : "false"} onClick=${() => choose({ layer, head: String(looks.head) })}>
    <canvas ref=${canvas} aria-hidden=true></canvas><span>head ${layer}.${looks.head}</span></button></li>`;
}
