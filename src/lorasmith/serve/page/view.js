// Rendering everything around the conversation: labels, theme, models, sampling settings, notices.

import { t, useLanguage } from "./texts.js";
import { make } from "./turns.js";

export const at = (id) => document.getElementById(id);

/** Sets the language of the page's labels; null for the browser's language. */
export function dress(language) {
  document.documentElement.lang = useLanguage(language) === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of document.querySelectorAll("[data-hint]")) node.setAttribute("placeholder", t(node.dataset.hint));
  at("language").textContent = t("other_language");
  at("language").setAttribute("aria-label", t("other_language_name"));
  at("language").lang = document.documentElement.lang === "en" ? "zh-CN" : "en";
}

export function color(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").value = theme;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** What is known about a model. Each part may be missing; `model` is undefined until the list has been fetched. */
function factsOf(model) {
  if (!model) return [];
  if (!model.parent) return [t("base")];
  return [
    typeof model.rank === "number" && t("rank", { rank: model.rank }),
    typeof model.bytes === "number" && megabytes(model.bytes),
    typeof model.held_out_loss === "number" && t("held_out", { loss: model.held_out_loss.toFixed(3) }),
    [model.data ?? []].flat().join(", "),
  ].filter(Boolean);
}

/** A menu of models for each side, with facts about the selected one. */
export function showModels(models, chosen, onChoose) {
  const labels = chosen.length > 1 ? ["model_first", "model_second"] : ["model_only"];
  const sides = chosen.map((name, side) => {
    const select = make("select", "", "", { id: `model-${side}`, "aria-label": t(labels[side]) });
    const names = models.length ? models.map((model) => model.id) : [name];
    select.append(...names.map((id) => make("option", "", id, { value: id })));
    select.value = name;
    select.addEventListener("change", () => onChoose(side, select.value));
    const facts = make("p", "facts");
    facts.append(...factsOf(models.find((model) => model.id === name)).map((fact) => make("span", "", fact)));
    const node = make("div", `model side-${side}`);
    node.append(select, facts);
    return node;
  });
  at("models").classList.toggle("single", chosen.length < 2);
  const focused = document.activeElement?.id;
  at("models").replaceChildren(...sides);
  if (focused?.startsWith("model-")) at(focused)?.focus();
}

/** The system text and the sampling settings, and a summary for when they are folded. */
export function showSampling(sampling, system) {
  const text = at("sampling").querySelector("[name=system]");
  if (text.value !== system) text.value = system;
  for (const [name, value] of Object.entries(sampling)) {
    const field = at("sampling").querySelector(`[name="${name}"]`);
    if (field && field.value !== value) field.value = value;
  }
  const given = Object.entries(sampling).filter(([, value]) => value !== "");
  const parts = given.map(([name, value]) => t(`chosen_${name}`, { value }));
  at("chosen").textContent = [...(system ? [t("chosen_system")] : []), ...parts].join(" · ");
}

/** The button of the composer: one button for send and stop, so that it keeps the focus. */
export function showRunning(running) {
  at("send").textContent = t(running ? "stop" : "send");
  at("send").classList.toggle("stop", running);
  at("new").disabled = running;
}

/** Shows a message above the composer; "" hides it. */
export function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

/** Announces a text to screen readers. */
export function say(text) {
  at("spoken").textContent = text;
}

export function askForKey(asked) {
  at("key").hidden = !asked;
  if (asked) at("key-text").focus();
}

/** Adapts the height of the message field to its text, up to the maximum of its style. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

/** Scrolls to the newest text, unless the user has scrolled up. */
export function follower() {
  const page = document.documentElement;
  let follows = true;
  addEventListener("scroll", () => (follows = scrollY + innerHeight > page.scrollHeight - 60), { passive: true });
  return (always = false) => {
    if (always) follows = true;
    if (follows) scrollTo(0, page.scrollHeight);
  };
}
