/** The picture of an attribution graph: x is the token, y the layer; edges behind, marks in front, groups framed. */
import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact.js";
import { number, share } from "./strip.js";

const LEFT = 84, RIGHT = 14, TOP = 22, BOTTOM = 34, ROW = 60, SLOT = 17, COLUMN = 62, MANY = 2000;

/** Places of all nodes in pixels, from their slots; columns share the width that they need. */
function placed(page, width) {
  const counts = page.columns.map((_, c) => page.starts[c + 1] - page.starts[c]);
  const needed = counts.map((n) => Math.max(COLUMN, n * SLOT + 10)), total = needed.reduce((a, b) => a + b, 0);
  const scale = Math.max(1, (width - LEFT - RIGHT) / total), edges = [LEFT];
  for (const w of needed) edges.push(edges[edges.length - 1] + w * scale);
  const y = (depth) => TOP + (page.depths.length - 1 - depth) * ROW + ROW / 2;
  const at = page.nodes.map((n) => ({ y: y(n.depth),
    x: edges[n.column] + ((n.slot - page.starts[n.column] + 0.5) / counts[n.column]) * (edges[n.column + 1] - edges[n.column]) }));
  return { at, edges, y, width: edges[edges.length - 1] + RIGHT, height: TOP + page.depths.length * ROW + BOTTOM };
}

