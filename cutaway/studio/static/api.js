/** Questions to the server; a refusal is an `Error` with `what`, `why` and `instead`. */
import { about, connected, jobs } from "./state.js";

const ROOT = "api/v1/";

export class Refused extends Error {
  constructor({ what, why, instead }, status) {
    super(why);
    Object.assign(this, { what, why, instead, status });
  }
}

async function request(path, options = {}) {
  let answer;
  try {
    answer = await fetch(ROOT + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connected.value = false;
    throw new Refused({ what: "the studio", why: "it does not answer", instead: "start it again: cutaway studio" }, 0);
  }
  connected.value = true;
  const said = await answer.json();
  if (!answer.ok) throw new Refused(said, answer.status);
  return said;
}

export const get = (path) => request(path);
export const remove = (path) => request(path, { method: "DELETE" });
export const post = (path, body = {}, signal = undefined) => request(path, {
  method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal,
});

export async function refresh() { about.value = await get("about"); }

/** Listen to the states of models and jobs. */
export function listen() {
  const source = new EventSource(ROOT + "events");
  let known = "";
  source.onmessage = async (event) => {
    connected.value = true;
    const said = JSON.parse(event.data);
    jobs.value = said.jobs;
    const now = JSON.stringify(said.models);
    if (now !== known) { known = now; await refresh(); }
  };
  source.onerror = () => { connected.value = false; };
}
