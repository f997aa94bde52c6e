// The `openai` npm package against a running server: what its users write, each answer checked.
//
//     npm ci --prefix tests/clients
//     CLIENT_BASE_URL=http://127.0.0.1:8000/v1 CLIENT_API_KEY=… node tests/clients/openai_npm.mjs

import assert from "node:assert/strict";
import OpenAI from "openai";

const server = { baseURL: process.env.CLIENT_BASE_URL, apiKey: process.env.CLIENT_API_KEY ?? "none" };
const client = new OpenAI(server);
const prompt = "Once upon a time, there was a little";
const messages = [
  { role: "system", content: "You tell short stories." },
  { role: "user", content: "Tell me one about a dog." },
];
const long = { max_tokens: 400, ignore_eos: true }; // nothing ends it before its length

const found = (await client.models.list()).data;
const backbone = found.find((model) => model.kind === "backbone").id;
const [task, other] = found.filter((model) => model.kind === "task").map((model) => model.id);

const all = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** A number of the server's /metrics. */
async function gauge(name, url = server.baseURL) {
  const headers = { authorization: `Bearer ${server.apiKey}` };
  const text = await (await fetch(`${url.replace(/\/v1$/, "")}/metrics`, { headers })).text();
  const line = text.split("\n").find((one) => one.startsWith(`espalier_${name} `));
  return Number(line?.split(" ")[1]);
}

/** Returns once no text is being generated and no KV page is held; fails if that never happens. */
async function idle(url = server.baseURL) {
  for (const end = Date.now() + 30_000; Date.now() < end; await sleep(20)) {
    const names = ["running_sequences", "waiting_sequences", "kv_pages_held"];
    const values = await Promise.all(names.map((name) => gauge(name, url)));
    if (values.every((value) => value === 0)) return;
  }
  assert.fail("the server still generates for clients that have left");
}

