// The official OpenAI client for Node.

import OpenAI from "openai";
import { BASE_URL, KEY, MODEL, SCHEMA, collected, left, main, mark, raised, script } from "./cases.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const SUM = [{ role: "user", content: "What is 17 plus 25?" }];
const parameters = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
const TOOL = { type: "function", function: { name: "add", parameters } };

const ask = (more, options) => client.chat.completions.create({ model: MODEL, messages: SUM, ...more }, options);
const told = (error) => [error.constructor.name, error.status, error.code, error.headers?.get("retry-after")];

await main({
  async chat() {
    const answer = await ask();
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens];
  },
  async chat_stream() {
    const chunks = await collected(await ask({ messages: [{ role: "user", content: "Grüße, 世界 \u2028 🙂" }], stream: true }));
    return chunks.map((c) => c.choices[0].delta.content ?? "").join("");
  },
  async chat_stream_usage() {
    const chunks = await collected(await ask({ stream: true, stream_options: { include_usage: true } }));
    return chunks.at(-1).usage.completion_tokens;
  },
  async chat_stream_helper() {
    return (await client.chat.completions.stream({ model: MODEL, messages: SUM }).finalChatCompletion()).choices[0].message.content;
  },
  async multi_turn() {
    const more = [{ role: "assistant", content: "42" }, { role: "user", content: "And in Italian?" }];
    return (await ask({ messages: [...SUM, ...more] })).choices[0].message.content;
  },
  async tools() {
    const [call] = (await ask({ tools: [TOOL] })).choices[0].message.tool_calls;
    return [call.function.name, call.function.arguments];
  },
  async tool_loop() {
    const add = { ...TOOL.function, parse: JSON.parse, function: ({ a, b }) => String(a + b) };
    const runner = client.chat.completions.runTools({ model: MODEL, messages: SUM, tools: [{ type: "function", function: add }] });
    return [await runner.finalContent(), runner.messages.map((m) => m.role)];
  },
  async tool_loop_stream() {
    const add = { ...TOOL.function, parse: JSON.parse, function: ({ a, b }) => String(a + b) };
    const tools = [{ type: "function", function: add }];
    return client.chat.completions.runTools({ model: MODEL, messages: SUM, stream: true, tools }).finalContent();
  },
  async json_schema() {
    const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: SCHEMA } };
    return (await client.chat.completions.parse({ model: MODEL, messages: SUM, response_format })).choices[0].message.parsed;
  },
  async error_bad_request() {
    return (await raised([OpenAI.BadRequestError], () => ask({ messages: [] }))).status;
  },
  async error_bad_request_upstream() {
    return told(await raised([OpenAI.BadRequestError], () => ask({}, { headers: script({ status: 400 }) })));
  },
  async error_authentication() {
    const wrong = client.withOptions({ apiKey: "wrong-key" });
    return told(await raised([OpenAI.AuthenticationError], () => wrong.chat.completions.create({ model: MODEL, messages: SUM })));
  },
  async error_not_found() {
    return told(await raised([OpenAI.NotFoundError], () => ask({ model: "no-such-model" })));
  },
  async error_rate_limit() {
    const headers = script({ status: 429, headers: { "Retry-After": "7" } });
    return told(await raised([OpenAI.RateLimitError], () => ask({}, { headers })));
  },
  async error_server() {
    return told(await raised([OpenAI.InternalServerError], () => ask({}, { headers: script({ status: 500 }) })));
  },
  async error_timeout() {
    const options = { timeout: 300, headers: script({ before_head_s: 5 }) };
    return (await raised([OpenAI.APIConnectionTimeoutError], () => ask({}, options))).constructor.name;
  },
  async error_connection() {
    // the upstream hangs up; through a proxy it is the proxy that answers: 502
    const kinds = [OpenAI.APIConnectionError, OpenAI.InternalServerError];
    const error = await raised(kinds, () => ask({}, { headers: script({ fault: "reset_before_head" }) }));
    return [error.constructor.name, error.status ?? null];
  },
  async error_midway() {
    // the upstream hangs up in the middle of a stream; through the proxy that is an error event
    const stream = await ask({ stream: true }, { headers: script({ fault: "reset_midway" }) });
    return (await raised([Error], () => collected(stream))).constructor.name;
  },
  async retries() {
    const headers = script({ status: 503, headers: { "retry-after-ms": "20" } }, 2);
    return (await ask({}, { headers, maxRetries: 2 })).choices[0].message.content;
  },
  async abort() {
    const marked = mark();
    const headers = { ...marked, ...script({ between_s: 0.02, repeat: 1000 }) };
    for await (const _ of await ask({ stream: true }, { headers })) break;
    return left(marked);
  },
  async embeddings() {
    const found = await client.embeddings.create({ model: "text-embedding-3-small", input: ["one", "two"] });
    return found.data.map((d) => d.embedding.map((x) => Number(x.toFixed(4))));
  },
  async models() {
    if (!(await collected(client.models.list())).some((m) => m.id === MODEL)) throw new Error("not listed");
    return (await client.models.retrieve(MODEL)).id;
  },
  async completions() {
    return (await client.completions.create({ model: MODEL, prompt: "one two" })).choices[0].text;
  },
  async responses() {
    return (await client.responses.create({ model: MODEL, input: "one two" })).output_text;
  },
  async responses_stream() {
    return (await collected(await client.responses.create({ model: MODEL, input: "one two", stream: true }))).map((e) => e.type);
  },
  async responses_tools() {
    const tools = [{ type: "function", strict: false, ...TOOL.function }];
    const first = await client.responses.create({ model: MODEL, input: SUM, tools });
    const result = { type: "function_call_output", call_id: first.output[0].call_id, output: "42" };
    return (await client.responses.create({ model: MODEL, input: [...SUM, ...first.output, result], tools })).output_text;
  },
});
