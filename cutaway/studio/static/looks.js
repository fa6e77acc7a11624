/** Attention on the prompt: a strip of tokens that shows where one looks and who looks at it, and every head of the layer. */
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { Busy, Refusal, useAnswer } from "./panel.js";
import { beside, DELTA, Sides, useSide } from "./sides.js";
import { address, choose, chosen, model, useSignal } from "./state.js";
import { shade } from "./strip.js";

const TILE = 128; // queries at once

/** What is shown of a side: its tokens, and its heads. */
function sideOf(answer, side) {
  if (side === "B") return answer.other;
  if (side !== DELTA) return answer;
  const { tokens } = answer.other;
  return { tokens: answer.tokens.map((t, i) => ({ ...t, text: beside(t.text, tokens[i]?.text ?? t.text) })), heads: answer.difference };
}

export function Looks({ layer, head }) {
  useSignal(address);
  const card = useSignal(model), prompt = chosen("prompt"), other = chosen("other"), start = Number(chosen("tile")) || 0;
  const layers = card?.sizes?.layer ?? 0, side = useSide(other);
  const { answer, refusal, busy } = useAnswer("attention",
    prompt && { model: card?.name, prompt, other, layer: Number(layer), top: 8, start, count: TILE });
  const view = answer && (side === "A" || answer.other) && sideOf(answer, side), delta = side === DELTA;
  const shown = view && (view.heads.find((h) => String(h.head) === head) ?? view.heads[0]);
  const most = answer ? Math.max(answer.tokens.length, answer.other?.tokens.length ?? 0) : 0, to = start + (shown?.keys.length ?? 0);
  return html`<section class="panel looks" aria-busy=${busy}>
    <h2>Where does ${head ? `head ${layer}.${head}` : `layer ${layer}`} look${delta ? " more in A than in B" : ""}?</h2>
    <p class=about><span class=badge data-tip="Rung: observational.\nAttention says where a head looks, not what it causes: ablate it in the drawer.">reads only</span>
      <span>${delta ? html`the 8 largest differences of each token: <b class=more>more in A</b>, <b class=less>more in B</b>` : "the 8 largest weights of each token"};
        point at a token, or walk with the arrow keys</span></p>
    ${other && html`<${Sides} />`}
    <div class=choices><label>Layer <select value=${layer} onChange=${(e) => choose({ layer: e.target.value, position: "" })}>
        ${Array.from({ length: layers }, (_, i) => html`<option key=${i} value=${i}>${i}</option>`)}</select></label>
      ${most > TILE && html`<span class=tiles>
        <button type=button disabled=${start === 0} onClick=${() => choose({ tile: Math.max(0, start - TILE) || "" })}>←</button>
        <span>tokens ${start} to ${to - 1} of ${view ? view.tokens.length : most}</span>
        <button type=button disabled=${start + TILE >= most} onClick=${() => choose({ tile: start + TILE })}>→</button></span>`}</div>
    ${refusal && html`<${Refusal} refusal=${refusal} />`}
    ${!view && busy && html`<${Busy} />`}
    ${!prompt && html`<p class=empty>Give a prompt above.</p>`}
    ${view && delta && answer.apart && html`<p class=empty>${answer.apart}</p>`}
    ${view && !shown?.keys.length && !answer.apart && html`<p class=empty>This prompt ends before token ${start}.</p>`}
    ${shown?.keys.length > 0 && html`<${Strip} key=${`${side} ${start} ${view.tokens.length}`} tokens=${view.tokens} start=${start} looks=${shown} delta=${delta} />
      <ul class=tilesof aria-label=${`Heads of layer ${layer}`}>${view.heads.map((h) => html`<${Tile} key=${h.head} looks=${h} start=${start}
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

function Strip({ tokens, start, looks, delta }) {
  const last = start + looks.keys.length - 1, place = useRef();
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
      style=${delta ? shade(a) : `--out:${Math.round(100 * a)}%;--back:${Math.round(100 * b)}%`}
      data-tip=${`${t.text.trim() || "space"}, token ${i}${i === at ? "" : `\nlooked at: ${weight(a, delta)}\nlooks here: ${weight(b, delta)}`}`}
      onMouseEnter=${() => i >= start && i <= last && point(i)} onFocus=${() => i >= start && i <= last && point(i)}
      onClick=${() => choose({ position: String(i) })}>${t.text}</span>`;
  })}</p>
    <div class=lists><${Weights} title=${html`<b class=here>${tokens[at].text.trim()}</b> looks at`} weights=${out} tokens=${tokens} even=${delta ? null : 1 / (at + 1)} delta=${delta} side=out />
      <${Weights} title=${html`look at <b class=here>${tokens[at].text.trim()}</b>`} weights=${back} tokens=${tokens} delta=${delta} side=back /></div></div>`;
}

/** A weight, or with `delta` a difference of weights, whose sign is written out. */
const weight = (w, delta) => `${delta && w > 0 ? "+" : ""}${w.toFixed(3)}`.replace("-", "−");

function Weights({ title, weights, tokens, even, side, delta }) {
  const rows = [...weights].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 6), rest = 1 - rows.reduce((sum, [, w]) => sum + w, 0);
  return html`<div class=${`weights ${side}`}><h3>${title}</h3>
    ${rows.length === 0 && html`<p class=note>none among its largest ${delta ? "differences" : "weights"}</p>`}
    <ol>${rows.map(([k, w]) => html`<li key=${k}><span class=word>${tokens[k].text.trim()}</span><small>${k}</small>
      <span class=bar><i class=${delta ? (w < 0 ? "less" : "more") : ""} style=${`width:${100 * Math.abs(w)}%`}></i></span><span class=amount>${weight(w, delta)}</span></li>`)}</ol>
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
    const style = getComputedStyle(c), colors = [style.color, style.getPropertyValue("--neg")];
    looks.keys.forEach((keys, q) => keys.forEach((k, i) => {
      pen.fillStyle = colors[Number(looks.weights[q][i] < 0)];
      pen.globalAlpha = Math.min(1, Math.abs(looks.weights[q][i]));
      pen.fillRect(k * w, q * h, Math.max(1, w - 0.5), Math.max(1, h - 0.5));
    }));
  }, [looks, start, length, dark]);
  return html`<li><button type=button aria-pressed=${on ? "true" : "false"} onClick=${() => choose({ layer, head: String(looks.head) })}>
    <canvas ref=${canvas} aria-hidden=true></canvas><span>head ${layer}.${looks.head}</span></button></li>`;
}
