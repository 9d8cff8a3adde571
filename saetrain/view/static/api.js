// Questions to the server.  Those that write or compute carry the token of this page.

const token = document.querySelector("meta[name=saetrain-token]").content;

async function answer(response) {
  const found = await response.json();
  if (!response.ok) throw new Error(found.error || response.statusText);
  return found;
}

export async function get(path, query = {}) {
  const parameters = new URLSearchParams(query);
  return answer(await fetch(`/api/${path}${parameters.size ? `?${parameters}` : ""}`));
}

function request(path, body, method) {
  const headers = { "Content-Type": "application/json", "X-Saetrain-Token": token };
  return fetch(`/api/${path}`, { method, headers, body: JSON.stringify(body) });
}

export async function send(path, body, method = "POST") {
  return answer(await request(path, body, method));
}

// Objects of an answer that comes line by line.
export async function* lines(path, body) {
  const response = await request(path, body, "POST");
  if (!response.ok) await answer(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n");
    held = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
