// Rendering the conversation. Text of users and models is only ever inserted as text nodes, never as HTML.

import { CUT_OFF, NO_ANSWER } from "./api.js";
import { t } from "./texts.js";

const LONG_ASK = 600; // characters of a message that is folded
const COPIED_FOR = 1500; // milliseconds for which a button shows "copied"

/** Creates an element with a class, text and attributes. */
export function make(tag, name = "", text = "", attributes = {}) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function button(text, name, onClick) {
  const node = make("button", name, text, { type: "button" });
  node.addEventListener("click", onClick);
  return node;
}

/** A sentence that says why a request failed; includes the server's message. */
export function because({ status, message, retryAfter }) {
  if (status === NO_ANSWER) return t("no_answer");
  if (status === CUT_OFF) return t("cut_off");
  if (status === 429) return retryAfter ? t("busy", { seconds: retryAfter }) : t("busy_soon");
  return t("refused", { status, message });
}

/** The line below a reply: how it ended, number of tokens, tokens per second, time to first token, seed. */
function factsOf({ finish, tokens, rate, first, sampling }) {
  const counted = tokens === 1 ? t("one_token") : tokens !== null && t("tokens", { tokens });
  const ends = { stopped: t("stopped"), interrupted: t("interrupted") };
  return [
    ends[finish],
    finish === "length" ? t("cut", { tokens: tokens ?? sampling.max_tokens }) : counted,
    rate !== null && t("rate", { rate: rate.toFixed(1) }),
    first !== null && t("first", { seconds: first.toFixed(2) }),
    t("chosen_seed", { value: sampling.seed }),
  ].filter(Boolean);
}

/** The view of one reply: `append` adds text, `refresh` shows its current state. */
class ReplyView {
  constructor(reply, side, isNew, onCopy) {
    this.reply = reply;
    this.node = make("article", `reply side-${side}`, "", { "aria-label": reply.model });
    this.node.classList.toggle("renamed", isNew);
    this.text = document.createTextNode(reply.text);
    this.words = make("p", "text", "", { dir: "auto" });
    this.words.append(this.text);
    this.note = make("p", "note");
    this.facts = make("p", "facts");
    this.actions = make("p", "actions", t("copy"));
    for (const what of ["text", "curl", "python"]) {
      const name = t(`copy_${what}`);
      const copy = button(name, "link", async () => {
        if (!(await onCopy(what))) return;
        copy.textContent = t("copied");
        setTimeout(() => (copy.textContent = name), COPIED_FOR);
      });
      copy.setAttribute("aria-label", t("copy_label", { what: name }));
      this.actions.append(copy);
    }
    this.node.append(make("h3", "", reply.model), this.words, this.note, this.facts, this.actions);
    this.refresh();
  }

  append(text) {
    this.text.appendData(text);
    this.node.classList.remove("waiting");
  }

  refresh() {
    const { running, text, error } = this.reply;
    if (!running) this.text.data = text.trimEnd(); // without trailing blank lines
    this.node.setAttribute("aria-busy", String(running));
    this.node.classList.toggle("waiting", running && !text);
    this.node.classList.toggle("running", running);
    this.node.classList.toggle("failed", error !== null);
    this.note.textContent = error ? because(error) : running && !text ? t("waiting") : !text ? t("nothing") : "";
    this.facts.replaceChildren(...(running || error ? [] : factsOf(this.reply).map((fact) => make("span", "", fact))));
    this.actions.hidden = running;
  }
}

/** Folds a long message, with a button that shows all of it. */
function foldable(ask) {
  ask.classList.add("long");
  const more = button(t("show_all"), "link", () => {
    const open = ask.classList.toggle("open");
    more.textContent = t(open ? "show_less" : "show_all");
    more.setAttribute("aria-expanded", String(open));
  });
  more.setAttribute("aria-expanded", "false");
  ask.append(more);
}

/** The view of all turns, in the element `place`. shown[turn][side] is a ReplyView. */
export class Conversation {
  constructor(place, { onCopy, onAgain }) {
    Object.assign(this, { place, onCopy, onAgain, shown: [], again: null });
  }

  /** Renders everything again: at the start, and when the language or the models change. */
  show(turns, models) {
    this.place.replaceChildren();
    this.shown = [];
    turns.forEach((turn, index) => this.add(turn, index, models));
  }

  add(turn, index, models) {
    const node = make("section", "turn");
    const ask = make("h2", "ask", "", { dir: "auto" });
    ask.append(make("span", "unseen", `${t("asked")}: `), make("span", "words", turn.ask));
    if (turn.ask.length > LONG_ASK || turn.ask.split("\n").length > 8) foldable(ask);
    const pair = make("div", turn.replies.length > 1 ? "pair" : "pair single");
    this.shown[index] = turn.replies.map(
      (reply, side) => new ReplyView(reply, side, reply.model !== models[side], (what) => this.onCopy(what, index, side)),
    );
    pair.append(...this.shown[index].map((view) => view.node));
    node.append(ask, pair);
    if (this.place.children[index]) this.place.children[index].replaceWith(node);
    else this.place.append(node);
  }

  /** Shows or hides the button that regenerates the replies to the last turn. */
  offerAgain(offered) {
    this.again?.remove();
    if (!offered || !this.place.lastElementChild) return;
    this.again = button(t("again"), "again", this.onAgain);
    this.place.lastElementChild.append(this.again);
  }
}
