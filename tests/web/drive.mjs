// Drives the page in headless Chromium: node drive.mjs CHROMIUM PLAYWRIGHT URL JOB, where JOB is JSON. One JSON line back.
import { createRequire } from "node:module";

const [chromium, playwright, url, job] = process.argv.slice(2);
const { folder, key, ids, count, chat, settings, options } = JSON.parse(job);
const browser = await createRequire(import.meta.url)(playwright).chromium.launch({
  executablePath: chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
});
const page = await browser.newPage();
const requests = [];
const errors = [];
page.on("request", (request) => requests.push(request.url()));
page.on("pageerror", (error) => errors.push(error.message));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
await page.goto(url);
const status = () => page.locator("#status").textContent();
const settled = async () => {
  await page.waitForFunction(() => !document.getElementById("folder").disabled, null, { timeout: 300000 });
  return status();
};
await page.waitForFunction(() => document.getElementById("status").textContent);
const found = { isolated: await page.evaluate(() => globalThis.crossOriginIsolated) };
if (key) await page.locator("meta[name=edgekd-public-key]").evaluate((meta, key) => (meta.content = key), key);
await page.locator("#folder").setInputFiles(folder);
await page.waitForTimeout(50);
found.loaded = await settled();
if (chat && !(await page.locator("#send").isDisabled())) {
  await page.locator("#text").fill(chat);
  await page.locator("#send").click();
  const long = () => document.querySelector("#chat .assistant:last-child")?.textContent.length > 150;
  await page.waitForFunction(() => document.getElementById("stop").disabled === false);
  await Promise.race([page.waitForFunction(long, null, { timeout: 120000 }), settled()]);
  if (await page.locator("#stop").isEnabled()) await page.locator("#stop").click();
  found.chatted = await settled();
  found.answer = await page.locator("#chat .assistant").last().textContent();
}
found.used = await page.evaluate(
  async ([ids, count, chat, settings, options]) => {
    const app = await import("./app.js");
    const list = [...document.getElementById("folder").files];
    const files = new Map(list.map((file) => [file.webkitRelativePath.split("/").slice(1).join("/"), file]));
    try {
      const model = await app.load(files, options);
      const tokens = ids && (await model.engine.greedy(ids, count));
      const prompt = chat && app.prompt(model, [{ role: "user", content: chat }]).ids;
      return { tokens, prompt, bench: settings && (await app.bench(model, settings)), test: model.test, threads: model.engine.threads };
    } catch (error) {
      return { refused: error.message, code: error.code };
    }
  },
  [ids, count, chat, settings, options ?? {}],
);
// The page must not reach any other host, even when it is told to.
found.escaped = await page.evaluate(() => fetch("https://example.org/").then(() => true, () => false));
console.log(JSON.stringify({ ...found, requests, errors }));
await browser.close();
