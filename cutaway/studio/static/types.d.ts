// Written by tools/openapi.py from openapi.json; not to be edited.

/** The studio: its version, models, files and screens. */
export interface About {
  version: string;
  models: ModelCard[];
  files: FileCard[];
  methods: MethodCard[];
}

/** A latent that is active on a token, also as a share of its largest activation in the store. */
export interface Active {
  latent: number;
  value: number;
  share: number;
  density: number;
  label: string;
}

/** The attention of a prompt from the query `start` on.  Of two prompts `difference` is the first minus the second, entry by entry; `apart` says why there is none. */
export interface Attended {
  tokens: Token[];
  heads: HeadLooks[];
  start: number;
  other?: Looked | null;
  difference?: HeadLooks[];
  apart?: string;
}

/** The attention of a layer on a prompt: of one head or of all, for `count` queries from `start` on.  `other` is a second prompt, whose attention is answered too. */
export interface Attention {
  model?: string;
  prompt: string;
  other?: string;
  layer: number;
  head?: number | null;
  top?: number;
  start?: number;
  count?: number;
}

/** A latent on two tokens, and the difference of its activations, also as a share of its largest in the store. */
export interface Changed {
  latent: number;
  value: number;
  other: number;
  change: number;
  share: number;
  density: number;
  label: string;
}

/** A token of each of two texts, the named latent's difference, and the latents that differ most. */
export interface ChangedRead {
  text: string;
  other: string;
  special: boolean;
  value: number | null;
  top: Changed[];
}

/** A next token before and after. */
export interface ChangedToken {
  id: number;
  text: string;
  probability: number[];
  logit: number[];
  change: Effect;
  logit_change: Effect;
}

/** Scores of edges that can be opened: of which method, on which task. */
export interface CircuitCard {
  id: string;
  method: string;
  task: string;
}

/** An edge of a circuit: its ends as they are drawn, its score with interval, control and exact score.  `known` says if it is an edge of the truth: found (both have it), missed (only the truth), beyond (only the circuit); empty where no truth is known. */
export interface CircuitEdge {
  name: string;
  source: number;
  target: number;
  weight: number;
  interval: unknown[] | null;
  control: unknown[] | null;
  exact: number | null;
  known: "" | "found" | "missed" | "beyond";
}

/** The first edges of a ranking by |score|, beside a truth where it is known: as many as that has if not said. */
export interface CircuitOf {
  model?: string;
  circuit: string;
  edges?: number | null;
  truth?: "identifiable" | "structural";
}

/** A circuit as the page draws it.  `truths` has the edges of each known truth, and `call` the values of a form that evaluates the ranking. */
export interface CircuitPage {
  circuit: string;
  method: string;
  task: string;
  unit: string;
  depths: string[];
  columns: string[];
  starts: number[];
  nodes: GraphNode[];
  edges: CircuitEdge[];
  inside: number;
  all_edges: number;
  truths: Record<string, string[]>;
  call: Record<string, unknown>;
  how: string;
  python: string;
  command: string;
}

/** The scores of edges of a model. */
export interface Circuits {
  circuits: CircuitCard[];
}

/** A sentence about a result. */
export interface Claim {
  model?: string;
  result: string;
  sentence: string;
}

/** The cost of a call before it is made. */
export interface Cost {
  lines: string[];
  forwards: number | null;
  backwards: number | null;
  seconds: number | null;
  memory: number | null;
}

/** A result as data: its fields with axes and values, labels, units, and its record. */
export interface Data {
  kind: string;
  fields: Record<string, unknown>;
  labels: Record<string, unknown>;
  units: Record<string, unknown>;
  facts: Record<string, unknown>;
  reasons: Record<string, unknown>;
  record: Record<string, unknown>;
}

/** A latent's decoder row as a direction: its id, the sites, and the length of one step. */
export interface DirectionOf {
  id: string;
  sites: string[];
  step: number;
}

/** The picture of a field, as a fragment of HTML that holds no script and whose labels are escaped. */
export interface Drawing {
  field: string;
  title: string;
  axes: string[];
  unit: string;
  html: string;
  numbers: string;
}

