// What the RunPod client for JavaScript sees of a server: a JSON object, on the last line of standard output.
import runpodSdk from "runpod-sdk";

const { RAYLORA_TEST_URL: baseUrl, RAYLORA_TEST_KEY: apiKey } = process.env;
const endpoint = runpodSdk(apiKey, { baseUrl }).endpoint("local");
const picture = { prompt: "a large red star", num_inference_steps: 2, width: 64, height: 64 };
const long = { ...picture, prompt: "held: a large red star", num_inference_steps: 400, num_images: 4 };
const soon = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const result = {};

result.runSync = await endpoint.runSync({ input: picture }, 60000);

const job = await endpoint.run({ input: { ...picture, num_inference_steps: 4, wait: true } }, 10000);
result.run = job;
result.stream = [];
for await (const chunk of endpoint.stream(job.id)) result.stream.push(chunk.output);
result.status = await endpoint.status(job.id, 10000);

// Three at a time are more than the replica makes, so that one stays in the queue.
const busy = [];
for (let index = 0; index < 3; index += 1) {
  busy.push(await endpoint.run({ input: { ...long, seed: index, wait: true } }, 10000));
}
result.health = await endpoint.health(10000);
result.purge = await endpoint.purgeQueue(10000);
result.cancelled = [];
for (const { id } of busy) result.cancelled.push(await endpoint.cancel(id, 10000));

// Longer than the client's first wait: it goes on by /status-sync until somebody cancels the job.
const waiting = endpoint.runSync({ input: { ...long, seed: 9 } }, 4000);
await soon(4500);
const running = await endpoint.runSync({ input: { type: "processes", status: "running" } }, 60000);
for (const { job_id } of running.output.processes) await endpoint.cancel(job_id, 10000);
result.pastFirstWait = await waiting;

process.stdout.write(`\n${JSON.stringify(result)}\n`);
