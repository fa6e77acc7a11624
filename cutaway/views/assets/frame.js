"use strict";
/* inside the frame of a notebook: says how high it is, and wears the theme of the text around it */
(() => {
  const tell = () => parent.postMessage(Math.ceil(document.documentElement.getBoundingClientRect().height), "*");
  addEventListener("message", (event) => {
    if (event.source !== parent) return;
    const light = String(event.data).match(/[\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
    document.body.dataset.theme = light > 382 ? "dark" : "light";
    tell();
  });
  new ResizeObserver(tell).observe(document.documentElement);
})();
