/** The screens, one row each: `prompt` names what they ask in the bar that they share. */
import { Ask } from "./ask.js";
import { Features } from "./features.js";
import { Graph } from "./graph.js";
import { Heads } from "./heads.js";
import { Patch } from "./patch.js";
import { Runs } from "./runs.js";
import { Why } from "./why.js";

export const SCREENS = [
  { name: "why", title: "Why this token?", prompt: ["prompt", "other", "target", "foil"], view: Why },
  { name: "patch", title: "Patch map", prompt: ["prompt", "other", "target", "foil"], view: Patch },
  { name: "features", title: "Features", prompt: ["prompt", "other", "target", "foil"], view: Features },
  { name: "graph", title: "Graph", prompt: ["prompt", "other", "target", "foil"], view: Graph },
  { name: "heads", title: "Heads", prompt: ["prompt", "other"], view: Heads },
  { name: "ask", title: "Methods", view: Ask },
  { name: "runs", title: "Runs", view: Runs },
];
