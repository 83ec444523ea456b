// Vercel's AI SDK with its provider for OpenAI-compatible servers.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { BASE_URL, KEY, MODEL, SCHEMA, collected, left, main, mark, raised, script } from "./cases.mjs";

const made = { name: "local", baseURL: BASE_URL, apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true };
const local = createOpenAICompatible(made);
const prompt = "What is 17 plus 25?";
const add = tool({
  description: "Add two numbers.",
  inputSchema: jsonSchema({ type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } }),
  execute: async ({ a, b }) => String(a + b),
});

const ask = (more) => generateText({ model: local(MODEL), prompt, maxRetries: 0, ...more });
const failing = async (more) => {
  const error = await raised([APICallError], () => ask(more));
  return [error.statusCode ?? null, error.isRetryable, error.responseHeaders?.["retry-after"] ?? null];
};

await main({
  async chat() {
    const answer = await ask();
    return [answer.text, answer.finishReason, answer.usage.outputTokens];
  },
  async chat_stream() {
    const stream = streamText({ model: local(MODEL), prompt: "Grüße, 世界 🙂" });
    return [(await collected(stream.textStream)).join(""), (await stream.usage).outputTokens];
  },
  async multi_turn() {
    const messages = [{ role: "user", content: prompt }, { role: "assistant", content: "42" }, { role: "user", content: "And in Italian?" }];
    return (await ask({ prompt: undefined, messages })).text;
  },
  async tools() {
    const [call] = (await ask({ tools: { add: { ...add, execute: undefined } } })).toolCalls;
    return [call.toolName, call.input];
  },
  async tool_loop() {
    const done = await ask({ tools: { add }, stopWhen: stepCountIs(3) });
    return [done.steps.length, done.steps[0].toolResults[0].output, done.text];
  },
  async tool_loop_stream() {
    const stream = streamText({ model: local(MODEL), prompt, tools: { add }, stopWhen: stepCountIs(3) });
    return [...new Set((await collected(stream.fullStream)).map((part) => part.type))];
  },
  async json_schema() {
    return (await generateObject({ model: local(MODEL), prompt, schema: jsonSchema(SCHEMA) })).object;
  },
  async completions() {
    return (await ask({ model: local.completionModel(MODEL) })).finishReason;
  },
  async embeddings() {
    const { embeddings } = await embedMany({ model: local.textEmbeddingModel("text-embedding-3-small"), values: ["one", "two"] });
    return embeddings;
  },
  error_bad_request: () => failing({ headers: script({ status: 400 }) }),
  error_authentication: () => failing({ headers: { Authorization: "Bearer wrong-key" } }),
  error_not_found: () => failing({ model: local("no-such-model") }),
  error_rate_limit: () => failing({ headers: script({ status: 429, headers: { "Retry-After": "7" } }) }),
  error_server: () => failing({ headers: script({ status: 500 }) }),
  async error_connection() {
    // the upstream hangs up; through a proxy it is the proxy that answers: 502
    return failing({ headers: script({ fault: "reset_before_head" }) });
  },
  async error_timeout() {
    const slow = { headers: script({ before_head_s: 5 }), abortSignal: AbortSignal.timeout(300) };
    return (await raised([Error, DOMException], () => ask(slow))).name;
  },
  async abort() {
    const [marked, leaving] = [mark(), new AbortController()];
    const headers = { ...marked, ...script({ between_s: 0.02, repeat: 1000 }) };
    const stream = streamText({ model: local(MODEL), prompt, headers, abortSignal: leaving.signal });
    for await (const _ of stream.textStream) break;
    leaving.abort();
    return left(marked);
  },
});
