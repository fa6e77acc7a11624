"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  /* titles become tooltips that also answer to focus and touch */
  const tip = document.getElementById("tip");
  all(".cw-fig [title]").forEach((e) => { e.dataset.tip = e.title; e.setAttribute("aria-label", e.title.replaceAll("\n", ", ")); e.removeAttribute("title"); });
  all(".cw-point").forEach((g) => { const t = g.querySelector("title"); g.dataset.tip = t.textContent; g.setAttribute("aria-label", t.textContent.replaceAll("\n", ", ")); t.remove(); });
  let current = null;
  const hide = () => { tip.hidden = true; current = null; };
  const show = (target) => {
    const e = target.closest && target.closest("[data-tip]");
    if (!e) return hide();
    current = e;
    tip.textContent = e.dataset.tip;
    tip.hidden = false;
    const a = (e.querySelector(".cw-mark, svg") || e).getBoundingClientRect(), b = tip.getBoundingClientRect();
    const x = Math.min(Math.max(8, a.left + a.width / 2 - b.width / 2), document.documentElement.clientWidth - b.width - 8);
    tip.style.left = x + "px";
    const below = Math.max(4, Math.min(a.bottom + 8, innerHeight - b.height - 4));
    tip.style.top = (a.top - b.height - 8 > 4 ? a.top - b.height - 8 : below) + "px";
  };
  document.addEventListener("pointerover", (event) => show(event.target));
  document.addEventListener("click", (event) => show(event.target));
  document.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) show(event.target); });
  document.addEventListener("focusout", hide);
  /* a cell reached by keys may scroll into sight: its tip follows it */
  document.addEventListener("scroll", () => { if (current && current === document.activeElement) show(current); else hide(); }, { capture: true, passive: true });

  all("[data-end]").forEach((e) => { e.scrollLeft = e.scrollWidth; });

  /* one tab stop a picture; arrow keys walk inside */
  all(".cw-grid, .cw-rows, .cw-tokens, .cw-plot").forEach((group) => {
    const items = all("[data-tip]", group);
    if (!items.length) return;
    const width = group.matches(".cw-grid") ? group.querySelectorAll("tbody tr:first-child td").length : 1;
    if (width > 1) group.setAttribute("role", "grid");
    items.forEach((item, n) => item.setAttribute("tabindex", n ? "-1" : "0"));
    group.addEventListener("keydown", (event) => {
      const at = items.indexOf(document.activeElement);
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, Home: -at, End: items.length - 1 - at }[event.key];
      if (event.key === "Escape") hide();
      if (at < 0 || by === undefined) return;
      event.preventDefault();
      const next = items[at + by];
      if (!next) return;
      items[at].setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  /* copy buttons, also where the clipboard interface is closed */
  all("[data-copy]").forEach((b) => {
    b.hidden = false;
    b.addEventListener("click", async () => {
      const code = b.parentElement.querySelector("code");
      let done = true;
      try { await navigator.clipboard.writeText(code.textContent); } catch (e) {
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      b.textContent = done ? "Copied" : "Selected";
      setTimeout(() => { b.textContent = "Copy"; }, 1600);
    });
  });
})();
