// Written by tools/openapi.py from openapi.json; not to be edited.

/** The studio: its version, models, files and screens. */
export interface About {
  version: string;
  models: ModelCard[];
  files: FileCard[];
  methods: MethodCard[];
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

/** The picture of a field, as a fragment of HTML that holds no script and whose labels are escaped. */
export interface Drawing {
  field: string;
  title: string;
  axes: string[];
  unit: string;
  html: string;
  numbers: string;
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

/** A file that a form may name as `file:ID`. */
export interface FileCard {
  id: string;
  name: string;
}

/** A next token with its probability and its logit. */
export interface Guess {
  id: number;
  text: string;
  probability: number;
  logit: number;
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

/** A result as text of at most 2 kB. */
export interface Lines {
  text: string;
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

/** A refusal: what, why, and what instead. */
export interface Refusal {
  what: string;
  why: string;
  instead: string;
}

/** A result by its id, and the fields to draw; all that have a value if none is named. */
export interface ResultOf {
  model?: string;
  result: string;
  fields?: string[];
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
