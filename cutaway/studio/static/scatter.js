/** Measured against predicted: a point for each unit or group, with the range of its control behind it. */
import { html } from "./vendor/preact.js";
import { Refusal, useAnswer } from "./panel.js";
import { number } from "./strip.js";
import { choose } from "./state.js";

const WIDTH = 420, HEIGHT = 300, LEFT = 52, RIGHT = 14, TOP = 14, BOTTOM = 44;

export function Agreement({ name, result, axis }) {
  const { answer, refusal } = useAnswer("data", { model: name, result });
  if (refusal) return html`<${Refusal} refusal=${refusal} />`;
  if (!answer) return "";
  const { effect, predicted, effect_null: chance, agreement, agreement_interval: bounds } = answer.fields;
  const points = answer.labels[axis].map((label, i) => ({ label, y: effect.values[i], x: predicted.values[i], null: chance.values[i] }));
  return html`<section class=panel><h2>Measured against predicted</h2>
    <p class=note>What the target loses when it is removed (logits), against what the graph says. On the dashed line both are equal; grey is the range of ${axis === "node"
    ? "random vectors of the same length" : "as many random units"}.${agreement ? ` Rank correlation ${number(agreement.values)} [${bounds.values.map(number).join(", ")}].` : ""}</p>
    <${Scatter} points=${points} pick=${axis === "node" ? (node) => choose({ node }) : undefined} />
    <details><summary>Numbers</summary><div class=cw-scroll><table class=runs><thead><tr><th>${axis}</th><th>predicted</th><th>measured</th><th>control</th></tr></thead>
      <tbody>${points.map((p) => html`<tr key=${p.label}><td>${p.label}</td><td>${number(p.x)}</td><td>${number(p.y)}</td><td>${number(Math.min(...p.null))} to ${number(Math.max(...p.null))}</td></tr>`)}</tbody></table></div></details></section>`;
}

function Scatter({ points, pick }) {
  const values = points.flatMap((p) => [p.x, p.y, ...p.null]), low = Math.min(0, ...values), high = Math.max(0, ...values), room = 0.06 * (high - low || 1);
  const part = (v) => (v - low + room) / (high - low + 2 * room);
  const x = (v) => LEFT + part(v) * (WIDTH - LEFT - RIGHT), y = (v) => HEIGHT - BOTTOM - part(v) * (HEIGHT - TOP - BOTTOM);
  const step = 10 ** Math.floor(Math.log10(high - low || 1)), every = (high - low) / step > 5 ? 2 * step : (high - low) / step > 2 ? step : step / 2;
  const ticks = Array.from({ length: 24 }, (_, i) => (Math.ceil(low / every) + i) * every).filter((t) => t <= high);
  return html`<svg class=agree viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role=img aria-label="measured against predicted">
    ${ticks.map((t) => html`<g key=${t}><line class=grid x1=${LEFT} x2=${WIDTH - RIGHT} y1=${y(t)} y2=${y(t)} /><text x=${LEFT - 8} y=${y(t) + 4} text-anchor=end>${number(Number(t.toPrecision(3)))}</text>
      <text x=${x(t)} y=${HEIGHT - BOTTOM + 17} text-anchor=middle>${number(Number(t.toPrecision(3)))}</text></g>`)}
    <line class=equal x1=${x(low)} y1=${y(low)} x2=${x(high)} y2=${y(high)} /><line class=zero x1=${x(0)} x2=${x(0)} y1=${TOP} y2=${HEIGHT - BOTTOM} /><line class=zero x1=${LEFT} x2=${WIDTH - RIGHT} y1=${y(0)} y2=${y(0)} />
    ${points.map((p) => html`<line class=chance key=${`${p.label} null`} x1=${x(p.x)} x2=${x(p.x)} y1=${y(Math.min(...p.null))} y2=${y(Math.max(...p.null))} />`)}
    ${points.map((p) => html`<circle key=${p.label} cx=${x(p.x)} cy=${y(p.y)} r=5 class=${pick ? "point may" : "point"} onClick=${pick && (() => pick(p.label))}
      data-tip=${`${p.label}\npredicted ${number(p.x)}, measured ${number(p.y)}\ncontrol ${number(Math.min(...p.null))} to ${number(Math.max(...p.null))}`} />`)}
    <text x=${(LEFT + WIDTH - RIGHT) / 2} y=${HEIGHT - 6} text-anchor=middle>predicted by the graph (logits)</text>
    <text transform=${`translate(13 ${(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)`} text-anchor=middle>measured (logits)</text></svg>`;
}