/** A change inside the model, at all positions or at some of them.  `number` is the factor of `scale` and the strength of `steer` and `latent`; `file` has the direction or dictionary. */
export interface EditEntry {
  kind: "zero" | "mean" | "resample" | "patch" | "scale" | "steer" | "latent";
  address: string;
  positions?: number[];
  number?: number;
  file?: string;
  latent?: number;
}

/** A change beside the band that the same changes elsewhere leave; it is marked outside of it. */
export interface Effect {
  value: number;
  low: number;
  high: number;
  marked: boolean;
}

/** An entry of a method's form. */
export interface Entry {
  name: string;
  type: "string" | "integer" | "number" | "boolean";
  default?: unknown;
  required: boolean;
  nullable: boolean;
  choices: string[];
  several: boolean;
  help: string;
  subject: string;
  instead: string[];
}

/** The page of a latent: its row, labels, examples and card. */
export interface FeaturePage {
  row: LatentRow;
  store: string;
  dictionary: string;
  labels: LabelCard[];
  strips: Strip[];
  shown: Shown;
}

/** A file that a form may name as `file:ID`. */
export interface FileCard {
  id: string;
  name: string;
}

/** A graph file of circuit-tracer or Neuronpedia. */
export interface ForeignGraph {
  model?: string;
  name?: string;
  data: Record<string, unknown>;
}

/** A graph that can be opened. */
export interface GraphCard {
  id: string;
  name: string;
  prompt: string;
}

/** Influences in a graph minus those in another, the largest first; `pooled` if positions were added up.  `first_only` and `second_only` are the shares of each graph's influence of nodes that the other does not have. */
export interface GraphChange {
  rows: NodeChange[];
  nodes: number;
  common: number;
  first_only: number;
  second_only: number;
  pooled: string;
}

/** An edge between two nodes of the picture, by their places in the list. */
export interface GraphEdge {
  source: number;
  target: number;
  weight: number;
}

/** A graph file of the schema of circuit-tracer and Neuronpedia. */
export interface GraphFile {
  data: Record<string, unknown>;
  format?: string;
}

/** An edge to or from a node: the other end with its words, its weight, and its share of what its target reads. */
export interface GraphLink {
  node: string;
  title: string;
  weight: number;
  share: number;
}

/** A node of the picture: its place, its words, and its numbers. */
export interface GraphNode {
  name: string;
  kind: string;
  title: string;
  depth: number;
  column: number;
  slot: number;
  group: string;
  weak: boolean;
  influence: number | null;
  cumulative: number;
  activation: number;
  share: number;
}

/** A graph, how it is pruned, and which of its units a reader takes for one thing. */
export interface GraphOf {
  model?: string;
  graph: string;
  preset?: string;
  nodes?: number | null;
  edges?: number | null;
  pinned?: string[];
  supernodes?: Record<string, string[]>;
}

/** A pruned graph as the page draws it; `hidden` is the number of its smallest edges that are left out. */
export interface GraphPage {
  graph: string;
  prompt: string;
  targets: string[];
  depths: string[];
  columns: string[];
  starts: number[];
  nodes: GraphNode[];
  edges: GraphEdge[];
  hidden: number;
  whole: Scores | null;
  drawn: Scores | null;
  all_nodes: number | null;
  all_edges: number | null;
  preset: string;
  node_share: number | null;
  edge_share: number | null;
  call: Record<string, unknown> | null;
  how: string;
  python: string;
  command: string;
}

/** The graphs of the studio, the units that can be traced, and the conventions of pruning. */
export interface Graphs {
  graphs: GraphCard[];
  transcoders: string[];
  presets: Record<string, unknown[]>;
}

/** Groups of a graph's units that are kept in a file. */
export interface GroupsOf {
  model?: string;
  graph: string;
  supernodes: Record<string, string[]>;
}

/** A next token with its probability and its logit. */
export interface Guess {
  id: number;
  text: string;
  probability: number;
  logit: number;
}

/** The largest weights of each query of a head, the largest first, with the positions of their keys. */
export interface HeadLooks {
  head: number;
  keys: number[][];
  weights: number[][];
}

