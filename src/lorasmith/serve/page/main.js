// Entry point: connects the user's actions, the server and the saved state.

import { ApiError, apiRoot, listModels } from "./api.js";
import { fill } from "./replying.js";
import { asCurl, asPython, copy } from "./snippets.js";
import { apiKey, newReply, chooseModels, withSeed, load, requestOf, save, useKey } from "./state.js";
import { t } from "./texts.js";
import { because, Conversation } from "./turns.js";
import { askForKey, at, color, dress, fit, follower, notice, say, showModels, showRunning, showSampling } from "./view.js";

const state = load();
const conversation = new Conversation(at("turns"), { onCopy: copyReply, onAgain: answerAgain });
const follow = follower();
let models = [];
let listed = ""; // the models that are shown, as JSON
let left = false; // whether the page is being left, when the browser ends its requests
let running = null; // AbortController while replies are being generated

function keep() {
  if (!left && !save(state)) notice(t("not_kept"));
}

/** Saves the state while replies are still being generated: what happens to them now is not their end. */
function leave() {
  keep();
  left = true;
}

function show() {
  dress(state.language);
  color(state.theme);
  showModels(models, state.models, chooseModel);
  showSampling(state.sampling, state.system);
  showRunning(running !== null);
  at("empty").hidden = state.turns.length > 0;
  at("new").hidden = state.turns.length === 0;
  const place = scrollY;
  conversation.show(state.turns, state.models);
  conversation.offerAgain(running === null);
  scrollTo(0, place);
}

function chooseModel(side, name) {
  state.models[side] = name;
  keep();
  show();
}

/** Fetches the list of models; returns whether there are any. */
async function findModels() {
  try {
    models = await listModels(apiKey());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) refuseKey();
    else notice(because(error));
    return false;
  }
  askForKey(false);
  notice(models.length ? "" : t("no_models"));
  if (running === null && JSON.stringify(models) !== listed) {
    listed = JSON.stringify(models);
    const vanished = chooseModels(state, models);
    show();
    if (vanished.length) notice(vanished.map((names) => t("vanished", names)).join(" "));
  }
  return models.length > 0;
}

function refuseKey() {
  notice(apiKey() ? t("key_wrong") : "");
  askForKey(true);
}

/** Validates the form; unfolds the sampling settings first, since a hidden field cannot show its message. */
function valid() {
  if (!at("composer").checkValidity()) at("sampling").open = true;
  return at("composer").reportValidity();
}

async function send() {
  const ask = at("message").value.trim();
  if (!ask || running) return;
  if (!valid()) return;
  if (!models.length && !(await findModels())) return;
  at("message").value = state.draft = "";
  fit(at("message"));
  state.turns.push({ ask, replies: [] });
  await answer();
}

async function answerAgain() {
  const failed = !models.length && !(await findModels());
  if (running || failed || !valid()) return;
  at("message").focus();
  await answer();
}

/** Generates the replies to the last turn; both sides use the same seed, so that only the models differ. */
async function answer() {
  const index = state.turns.length - 1;
  const sampling = withSeed(state.sampling);
  state.turns[index].replies = state.models.map((model) => newReply(model, sampling, state.system.trim()));
  left = false;
  running = new AbortController();
  notice("");
  show();
  say(t("replying"));
  follow(true);
  keep();
  await Promise.all(state.turns[index].replies.map((_, side) => answerSide(index, side, running.signal)));
  running = null;
  finished(state.turns[index].replies);
}

async function answerSide(index, side, signal) {
  const reply = state.turns[index].replies[side];
  const view = () => conversation.shown[index][side]; // replaced when the language changes
  await fill(reply, requestOf(state.turns, index, side), apiKey(), signal, (text) => {
    view().append(text);
    if (view().note.textContent) view().refresh();
    follow();
  });
  view().refresh();
  follow();
}

function finished(replies) {
  keep();
  showRunning(false);
  conversation.offerAgain(true);
  follow();
  if (left) return;
  if (replies.some((reply) => reply.error?.status === 401)) refuseKey();
  else if (replies.some((reply) => reply.error?.status === 404)) findModels();
  const spoken = ({ model, text, error }) =>
    error ? t("failed", { model, text: because(error) }) : t("replied", { model, text: text || t("nothing") });
  say(replies.map(spoken).join(" "));
}

/** Copies a reply or its request; returns whether that worked. */
async function copyReply(what, turn, side) {
  const asked = requestOf(state.turns, turn, side);
  const made = {
    text: () => state.turns[turn].replies[side].text,
    curl: () => asCurl(apiRoot(), asked, apiKey() !== null),
    python: () => asPython(apiRoot(), asked, apiKey() !== null),
  };
  const done = await copy(made[what]()).then(() => true, () => false);
  if (done) say(t("copied_as", { what: t(`copy_${what}`) }));
  else notice(t("not_copied"));
  return done;
}

function begin() {
  if (running || !confirm(t("new_sure"))) return;
  state.turns = [];
  keep();
  show();
  at("message").focus();
}

function listen() {
  at("new").addEventListener("click", begin);
  at("language").addEventListener("click", () => {
    state.language = document.documentElement.lang === "en" ? "zh" : "en";
    keep();
    show();
  });
  at("theme").addEventListener("change", () => {
    state.theme = at("theme").value;
    keep();
    color(state.theme);
  });
  at("sampling").addEventListener("input", ({ target }) => {
    if (target.name === "system") state.system = target.value;
    else state.sampling[target.name] = target.value;
    keep();
    showSampling(state.sampling, state.system);
  });
  at("sampling").addEventListener("toggle", () => follow()); // it covers part of the last reply
  at("key").addEventListener("submit", async (event) => {
    event.preventDefault();
    useKey(at("key-text").value.trim());
    at("key-text").value = "";
    if (!(await findModels())) return;
    at("message").focus();
    if (state.turns.at(-1)?.replies.some((reply) => reply.error?.status === 401)) await answer();
  });
}

function listenToTyping() {
  at("message").addEventListener("input", () => {
    state.draft = at("message").value;
    fit(at("message"));
  });
  at("message").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Enter confirms the input method's candidate
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    send();
  });
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && running?.abort());
  addEventListener("beforeunload", leave);
  addEventListener("pagehide", leave);
  addEventListener("pageshow", () => (left = false));
  addEventListener("visibilitychange", () => document.hidden || findModels()); // adapters may have changed meanwhile
}

show();
listen();
listenToTyping();
at("app").hidden = false;
at("message").value = state.draft;
fit(at("message"));
if (matchMedia("(pointer: fine)").matches) at("message").focus();
follow(true);
await findModels();
