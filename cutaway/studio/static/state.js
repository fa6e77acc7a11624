/** State of the page: the address is all of it, so that a link shows the same screen; and what the server tells. */
import { useEffect, useState } from "./vendor/preact.js";
import { computed, effect, signal } from "./vendor/signals.js";

const FEW = 64; // heads

/** What there is: models, files, methods (see `About` in openapi.json). */
export const about = signal({ version: "", models: [], files: [], methods: [] });
/** The newest jobs, newest first. */
export const jobs = signal([]);
/** Whether the server answers. */
export const connected = signal(true);
/** The address, parsed: the screen, and what is selected on it. */
export const address = signal(parse(location.hash));

export const screen = computed(() => address.value.screen);
export const model = computed(() => {
  const { models } = about.value;
  return models.find((m) => m.name === address.value.values.model) ?? models[0];
});
export const ready = computed(() => model.value?.state === "ready");
/** True of models with so many heads that an answer about all takes long: its first part is asked alone. */
export const large = computed(() => { const { layer = 0, head = 0 } = model.value?.sizes ?? {}; return layer * head > FEW; });
export const methods = computed(() => new Map(about.value.methods.map((m) => [m.name, m])));

/** The value of a selection; a text, or "" if there is none. */
export const chosen = (name) => address.value.values[name] ?? "";

/** Change selections; an empty value takes one away. `to` goes to another screen, with what is selected. */
export function choose(changes, to = address.value.screen) {
  const values = { ...address.value.values, ...changes };
  for (const [k, v] of Object.entries(values)) if (v === "" || v === null || v === undefined) delete values[k];
  const next = written({ screen: to, values });
  if (next === location.hash) return;
  if (to === address.value.screen) history.replaceState(null, "", next);
  else history.pushState(null, "", next);
  address.value = parse(next);
}

export function written({ screen: name, values }) {
  const query = new URLSearchParams(values).toString();
  return `#/${name}${query ? `?${query}` : ""}`;
}

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  return { screen: path || "why", values: Object.fromEntries(new URLSearchParams(query)) };
}

addEventListener("popstate", () => { address.value = parse(location.hash); });
addEventListener("hashchange", () => { address.value = parse(location.hash); });

/** The value of a signal inside a component, which is drawn again when it changes. */
export function useSignal(s) {
  const [, redraw] = useState(0);
  useEffect(() => effect(() => { void s.value; redraw((n) => n + 1); }), [s]);
  return s.value;
}
