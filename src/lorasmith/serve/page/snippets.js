// A reply's request as a curl command or Python code. API keys are read from an environment variable, never included.

const KEY = "LORASMITH_API_KEY";
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(root, request, hasKey) {
  return [
    `curl ${quoted(`${root}/chat/completions`)}`,
    ...(hasKey ? [`  -H "Authorization: Bearer $${KEY}"`] : []),
    "  -H 'Content-Type: application/json'",
    `  -d ${quoted(JSON.stringify(request, null, 2))}`,
  ].join(" \\\n");
}

export function asPython(root, request, hasKey) {
  const key = hasKey ? `os.environ["${KEY}"]` : '"none"';
  const { messages, ...rest } = request;
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(root)}, api_key=${key})`,
    "reply = client.chat.completions.create(",
    ...Object.entries(rest).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`),
    "    messages=[",
    ...messages.map((message) => `        ${JSON.stringify(message)},`), // JSON strings are valid Python
    "    ],",
    ")",
    "print(reply.choices[0].message.content)",
    "",
  ].join("\n");
}

/** Copies to the clipboard; throws if the browser forbids it. Outside https and localhost, only execCommand exists. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  const before = document.activeElement;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  if (!done) throw new Error("copy");
}
