// State that is kept in the browser's storage: the conversation, the selected models and the sampling settings.

const PLACE = "lorasmith.page";
const KEY_PLACE = "lorasmith.key"; // in sessionStorage, so that the key is deleted with the tab
const VERSION = 1;

/** language: null for the browser's. turns: [{ask, replies: [reply, ...]}], with one reply per model. */
const fresh = () => ({
  version: VERSION,
  language: null,
  theme: "auto",
  models: [],
  system: "",
  sampling: { temperature: "0.7", top_p: "0.9", max_tokens: "256", seed: "" },
  draft: "",
  turns: [],
});

/** The saved state, or a new one if there is none of this version. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE));
    if (kept?.version !== VERSION) return fresh();
    for (const reply of kept.turns.flatMap((turn) => turn.replies)) {
      if (reply.running) Object.assign(reply, { running: false, finish: "interrupted" });
    }
    return { ...fresh(), ...kept };
  } catch {
    return fresh(); // no access to storage, or invalid content: the page works without it
  }
}

/** Saves the state; returns false if storage is full or disabled. */
export function save(state) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
}

let keyHere = null; // the key if storage is disabled; lasts until the page is reloaded

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
    // kept in keyHere only
  }
}

/** Selects two models: the previous ones if they still exist, else the base model and the first adapter; returns those
 * that do not exist any more, each with what was selected instead. */
export function chooseModels(state, models) {
  const names = models.map((model) => model.id);
  const bases = models.filter((model) => !model.parent).map((model) => model.id);
  const usual = [...bases, ...names.filter((name) => !bases.includes(name))];
  const sides = Math.min(2, names.length);
  const before = state.models;
  state.models = usual.slice(0, sides).map((name, side) => (names.includes(before[side]) ? before[side] : name));
  return state.models.map((chosen, side) => ({ gone: before[side], chosen })).filter(({ gone }) => gone && !names.includes(gone));
}

/** The sampling parameters of a request. Empty fields are omitted; an empty seed is chosen here, so that it can be shown. */
export function withSeed(sampling) {
  const given = Object.entries(sampling).filter(([, text]) => text !== "");
  const [seed] = crypto.getRandomValues(new Uint32Array(1)); // the server accepts 32 bits
  return { seed, ...Object.fromEntries(given.map(([name, text]) => [name, Number(text)])) };
}

/** A new, empty reply. */
export const newReply = (model, sampling, system) => ({
  model,
  system,
  sampling,
  text: "",
  running: true,
  finish: null, // stop, length, stopped, interrupted or error
  error: null, // {status, message, retryAfter}
  first: null, // seconds to the first text
  rate: null, // tokens a second after it
  tokens: null,
});

/** The request for the reply of this turn and side, with this side's earlier replies as its history. */
export function requestOf(turns, turn, side) {
  const { model, sampling, system } = turns[turn].replies[side];
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { ask, replies } of turns.slice(0, turn)) {
    if (!replies[side]?.text) continue; // skip turns without a reply: templates expect alternating roles
    messages.push({ role: "user", content: ask }, { role: "assistant", content: replies[side].text });
  }
  messages.push({ role: "user", content: turns[turn].ask });
  return { model, messages, ...sampling };
}