/** A latent that was found, why beside what chance would give, and its label. */
export interface Hit {
  dictionary: string;
  latent: number;
  why: string;
  label: string;
}

/** Latents that were found, the best first, and what was looked for. */
export interface Hits {
  by: string;
  hits: Hit[];
}

/** Changes of a prompt's run; `other` is the prompt that `patch` takes values of. */
export interface Intervene {
  model?: string;
  prompt: string;
  other?: string;
  target?: string;
  foil?: string;
  edits: EditEntry[];
  top?: number;
  words?: number;
  samples?: number;
  seed?: number;
}

/** Next tokens before and after changes; `values` is the call of `patching.intervene` that gives them. */
export interface Intervened {
  effect: Effect;
  unit: string;
  target: string;
  foil: string;
  divergence: Effect;
  tokens: ChangedToken[];
  text: string;
  edited_text: string;
  band: string;
  how: string;
  python: string;
  command: string;
  values: Record<string, unknown>;
}

/** A call that runs in the background. */
export interface Job {
  id: string;
  method: string;
  model: string;
  values: Record<string, unknown>;
  state: "waiting" | "running" | "done" | "refused" | "cancelled" | "lost";
  done: number;
  total: number;
  made: number;
  ended: number | null;
  result: string | null;
  refusal: Refusal | null;
}

/** A sentence judged by the rung of a result: the words that claim more than the numbers support. */
export interface Judged {
  allowed: boolean;
  beyond: string[];
  rung: string;
  instead: string;
}

/** The id of a file that was kept. */
export interface Kept {
  id: string;
}

/** A description of a latent with its scores. */
export interface LabelCard {
  source: string;
  text: string;
  scores: Record<string, unknown>;
}

/** A latent of a store. */
export interface LatentOf {
  model?: string;
  store: string;
  dictionary?: string;
  latent: number;
}

/** A page of the table, how many latents the filters leave, and the cursor of the next page. */
export interface LatentPage {
  rows: LatentRow[];
  total: number;
  next: string;
}

/** A latent in the table of a store.  Attributes:     latent: its number.     density: share of the tokens on which it is active.     interval: of the density, 95 % (Wilson).     largest: the largest |activation|.     mean: the mean activation where it is active; None of one that never is.     peak: the token on which most of its largest examples stand.     flags: flags of health.     label: its first label, if it has one.     source: what made the label.     scores: scores of the label by name; a score's interval is `NAME interval`. */
export interface LatentRow {
  latent: number;
  density: number;
  interval: unknown[];
  largest: number;
  mean: number | null;
  peak: string;
  flags: string[];
  label: string | null;
  source: string | null;
  scores: Record<string, unknown>;
}

/** A page of the table of latents. */
export interface LatentsOf {
  model?: string;
  store: string;
  dictionary?: string;
  sort?: "latent" | "density" | "largest" | "mean" | "F1" | "label";
  descending?: boolean;
  only?: "all" | "alive" | "dead" | "rare" | "dense" | "start" | "ruled" | "unruled";
  text?: string;
  after?: string;
  most?: number;
}

/** A result as text of at most 2 kB. */
export interface Lines {
  text: string;
}

/** The tokens of a prompt, and the attention of some of them. */
export interface Looked {
  tokens: Token[];
  heads: HeadLooks[];
}

/** A method: its question, its control, and its form. */
export interface MethodCard {
  name: string;
  room: string;
  answers: string;
  paper: string;
  control: string;
  rung: string;
  cost: string;
  results: string[];
  form: Entry[];
  json_schema: Record<string, unknown>;
}

/** A model: its sizes and what can be asked of it. */
export interface ModelCard {
  name: string;
  source: string;
  state: "absent" | "loading" | "ready" | "failed";
  family?: string;
  sizes?: Record<string, number>;
  tasks?: TaskCard[];
  sites?: string[];
  why?: string;
}

/** A node in two graphs: its words, and its influence in each; None in the one that does not have it. */
export interface NodeChange {
  node: string;
  title: string;
  first: number | null;
  second: number | null;
  change: number;
}

/** A node of a graph. */
export interface NodeOf {
  model?: string;
  graph: string;
  node: string;
}

