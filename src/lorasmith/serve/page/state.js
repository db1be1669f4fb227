// What survives a refresh: the conversation, the choice of models and how replies are drawn.

const PLACE = "lorasmith.page";
const KEY_PLACE = "lorasmith.key"; // in the tab's own storage, so that the key goes with the tab
const VERSION = 1;

/** language: null is the browser's. turns: [{ask, replies: [reply, ...]}], one reply for each side. */
const fresh = () => ({
  version: VERSION,
  language: null,
  theme: "auto",
  models: [],
  sampling: { temperature: "0.7", top_p: "0.9", max_tokens: "256", seed: "" },
  draft: "",
  turns: [],
});

/** The state as it was left, or a fresh one where none of this version is kept. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE));
    if (kept?.version !== VERSION) return fresh();
    for (const reply of kept.turns.flatMap((turn) => turn.replies)) {
      if (reply.running) Object.assign(reply, { running: false, finish: "interrupted" });
    }
    return { ...fresh(), ...kept };
  } catch {
    return fresh(); // storage forbidden, or not ours: the page works without
  }
}

/** False where the browser keeps nothing: storage is full or forbidden. */
export function save(state) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

let keyHere = null; // where storage is forbidden, the key lasts until the refresh

export function apiKey() {
  try {
    return keyHere ?? sessionStorage.getItem(KEY_PLACE);
  } catch {
    return keyHere;
  }
}

export function useKey(key) {
  keyHere = key;
  try {
    sessionStorage.setItem(KEY_PLACE, key);
  } catch {
    // it is kept in keyHere
  }
}

/** Two names of `models`: those chosen before where they still exist, else the base and its first adapter. */
export function chooseModels(state, models) {
  const names = models.map((model) => model.id);
  const bases = models.filter((model) => !model.parent).map((model) => model.id);
  const usual = [...bases, ...names.filter((name) => !bases.includes(name))];
  const sides = Math.min(2, names.length);
  state.models = usual.slice(0, sides).map((name, side) => (names.includes(state.models[side]) ? state.models[side] : name));
}

/** The numbers of a request. Empty fields are left to the server; an empty seed is drawn here, so that it can be shown. */
export function drawn(sampling) {
  const given = Object.entries(sampling).filter(([, text]) => text !== "");
  const [seed] = crypto.getRandomValues(new Uint32Array(1)); // the server takes as much
  return { seed, ...Object.fromEntries(given.map(([name, text]) => [name, Number(text)])) };
}

/** A reply of which nothing has come yet. */
export const begun = (model, sampling) => ({
  model,
  sampling,
  text: "",
  running: true,
  finish: null, // stop, length, stopped, interrupted or error
  error: null, // {status, message, retryAfter}
  first: null, // seconds to the first text
  rate: null, // tokens a second after it
  tokens: null,
});

/** The request that `turn`'s reply of this side answers: this side's own earlier replies are its history. */
export function requestOf(turns, turn, side) {
  const { model, sampling } = turns[turn].replies[side];
  const messages = [];
  for (const { ask, replies } of turns.slice(0, turn)) {
    if (!replies[side]?.text) continue; // nothing was answered: two questions in a row would confuse the template
    messages.push({ role: "user", content: ask }, { role: "assistant", content: replies[side].text });
  }
  messages.push({ role: "user", content: turns[turn].ask });
  return { model, messages, ...sampling };
}
