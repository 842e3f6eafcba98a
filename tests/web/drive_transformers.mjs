// Runs transformers.html in headless Chromium: node drive_transformers.mjs CHROMIUM PLAYWRIGHT URL JOB. One JSON line back.
import { createRequire } from "node:module";

const [chromium, playwright, url, job] = process.argv.slice(2);
const { ids, count } = JSON.parse(job);
const browser = await createRequire(import.meta.url)(playwright).chromium.launch({
  executablePath: chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
});
const page = await browser.newPage();
await page.goto(`${url}transformers.html`);
await page.waitForFunction(() => globalThis.ready, null, { timeout: 60000 });
console.log(JSON.stringify(await page.evaluate(([ids, count]) => globalThis.run(ids, count), [ids, count])));
await browser.close();