/** A node with the largest edges into it and out of it, in the whole graph; `page` is its latent in a store. */
export interface NodePage {
  node: string;
  title: string;
  influence: number;
  null: number | null;
  activation: number;
  value: number | null;
  inputs: GraphLink[];
  outputs: GraphLink[];
  page: LatentOf | null;
}

/** A page of HTML that opens from disk. */
export interface Page {
  html: string;
}

/** The tokens of a prompt, and what the model expects next. */
export interface Predicted {
  tokens: Token[];
  next: Guess[];
}

/** A prompt. */
export interface Prompt {
  model?: string;
  prompt: string;
  top?: number;
}

/** A text to be read by the latents of a dictionary, one of them in particular if it is named.  `other` is a second text, which is read too. */
export interface ReadText {
  model?: string;
  store: string;
  dictionary?: string;
  text: string;
  other?: string;
  latent?: number | null;
  top?: number;
  dense?: number;
}

/** A token of a text: the share that the code misses, the named latent's activation, and its strongest latents. */
export interface ReadToken {
  text: string;
  special: boolean;
  error: number;
  active: number;
  value: number | null;
  top: Active[];
}

/** A text as latents read it, with the largest activation of the named one in the store.  Of two texts `difference` is the first minus the second, token by token; `apart` says why there is none. */
export interface ReadingOf {
  tokens: ReadToken[];
  largest: number | null;
  python: string;
  other?: ReadToken[];
  difference?: ChangedRead[];
  apart?: string;
}

/** A refusal: what, why, and what instead. */
export interface Refusal {
  what: string;
  why: string;
  instead: string;
}

/** The base of questions about a model; `model` is one of those that the studio was started with. */
export interface Request {
  model?: string;
}

/** A result by its id, and the fields to draw; all that have a value if none is named. */
export interface ResultOf {
  model?: string;
  result: string;
  fields?: string[];
}

/** The scores of a graph: the shares of influence that it explains. */
export interface Scores {
  replacement: number;
  completeness: number;
  error_share?: number | null;
  others_share?: number | null;
}

/** A search: words of labels, `token:…`, `phrase:…`, `fires-on:…`, `raises:…` or `like:…`. */
export interface Search {
  model?: string;
  store: string;
  dictionary?: string;
  query: string;
  most?: number;
}

/** A result as the page shows it: pictures, numbers, how it was computed, and how to repeat it. */
export interface Shown {
  id: string;
  kind: string;
  method: string;
  question: string;
  paper: string;
  control: string;
  rung: string;
  summary: string[];
  drawings: Drawing[];
  empty: string[];
  how: string;
  python: string;
  command: string;
  seconds?: number | null;
}

/** A store of features: its dictionaries with the number of latents of each, and the tokens that count. */
export interface StoreCard {
  id: string;
  name: string;
  model: string;
  dictionaries: Record<string, number>;
  opened: Record<string, string | null>;
  tokens: number;
  held_out: number;
  labels: number;
}

/** The stores of the studio, and the dictionaries that ship with the model, which can be harvested. */
export interface Stores {
  stores: StoreCard[];
  dictionaries: string[];
}

/** An example: its activation, the quantiles between which it lies, whether it is held out, and its tokens. */
export interface Strip {
  value: number;
  place: string;
  held_out: boolean;
  peak: number;
  tokens: StripToken[];
}

/** A token of a strip: its text, and the activation on it; None where it is masked. */
export interface StripToken {
  text: string;
  value: number | null;
}

/** A task by name. */
export interface TaskCard {
  name: string;
  metric: string;
  example: string;
  target: string;
  foil: string;
  corrupt: string;
}

/** A token: its id and its text. */
export interface Token {
  id: number;
  text: string;
}

/** A graph and another one. */
export interface TwoGraphs {
  model?: string;
  graph: string;
  other: string;
  most?: number;
}

/** Two results of one kind by their ids, and the fields to draw of their difference. */
export interface TwoResults {
  model?: string;
  first: string;
  second: string;
  fields?: string[];
}

/** A call of a method: the values of its form. */
export interface Values {
  model?: string;
  method: string;
  values?: Record<string, unknown>;
}
