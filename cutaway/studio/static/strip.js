/** Token strips: running text whose tokens are shaded by a number. */
import { html } from "./vendor/preact.js";

/** A number with three significant digits and a true minus. */
export const number = (v) => (v === 0 ? "0" : Math.abs(v) >= 1000 || Math.abs(v) < 0.001 ? v.toExponential(1).replace("e+", "e")
  : String(Number(v.toPrecision(3)))).replace("-", "−");

export const share = (p) => (p === 0 ? "0" : p < 0.0001 ? "< 0.01 %" : `${Number((100 * p).toPrecision(2))} %`);

/** A shade by a part of the largest value, of the colour of its sign. */
export const shade = (part) => `background:color-mix(in oklab, var(${part < 0 ? "--neg" : "--pos"}) ${Math.round(70 * Math.min(1, Math.abs(part)))}%, transparent)`;

/** Tokens, each `{ text, value, tip }`; `largest` is the value of the full shade, `peak` the place that is marked. */
export const Strip = ({ tokens, largest, peak = -1 }) => html`<span class=shaded>${tokens.map((t, i) => (t.text === "" ? "" : html`<span key=${i}
  class=${`token ${i === peak ? "is-peak" : ""}`} style=${t.value ? shade(t.value / largest) : ""}
  data-tip=${t.tip ?? `${t.text.trim() || "space"}\n${t.value === null ? "masked" : number(t.value)}`}>${t.text.replaceAll("\n", "⏎")}</span>`))}</span>`;
