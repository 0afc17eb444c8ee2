// Asking the server: the API key, addresses, and errors of the OpenAI API.

const KEY = "jaxpaged-api-key";

/** The key that the user gave, kept for this tab alone. */
export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setApiKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // A browser that keeps nothing: the key would have to be typed for each request.
  }
}

/** An answer of the server that is no success. */
export class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** fetch with the key; addresses are relative to the page, so that a proxy may put it below a path. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { cache: "no-store", ...options, headers });
  if (!response.ok) throw await serverError(response);
  return response;
}

async function serverError(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error } = JSON.parse(text);
    return new ServerError(response.status, error.message ?? String(error), error.code);
  } catch {
    return new ServerError(response.status, text.slice(0, 500) || response.statusText || `status ${response.status}`);
  }
}

/** What /health says: {status, progress}; status "unreachable" if nobody answers. */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    return await response.json();
  } catch {
    return { status: "unreachable" };
  }
}
