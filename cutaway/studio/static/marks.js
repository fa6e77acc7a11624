/** Pictures of results on the page: put in place, tips on hover, focus and touch, arrow keys inside, and what was clicked. */
import { html, useLayoutEffect, useRef } from "./vendor/preact.js";

const tip = document.getElementById("tip");
const GROUPS = ".cw-grid, .cw-rows, .cw-tokens, .cw-plot";
let current = null;

/** A picture that the server drew. `pick` is called with the names of the row and the column that are clicked. */
export function Picture({ markup, pick }) {
  const place = useRef();
  useLayoutEffect(() => {
    const parsed = new DOMParser().parseFromString(markup, "text/html");
    place.current.replaceChildren(...parsed.body.childNodes);
    enliven(place.current, pick);
  }, [markup]);
  return html`<div class=picture ref=${place}></div>`;
}

function enliven(root, pick) {
  for (const e of root.querySelectorAll(".cw-fig [title]")) {
    e.dataset.tip = e.title;
    e.setAttribute("aria-label", e.title.replaceAll("\n", ", "));
    e.removeAttribute("title");
  }
  for (const g of root.querySelectorAll(".cw-point")) {
    const title = g.querySelector("title");
    g.dataset.tip = title.textContent;
    g.setAttribute("aria-label", title.textContent.replaceAll("\n", ", "));
    title.remove();
  }
  for (const e of root.querySelectorAll("[data-end]")) e.scrollLeft = e.scrollWidth;
  for (const group of root.querySelectorAll(GROUPS)) walkable(group, pick);
}

/** One tab stop a picture; arrow keys walk inside, Enter picks. */
function walkable(group, pick) {
  const items = [...group.querySelectorAll("[data-tip]")];
  if (!items.length) return;
  const width = group.matches(".cw-grid") ? group.querySelectorAll("tbody tr:first-child td").length : 1;
  if (width > 1) group.setAttribute("role", "grid");
  items.forEach((item, n) => item.setAttribute("tabindex", n ? "-1" : "0"));
  if (pick) {
    group.classList.add("pickable");
    group.addEventListener("click", (event) => {
      const item = event.target.closest("[data-tip]");
      if (item) pick(place(item));
    });
  }
  group.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    if (at >= 0 && event.key === "Enter" && pick) { event.preventDefault(); pick(place(items[at])); return; }
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, Home: -at, End: items.length - 1 - at };
    const next = items[at + steps[event.key]];
    if (at < 0 || !next) return;
    event.preventDefault();
    items[at].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}

/** The row and the column of a mark, by name and by number. */
function place(item) {
  const cell = item.closest("td"), row = item.closest("tr");
  if (!row) return { row: item.textContent.trim(), column: "", index: [...item.parentElement.children].indexOf(item) };
  const head = row.querySelector("th")?.textContent.trim() ?? "";
  const heads = [...row.closest("table").querySelectorAll("thead th")].slice(1);
  const index = cell ? [...row.querySelectorAll("td")].indexOf(cell) : 0;
  return { row: head, column: heads[index]?.textContent.trim() ?? "", index };
}

const hide = () => { tip.hidden = true; current = null; };
function show(target) {
  const e = target.closest?.("[data-tip]");
  if (!e) { hide(); return; }
  current = e;
  tip.textContent = e.dataset.tip;
  tip.hidden = false;
  const a = (e.querySelector(".cw-mark, svg") ?? e).getBoundingClientRect(), b = tip.getBoundingClientRect();
  const most = document.documentElement.clientWidth - b.width - 8;
  tip.style.left = `${Math.min(Math.max(8, a.left + a.width / 2 - b.width / 2), most)}px`;
  tip.style.top = `${a.top - b.height - 8 > 4 ? a.top - b.height - 8 : a.bottom + 8}px`;
}

document.addEventListener("pointerover", (event) => show(event.target));
document.addEventListener("click", (event) => show(event.target));
document.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) show(event.target); });
document.addEventListener("focusout", hide);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", () => { if (current && current === document.activeElement) show(current); else hide(); },
  { capture: true, passive: true });
