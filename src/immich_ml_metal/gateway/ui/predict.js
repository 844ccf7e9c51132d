// One request as Immich sends it: a form with `entries` and a picture or a text.

export async function predict(entries, payload) {
  const form = new FormData();
  form.append("entries", JSON.stringify(entries));
  form.append(typeof payload === "string" ? "text" : "image", payload);
  const started = performance.now();
  let response;
  try {
    response = await fetch("/predict", { method: "POST", body: form, cache: "no-store" });
  } catch {
    return { ok: false, status: 0, detail: "" };
  }
  const ms = performance.now() - started;
  const body = await response.json().catch(() => ({}));
  if (!response.ok) return { ok: false, status: response.status, detail: describe(body.detail) };
  return { ok: true, ms, body, stages: stagesOf(response.headers.get("server-timing")) };
}

const describe = (detail) => (typeof detail === "string" ? detail : JSON.stringify(detail ?? ""));

// `decode;dur=12.3, infer;dur=45` → [["decode", 12.3], ["infer", 45]]
function stagesOf(header) {
  return (header ?? "").split(",").map((part) => /^\s*([\w-]+);dur=([\d.]+)/.exec(part))
    .filter(Boolean).map(([, name, ms]) => [name, Number(ms)]);
}