const checks = {
  async models() {
    const one = await client.models.retrieve(`${task}@1`);
    assert.equal(one.id, `${task}@1`);
    assert.equal(one.owned_by, "espalier");
  },

  async completion() {
    const asked = { model: backbone, prompt, max_tokens: 16, temperature: 0 };
    const whole = await client.completions.create(asked);
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await all(await client.completions.create({ ...asked, ...options }));

    const told = chunks.filter((chunk) => chunk.choices.length);
    assert.equal(told.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
    assert.ok(told.length > 2);
    assert.deepEqual(chunks.at(-1).usage, whole.usage);
    assert.equal(told.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
  },

  async chat() {
    const asked = { model: task, messages, max_completion_tokens: 16, temperature: 0 };
    const whole = await client.chat.completions.create(asked);
    const chunks = await all(await client.chat.completions.create({ ...asked, stream: true }));
    const runner = client.chat.completions.stream(asked); // the SDK's own accumulator
    const accumulated = await runner.finalContent();

    assert.equal(whole.choices[0].message.role, "assistant");
    assert.ok(whole.choices[0].message.content);
    const told = chunks.filter((chunk) => chunk.choices.length);
    assert.equal(told.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
    assert.equal(accumulated, whole.choices[0].message.content);
  },

  async choicesAndLogprobs() {
    const asked = { model: task, messages, max_completion_tokens: 8, n: 3, seed: 1, logprobs: true, top_logprobs: 2 };
    const answer = await client.chat.completions.create(asked);

    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(answer.choices.every((choice) => choice.logprobs.content[0].top_logprobs.length === 2));
  },

  async composition() {
    const espalier = { adapters: { [`${task}@1`]: 0.75, [other]: 0.25 } };
    const answer = await client.chat.completions.create({ model: backbone, messages, max_tokens: 4, espalier });
    const chunks = await all(await client.completions.create({ model: task, prompt, max_tokens: 4, stream: true }));

    const weights = answer.espalier.composition.adapters.map((one) => [one.name, one.weight]);
    assert.deepEqual(Object.fromEntries(weights), { [task]: 0.75, [other]: 0.25 });
    assert.ok(chunks.at(-1).espalier.composition.adapters.length >= 1);
  },

  async embeddings() {
    const input = ["a dog", "the big red ball"];
    const usual = await client.embeddings.create({ model: task, input }); // base64, unless asked for floats
    const floats = await client.embeddings.create({ model: task, input, encoding_format: "float" });

    assert.equal(usual.data.length, 2);
    usual.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - floats.data[0].embedding[i]) < 1e-6));
  },

  async errors() {
    const create = (changes) => client.chat.completions.create({ model: backbone, messages, max_tokens: 2, ...changes });
    const unknown = await create({ model: "nobody" }).catch((error) => error);

    assert.ok(unknown instanceof OpenAI.NotFoundError);
    assert.equal(unknown.code, "model_not_found");
    assert.ok(unknown.requestID);
    await assert.rejects(create({ temperature: 9 }), OpenAI.BadRequestError);
    await assert.rejects(create({ temprature: 1 }), OpenAI.BadRequestError);
    await assert.rejects(create({ model: "nobody", stream: true }), OpenAI.NotFoundError);
  },

  async keys() {
    const { CLIENT_ADMIN_KEY: admin, CLIENT_TASK_KEY: limited } = process.env;
    const call = (apiKey, model) => client.withOptions({ apiKey }).completions.create({ model, prompt, max_tokens: 1 });
    if (admin) {
      await assert.rejects(call("esp-wrong", backbone), OpenAI.AuthenticationError);
      await assert.rejects(call(admin, backbone), OpenAI.PermissionDeniedError);
    }
    if (limited) await assert.rejects(call(limited, other), OpenAI.PermissionDeniedError);
  },

  async timeoutEndsTheWork() {
    const before = await gauge("generated_tokens_total");
    const hasty = client.withOptions({ timeout: 100, maxRetries: 0 });

    await assert.rejects(hasty.completions.create({ model: task, prompt, n: 64, ...long }), OpenAI.APIConnectionTimeoutError);

    await idle();
    assert.ok((await gauge("generated_tokens_total")) - before < 64 * 400);
  },

  async abortEndsTheWork() {
    const before = await gauge("generated_tokens_total");
    const controller = new AbortController();
    const { signal } = controller;
    const pending = client.completions.create({ model: task, prompt, n: 64, ...long }, { signal });
    setTimeout(() => controller.abort(), 100);
    await assert.rejects(pending, OpenAI.APIUserAbortError);

    const stream = await client.completions.create({ model: task, prompt, n: 64, stream: true, ...long });
    for await (const chunk of stream) {
      assert.ok(chunk.choices.length);
      break; // leaving the loop aborts the request
    }

    await idle();
    assert.ok((await gauge("generated_tokens_total")) - before < 64 * 400);
  },

  async fullQueueIsToldAndWaitedFor() {
    const baseURL = process.env.CLIENT_SMALL_QUEUE_URL;
    if (!baseURL) return;
    const statuses = [];
    const counting = async (...call) => {
      const response = await fetch(...call);
      statuses.push(response.status);
      return response;
    };
    const small = new OpenAI({ ...server, baseURL, maxRetries: 0, fetch: counting });
    const asked = { model: task, prompt, max_tokens: 4 };

    const blocker = await small.completions.create({ model: task, prompt: Array(64).fill(prompt), stream: true, ...long });
    await blocker[Symbol.asyncIterator]().next();
    const refused = await small.completions.create(asked).catch((error) => error);
    setTimeout(() => blocker.controller.abort(), 300);
    const answer = await small.withOptions({ maxRetries: 5 }).completions.create(asked);

    assert.ok(refused instanceof OpenAI.RateLimitError);
    assert.ok(Number(refused.headers.get("retry-after")) >= 1);
    assert.ok(answer.choices.length);
    assert.ok(statuses.filter((status) => status === 429).length >= 2, "it tried again by itself");
    await idle(baseURL);
  },

  async manyAtOnce() {
    const asks = Array.from({ length: 32 }, (_, number) => ({
      model: [backbone, task, other, `${task}@1`][number % 4],
      prompt: prompt + " animal and".repeat(number % 7),
      max_tokens: 8 + (number % 9),
      temperature: 0,
    }));
    const together = await Promise.all(asks.map((ask) => client.completions.create(ask)));

    for (const [number, ask] of asks.entries()) {
      const alone = await client.completions.create(ask);
      assert.equal(together[number].choices[0].text, alone.choices[0].text);
    }
  },
};

for (const [name, check] of Object.entries(checks)) {
  const start = Date.now();
  process.stdout.write(`${name} … `);
  await check();
  console.log(`${((Date.now() - start) / 1000).toFixed(2)} s`);
}
await idle();
