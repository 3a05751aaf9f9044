// Talking to the server: requests, streamed replies, and errors in words. Draws nothing.

const KEY = "mixtral-mlx/key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Then the key lasts as long as the page.
}

/** Keep the key until the tab is closed. */
export function useKey(text) {
  key = text;
  try {
    sessionStorage.setItem(KEY, text);
  } catch {
    // As above.
  }
}

export const hasKey = () => key !== "";

/** What went wrong, in words: `message` says what, `hint` what to do. `code` is the server's, `status` HTTP's. */
export class ServerError extends Error {
  constructor(message, { hint = "", code = "", status = 0, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { hint, code, status, retryAfter });
  }
}

const UNREACHABLE = {
  code: "unreachable",
  hint: "It may have been stopped, or this computer may be asleep. Start it with “mixtral-mlx serve”, then try again.",
};

const HINTS = {
  400: "Change what it objects to, in the message or in the settings, and try again.",
  401: "Enter the key that the server was started with.",
  403: "Open the page at the address that the server printed when it started.",
  404: "This page and the server may be of different versions. Reload the page.",
  413: "Shorten the message, or begin a new conversation.",
  429: "It answers others at the moment. Try again shortly.",
  500: "Try again. If it goes on, the server's own output says more.",
  503: "It is starting, stopping or full. Try again shortly.",
  504: "Ask for less, or have the server started with a longer --timeout.",
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  // Other characters fit no header, and no key has them: the server will ask again.
  if (/^[\x21-\x7e]+$/.test(key)) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", UNREACHABLE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  let body = {};
  try {
    body = (await response.json()).error ?? {};
  } catch {
    // Something between us and the server answered; the status has to do.
  }
  return asError(body, status, response.headers.get("Retry-After"));
}

// Our server's own messages say what to do; the hints are for those that say nothing.
function asError(body, status = 0, retryAfter = null) {
  const said = typeof body === "string" ? body : body?.message;
  const wait = Number(retryAfter);
  const known = HINTS[status] ?? (status >= 500 ? HINTS[500] : "Try again.");
  return new ServerError(said || `The server answered with status ${status}.`, {
    hint: wait > 0 ? `Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : (body?.hint ?? (said ? "" : known)),
    code: body?.code ? String(body.code) : "",
    status,
    retryAfter: wait > 0 ? wait : null,
  });
}

/** The JSON at `path`. */
export async function get(path) {
  const response = await request(path);
  try {
    return await response.json();
  } catch {
    throw new ServerError(`What the server sent for ${path} is not JSON.`, { hint: HINTS[404] });
  }
}

/**
 * Ask for a reply and yield what comes: {progress: {done, total, cached}}, {text}, {finish}, {usage, timings}.
 * Throws `ServerError`, also for an error inside the stream and for a stream that just ends.
 */
export async function* reply(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  for await (const event of events(response.body)) {
    if (event.comment !== undefined) {
      const progress = asProgress(event.comment);
      if (progress) yield { progress };
    } else if (event.data === "[DONE]") {
      return;
    } else {
      for (const part of parts(event.data)) {
        if (part.finish) finished = true;
        yield part;
      }
    }
  }
  if (!finished) {
    throw new ServerError("The connection ended before the reply was complete.", {
      code: "cut_off",
      hint: "The server may have been stopped. What had come is kept; try again for a whole reply.",
    });
  }
}

function* parts(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not JSON.", { hint: HINTS[500] });
  }
  if (chunk?.error) throw asError(chunk.error);
  const choice = chunk?.choices?.[0];
  const text = choice?.delta?.content;
  if (typeof text === "string" && text) yield { text };
  if (typeof choice?.finish_reason === "string") yield { finish: choice.finish_reason };
  if (chunk?.usage) yield { usage: chunk.usage, timings: chunk.timings ?? {} };
}

function asProgress(comment) {
  const found = /^prompt (\d+)\/(\d+)(?: \(cached (\d+)\))?/.exec(comment);
  return found && { done: Number(found[1]), total: Number(found[2]), cached: Number(found[3] ?? 0) };
}

/** Server-sent events from a stream of bytes, cut anywhere: {data} or {comment}. */
export async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await nextOf(reader);
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { data: data.join("\n") };
          data = [];
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function nextOf(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke off.", UNREACHABLE);
  }
}
