"use strict";
(() => {
  /* theme: auto, light, dark; remembered where the browser allows it */
  const button = document.getElementById("theme"), modes = ["auto", "light", "dark"];
  let mode = "auto";
  const wear = () => {
    if (mode === "auto") delete document.body.dataset.theme; else document.body.dataset.theme = mode;
    button.lastElementChild.textContent = "theme: " + mode;
  };
  try { mode = modes.includes(localStorage.getItem("cutaway-theme")) ? localStorage.getItem("cutaway-theme") : "auto"; } catch (e) { mode = "auto"; }
  button.hidden = false;
  button.addEventListener("click", () => {
    mode = modes[(modes.indexOf(mode) + 1) % 3];
    try { localStorage.setItem("cutaway-theme", mode); } catch (e) { /* private windows forget */ }
    wear();
  });
  wear();

  addEventListener("beforeprint", () => document.querySelectorAll("details.cw-how").forEach((d) => { d.open = true; }));
})();
