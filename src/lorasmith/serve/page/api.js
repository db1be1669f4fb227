// The two addresses of the server that the page uses, and how a streamed reply is read.

const address = (path) => new URL(path, document.baseURI).href;

export const CHAT_PATH = "v1/chat/completions";
export const apiRoot = () => address("v1");

export const NO_ANSWER = 0;
export const CUT_OFF = -1;

/** What came instead of what was asked for; `status` is the server's, NO_ANSWER or CUT_OFF. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(NO_ANSWER, error.message);
  }
  if (!response.ok) throw new ApiError(response.status, await saidBy(response), response.headers.get("Retry-After"));
  return response;
}

/** The server's own words for an error, as OpenAI's API wraps them, or whatever text came. */
async function saidBy(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message ?? text;
  } catch {
    return text || response.statusText;
  }
}

/** Items of /v1/models: the base has no `parent`, an adapter names its base there. Throws ApiError. */
export async function listModels(key) {
  const { data } = await (await ask("v1/models", key, { cache: "no-store" })).json();
  return data;
}

/**
 * Yields {text}, {finish} and {usage} as they arrive. Throws ApiError, or AbortError once `signal` is set.
 * A stream that ends without [DONE] was cut on the way, and is an error too.
 */
export async function* streamReply(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask(CHAT_PATH, key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
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

/** The `data` of server-sent events; an event may arrive in pieces, or several at once. */
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
    reader.cancel().catch(() => {}); // the stream may have failed already, which its reader was told
  }
}
