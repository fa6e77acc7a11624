/** A | A − B | B: the same of prompt A, of prompt B, or the first minus the second; the address says which. */
import { html } from "./vendor/preact.js";
import { address, choose, chosen, useSignal } from "./state.js";

export const DELTA = "A − B";
const SIDES = ["A", DELTA, "B"];

/** The side that is shown; A without a second prompt. */
export function useSide(second = true) {
  useSignal(address);
  const side = chosen("side");
  return second && SIDES.includes(side) ? side : "A";
}

/** The buttons of the sides. */
export function Sides() {
  const side = useSide();
  return html`<div class=sides role=group aria-label="Which prompt">${SIDES.map((s) => html`
    <button key=${s} type=button aria-pressed=${s === side ? "true" : "false"} onClick=${() => choose({ side: s === "A" ? "" : s })}>${s}</button>`)}</div>`;
}

/** The text of a token of A, beside that of B where they differ. */
export const beside = (a, b) => (a === b ? a : `${a.trimEnd()}|${b.trim()}`);
