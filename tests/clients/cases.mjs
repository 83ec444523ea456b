// What a client's script is made of, as cases.py says it: cases, what each saw, one JSON line per case.

import { randomUUID } from "node:crypto";

export const BASE_URL = process.env.BASE_URL ?? "http://127.0.0.1:9001/v1";
export const ROOT_URL = BASE_URL.replace(/\/v1$/, "");
export const UPSTREAM_URL = (process.env.UPSTREAM_URL ?? BASE_URL).replace(/\/v1$/, "");
export const MODEL = process.env.MODEL ?? "gpt-4o-mini";
export const KEY = "client-key";
export const SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, population: { type: "integer" } },
  required: ["city", "population"],
  additionalProperties: false,
};
const LEAVES_WITHIN_MS = 1000; // a client that leaves stops the upstream

/** Headers that tell the scripted upstream what to do with this request, at most until the `until`th retry. */
export function script(fields, until) {
  const headers = { "x-fake-script": JSON.stringify(fields) };
  return until === undefined ? headers : { ...headers, "x-fake-until": String(until) };
}

export const mark = () => ({ "x-case": randomUUID() });

/** Waits until the upstream has noticed that the client is gone. */
export async function left(marked) {
  const deadline = Date.now() + LEAVES_WITHIN_MS;
  while (Date.now() < deadline) {
    const requests = await (await fetch(`${UPSTREAM_URL}/fake/requests`)).json();
    if (requests.some((r) => r.headers["x-case"] === marked["x-case"] && r.left)) return "the upstream noticed";
    await new Promise((done) => setTimeout(done, 20));
  }
  throw new Error(`the upstream did not notice within ${LEAVES_WITHIN_MS} ms that the client left`);
}

/** What `call` throws, which has to be one of `kinds`. */
export async function raised(kinds, call) {
  let found;
  try {
    found = await call();
  } catch (error) {
    if (kinds.some((kind) => error instanceof kind)) return error;
    throw error;
  }
  throw new Error(`nothing was thrown, but ${JSON.stringify(found)} returned`);
}

export async function collected(stream) {
  const found = [];
  for await (const piece of stream) found.push(piece);
  return found;
}

export async function main(cases) {
  for (const [name, run] of Object.entries(cases)) {
    try {
      console.log(JSON.stringify({ case: name, passed: true, seen: (await run()) ?? null }));
    } catch (error) {
      console.error(error);
      console.log(JSON.stringify({ case: name, passed: false, seen: String(error).slice(0, 400) }));
    }
  }
  process.exit(0); // clients keep connections open
}