const curve = (a, b) => `M${a.x.toFixed(1)} ${a.y.toFixed(1)}C${a.x.toFixed(1)} ${((a.y + b.y) / 2).toFixed(1)} ${b.x.toFixed(1)} ${((a.y + b.y) / 2).toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;

/**
 * `tip` says what a node tells, and with `named` each shows its title. An edge may end a little beside its node
 * (`shift`, in pixels), so that several between two nodes are seen, and has the class `known`.
 */
export function GraphPlot({ page, selected, pinned = [], pick, tip = tipOf, named = false }) {
  const box = useRef(), [width, measure] = useState(700);
  useEffect(() => {
    const watch = new ResizeObserver(([e]) => measure(Math.floor(e.contentRect.width)));
    watch.observe(box.current);
    box.current.scrollLeft = box.current.scrollWidth;  // targets stand at the right
    return () => watch.disconnect();
  }, []);
  const p = placed(page, width), chosen = page.nodes.findIndex((n) => n.name === selected);
  const largest = Math.max(1e-12, ...page.edges.map((e) => Math.abs(e.weight)));
  const strength = (e) => Math.abs(e.weight) / largest, touches = (e) => e.source === chosen || e.target === chosen;
  const most = Math.max(1e-12, ...page.nodes.filter((n) => n.kind === "unit").map((n) => n.influence ?? 0));
  const fits = (text, c) => { const n = Math.floor((p.edges[c + 1] - p.edges[c]) / 8); return text.length > n ? `${text.slice(0, Math.max(1, n - 1))}…` : text; };
  const drawn = page.edges.length <= MANY ? page.edges : page.edges.filter(touches);
  return html`<div class=plot ref=${box}><div class=plotted style=${`width:${p.width}px;height:${p.height}px`}>
    ${page.edges.length > MANY && html`<${Edges} page=${page} place=${p} strength=${strength} dim=${chosen >= 0} />`}
    <svg width=${p.width} height=${p.height} role=img aria-label=${`Attribution graph of ${page.nodes.length} nodes: tokens from left to right, layers from bottom to top`}>
      ${page.depths.map((d, i) => html`<g key=${i}><line class=grid x1=${LEFT} x2=${p.width - RIGHT} y1=${p.y(i) + ROW / 2} y2=${p.y(i) + ROW / 2} /></g>`)}
      ${page.columns.map((w, c) => html`<g key=${c}>${c > 0 && html`<line class=grid x1=${p.edges[c]} x2=${p.edges[c]} y1=${TOP} y2=${p.height - BOTTOM} />`}
        <text class=word x=${(p.edges[c] + p.edges[c + 1]) / 2} y=${p.height - 12} data-tip=${w && `position ${c}\n${w}`}>${fits(w, c)}</text></g>`)}
      ${frames(page, p).map(({ name, x0, x1, y }) => html`<g key=${`${name} ${x0} ${y}`}><rect class=frame x=${x0 - 11} y=${y - 13} width=${x1 - x0 + 22} height=26 rx=9 />
        <text class=group x=${x0 - 9} y=${y - 17}>${name}</text></g>`)}
      <g class=edges>${drawn.map((e) => html`<path key=${`${e.source} ${e.target} ${e.shift}`} d=${curve(p.at[e.source], { ...p.at[e.target], x: p.at[e.target].x + (e.shift ?? 0) })}
        class=${`${e.weight < 0 ? "minus" : "plus"} ${e.known ?? ""}`} stroke-width=${(0.7 + 3.3 * strength(e)).toFixed(2)}
        stroke-opacity=${(chosen < 0 ? (named ? 0.35 : 0.12) + 0.55 * strength(e) : touches(e) ? 0.45 + 0.5 * strength(e) : 0.05).toFixed(3)} />`)}</g>
      ${page.nodes.map((n, i) => html`<g key=${n.name} class=${`mark ${n.kind} ${n.weak ? "weak" : ""} ${i === chosen ? "is-chosen" : ""} ${pinned.includes(n.name) ? "is-pinned" : ""}`}
        transform=${`translate(${p.at[i].x.toFixed(1)} ${p.at[i].y.toFixed(1)})`} data-tip=${tip(n)} onClick=${() => pick(n.name)}>
        <rect class=reach x=-8 y=-14 width=16 height=28 /><${Mark} node=${n} size=${3.4 + 4.2 * Math.sqrt((n.influence ?? 0) / most)} />
        ${n.kind === "target" && html`<text class=target y=-12>${n.title}</text>`}
        ${named && n.kind !== "target" && html`<text class=nodename x=10 y=4>${n.title}</text>`}</g>`)}
    </svg>
    <div class=rownames style=${`height:${p.height}px;width:${LEFT - 8}px`}>${page.depths.map((d, i) => html`<span key=${i} style=${`top:${p.y(i) - 10}px`}>${d}</span>`)}</div></div></div>`;
}

function Mark({ node, size }) {
  if (node.kind === "unit") return html`<circle class=shape r=${size.toFixed(1)} />`;
  if (node.kind === "token") return html`<rect class=shape x=-5 y=-5 width=10 height=10 rx=2 />`;
  if (node.kind === "target") return html`<circle class=shape r=7 />`;
  return html`<path class=shape d="M0 -6L6 0L0 6L-6 0Z" />`;
}

const tipOf = (n) => [`${n.name} ${n.title}`.trim(), n.kind === "target" ? `weight ${share(n.share)}` : `influence ${n.influence === null ? "not in the file" : share(n.influence)}`,
  n.kind === "unit" ? `activation ${number(n.activation)}` : "", n.weak ? "random targets are reached as far" : ""].filter(Boolean).join("\n");

/** Frames of groups: one in each cell. */
function frames(page, p) {
  const found = new Map();
  page.nodes.forEach((n, i) => {
    if (!n.group) return;
    const key = `${n.group} ${n.column} ${n.depth}`, { x, y } = p.at[i], old = found.get(key);
    found.set(key, { name: n.group, y, x0: Math.min(x, old?.x0 ?? x), x1: Math.max(x, old?.x1 ?? x) });
  });
  return [...found.values()];
}

/** Many edges: a canvas behind the marks. */
function Edges({ page, place, strength, dim }) {
  const canvas = useRef();
  useLayoutEffect(() => {
    const c = canvas.current, ratio = devicePixelRatio || 1, style = getComputedStyle(c);
    Object.assign(c, { width: place.width * ratio, height: place.height * ratio });
    const pen = c.getContext("2d");
    pen.scale(ratio, ratio);
    for (const e of page.edges) {
      const a = place.at[e.source], b = place.at[e.target], s = strength(e);
      pen.strokeStyle = style.getPropertyValue(e.weight < 0 ? "--neg" : "--pos");
      pen.globalAlpha = dim ? 0.04 : 0.06 + 0.5 * s;
      pen.lineWidth = 0.5 + 3 * s;
      pen.beginPath();
      pen.moveTo(a.x, a.y);
      pen.bezierCurveTo(a.x, (a.y + b.y) / 2, b.x, (a.y + b.y) / 2, b.x, b.y);
      pen.stroke();
    }
  });
  return html`<canvas ref=${canvas} style=${`width:${place.width}px;height:${place.height}px`}></canvas>`;
}
