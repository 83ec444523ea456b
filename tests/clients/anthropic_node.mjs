// The official Anthropic client for Node.

import Anthropic from "@anthropic-ai/sdk";
import { KEY, MODEL, ROOT_URL, collected, left, main, mark, raised, script } from "./cases.mjs";

const client = new Anthropic({ baseURL: ROOT_URL, apiKey: KEY, maxRetries: 0 });
const SUM = [{ role: "user", content: "What is 17 plus 25?" }];
const schema = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
const TOOL = { name: "add", input_schema: schema };

const ask = (more, options) => client.messages.create({ model: MODEL, max_tokens: 100, messages: SUM, ...more }, options);
const told = (error) => [error.constructor.name, error.status, error.headers?.get("retry-after")];

await main({
  async chat() {
    const answer = await ask({ system: "Be brief." });
    return [answer.content[0].text, answer.stop_reason, answer.usage.output_tokens];
  },
  async chat_stream() {
    return client.messages.stream({ model: MODEL, max_tokens: 100, messages: SUM }).finalText();
  },
  async chat_stream_events() {
    return (await collected(await ask({ stream: true }))).map((event) => event.type);
  },
  async tools() {
    const answer = await ask({ tools: [TOOL] });
    return [answer.stop_reason, answer.content[0].input];
  },
  async tool_loop() {
    const first = await ask({ tools: [TOOL] });
    const result = { type: "tool_result", tool_use_id: first.content[0].id, content: "42" };
    const messages = [...SUM, { role: "assistant", content: first.content }, { role: "user", content: [result] }];
    return (await ask({ messages, tools: [TOOL] })).stop_reason;
  },
  async error_bad_request() {
    return (await raised([Anthropic.BadRequestError], () => ask({ messages: [] }))).status;
  },
  async error_authentication() {
    const wrong = client.withOptions({ apiKey: "wrong-key" });
    return told(await raised([Anthropic.AuthenticationError], () => wrong.messages.create({ model: MODEL, max_tokens: 9, messages: SUM })));
  },
  async error_not_found() {
    return told(await raised([Anthropic.NotFoundError], () => ask({ model: "no-such-model" })));
  },
  async error_rate_limit() {
    const headers = script({ status: 429, headers: { "Retry-After": "7" } });
    return told(await raised([Anthropic.RateLimitError], () => ask({}, { headers })));
  },
  async error_server() {
    return told(await raised([Anthropic.InternalServerError], () => ask({}, { headers: script({ status: 529 }) })));
  },
  async error_timeout() {
    const options = { timeout: 300, headers: script({ before_head_s: 5 }) };
    return (await raised([Anthropic.APIConnectionTimeoutError], () => ask({}, options))).constructor.name;
  },
  async error_midway() {
    // the upstream hangs up in the middle of a stream; through the proxy that is an error event
    const stream = await ask({ stream: true }, { headers: script({ fault: "reset_midway" }) });
    return (await raised([Error], () => collected(stream))).constructor.name;
  },
  async abort() {
    const marked = mark();
    const headers = { ...marked, ...script({ between_s: 0.02, repeat: 1000 }) };
    for await (const _ of await ask({ stream: true }, { headers })) break;
    return left(marked);
  },
});
