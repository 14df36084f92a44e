// Opens report pages in headless Chromium: screenshots at phone and desktop width, console messages, axe-core findings,
// and whether a page scrolls sideways. Exits 1 where a page logs an error or axe-core finds something serious.
//
//   apt-get install chromium && npm install axe-core puppeteer-core     (in any folder; run this from there)
//   node pages.mjs OUT PAGE.html [PAGE.html ...]
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(join(process.cwd(), "x.js")));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf-8");
const widths = { phone: 390, desktop: 1280 };
const [out, ...pages] = process.argv.slice(2);
mkdirSync(out, { recursive: true });

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
let bad = 0;
for (const path of pages) {
  const name = `${basename(dirname(resolve(path)))}-${basename(path, ".html")}`;
  for (const [device, width] of Object.entries(widths)) {
    const page = await browser.newPage();
    const errors = [];
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("request", (request) => /^(file|data):/.test(request.url()) || errors.push(`request to ${request.url()}`));
    await page.setBypassCSP(false);
    await page.setViewport({ width, height: 900 });
    await page.goto(pathToFileURL(resolve(path)).href);
    await page.screenshot({ path: join(out, `${name}-${device}.png`) });
    const logged = errors.length;
    const session = await page.createCDPSession(); // axe-core runs beside the page, whose policy forbids scripts
    await session.send("Page.setBypassCSP", { enabled: true });
    await page.reload();
    await page.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
    await page.screenshot({ path: join(out, `${name}-${device}-full.png`), fullPage: true });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    await page.evaluate(axe);
    const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    const serious = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
    const minor = found.violations.length - serious.length;
    bad += serious.length + logged + (wide > 0);
    console.log(`${name} ${device}: ${logged} errors, ${serious.length} serious, ${minor} minor, ${Math.max(wide, 0)} px too wide`);
    errors.slice(0, 3).forEach((text) => console.log(`  console: ${text}`));
    for (const one of found.violations)
      console.log(`  ${one.impact} ${one.id}: ${one.help} (${one.nodes.length}, e.g. ${one.nodes[0].html.slice(0, 110)})`);
    await page.close();
  }
}
await browser.close();
process.exit(bad ? 1 : 0);
