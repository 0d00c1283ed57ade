// The installed Chromium, driven by Playwright. Nothing is downloaded.

import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const PLACES = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

/** @returns {string|undefined} the program, if there is one */
export const findChromium = () => PLACES.find((path) => path && existsSync(path));

/** As root, as in a container, Chromium refuses to start with its sandbox. */
export function startChromium() {
  return chromium.launch({ executablePath: findChromium(), args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
}

export const WIDE = { viewport: { width: 1280, height: 800 } };
export const PHONE = { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true };

/** Waits until every passage of the open document is in the index. */
export async function waitUntilRead(page) {
  await page.waitForFunction(() => / read in /.test(document.getElementById("status").textContent), null, { timeout: 0 });
}
