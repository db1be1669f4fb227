// Client of the server's API: listing models, and streaming replies.

const address = (path) => new URL(path, document.baseURI).href;

export const CHAT_PATH = "v1/chat/completions";
export const apiRoot = () => address("v1");

export const NO_ANSWER = 0;
export const CUT_OFF = -1;

/** An error response or a failed connection; `status` is the HTTP status, NO_ANSWER or CUT_OFF. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function request(path, key, options = {}) {
  const headers = { "Accept-Language": document.documentElement.lang, ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(NO_ANSWER, error.message);
  }
  if (!response.ok) throw new ApiError(response.status, await messageOf(response), response.headers.get("Retry-After"));
  return response;
}

/** The message of an error response in OpenAI's format, or its text. */
async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message ?? text;
  } catch {
    return text || response.statusText;
  }
}

/** The items of /v1/models. `parent` is the base model of an adapter, and null for the base. Throws ApiError. */
export async function listModels(key) {
  const { data } = await (await request("v1/models", key, { cache: "no-store" })).json();
  return data;
}

/**
 * Yields {text}, {finish} and {usage} as they arrive. Throws ApiError, or AbortError once `signal` is set.
 * A stream that ends without [DONE] was interrupted, which is an ApiError too.
 */
export async function* streamReply(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(CHAT_PATH, key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(streamed),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    yield* read(JSON.parse(data));
  }
  throw new ApiError(CUT_OFF, "");
}

function* read(chunk) {
  if (chunk.error) throw new ApiError(500, chunk.error.message ?? String(chunk.error));
  for (const choice of chunk.choices ?? []) {
    if (choice.delta?.content) yield { text: choice.delta.content };
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
  if (chunk.usage) yield { usage: chunk.usage };
}

function broken(error) {
  throw error.name === "AbortError" ? error : new ApiError(CUT_OFF, error.message);
}

/** Parses server-sent events and yields their `data`. Network chunks need not end where events end. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(broken);
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // ignored: if the stream has failed, read() has reported it
  }
}
