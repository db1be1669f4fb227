// One reply from its request to its end.

import { ApiError, streamReply } from "./api.js";

/** Fills `reply` as its text arrives and calls `onText` for each piece. Throws nothing: a failure is in `reply.error`. */
export async function fill(reply, request, key, signal, onText) {
  const begin = performance.now();
  let first = null;
  let last = null;
  try {
    for await (const { text, finish, usage } of streamReply(request, key, signal)) {
      if (text) {
        last = performance.now();
        first ??= last;
        reply.first = (first - begin) / 1000;
        reply.text += text;
        onText(text);
      }
      reply.finish = finish ?? reply.finish;
      if (usage) Object.assign(reply, { tokens: usage.completion_tokens, rate: rateOf(usage, last - first) });
    }
  } catch (error) {
    failed(reply, error);
  }
  reply.running = false;
}

/** Tokens a second after the first one, which waited for the prompt; null where there were too few. */
const rateOf = ({ completion_tokens: tokens }, milliseconds) =>
  tokens > 1 && milliseconds > 0 ? ((tokens - 1) / milliseconds) * 1000 : null;

function failed(reply, error) {
  if (error.name === "AbortError") {
    reply.finish = "stopped";
  } else if (error instanceof ApiError) {
    reply.finish = "error";
    reply.error = { status: error.status, message: error.message, retryAfter: error.retryAfter };
  } else {
    throw error; // a fault of the page: the console names it
  }
}
