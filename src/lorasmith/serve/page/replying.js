// Generating one reply.

import { ApiError, streamReply } from "./api.js";

/** Streams a reply into `reply` and calls `onText` for each piece of text. Errors are stored in `reply.error`. */
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

/** Tokens per second, not counting the first token and the prompt; null if there are too few tokens. */
const rateOf = ({ completion_tokens: tokens }, milliseconds) =>
  tokens > 1 && milliseconds > 0 ? ((tokens - 1) / milliseconds) * 1000 : null;

function failed(reply, error) {
  if (error.name === "AbortError") {
    reply.finish = "stopped";
  } else if (error instanceof ApiError) {
    reply.finish = "error";
    reply.error = { status: error.status, message: error.message, retryAfter: error.retryAfter };
  } else {
    throw error; // a bug in the page; shown in the console
  }
}
