"use strict";
// Uses the page as a reader does, and notes what does not work.
const wrong = [];
const check = (what, holds) => { if (!holds) wrong.push(what); };
const key = (name) => chart().dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const chart = () => document.getElementById("chart");
const detail = () => document.getElementById("detail").textContent;
const bars = () => chart().querySelectorAll("rect").length;
const view = () => chart().dataset.view.split("..").map(Number);
const width = () => view()[1] - view()[0];
try {
  check("the timeline is hidden", !document.getElementById("timeline").hidden);
  check("the page is wider than the window", document.documentElement.scrollWidth <= window.innerWidth);
  check("something was loaded", performance.getEntriesByType("resource").length === 0);
  check("the story is empty", document.querySelectorAll("#story li").length > 3);
  check("no command replays it", document.getElementById("replay").textContent.startsWith("cargo tapsim replay "));
  const letters = [...chart().querySelectorAll("text[data-mark]")].map((text) => text.firstChild.data);
  check(`a mark is missing in ${letters}`, [..."CFX"].every((letter) => letters.includes(letter)));
  check("a crash has no map", document.querySelector(".images .cells .lost") !== null);

  const whole = width();
  chart().focus();
  check("the timeline takes no focus", document.activeElement === chart());
  key("+");
  check("+ does not zoom in", width() < whole);
  const before = view()[0];
  key("ArrowRight");
  check("the arrow does not move", view()[0] > before);
  key("0");
  check("0 does not show the whole run", width() === whole);
  document.getElementById("zoom-in").click();
  check("the button does not zoom in", width() < whole);
  document.getElementById("whole").click();

  key("n");
  check("n goes to no mark", /^[CFDX] \(/.test(detail()));
  const first = detail();
  key("n");
  check("n stays at the first mark", detail() !== first);
  key("p");
  check("p does not go back", detail() === first);
  key("ArrowDown");
  check("the arrow goes to no request", detail().includes("began at"));
  check("the request is not marked", chart().querySelectorAll("rect.selected").length === 1);

  const some = bars();
  const head = chart().querySelector("button[aria-expanded=false]");
  check("nothing is folded", head !== null);
  head.click();
  check("a track does not unfold", bars() > some);
  chart().querySelector("button[aria-expanded=true]").click();
  check("a track does not fold", bars() === some);
  key("f");
  check("f does not unfold", bars() > some && document.getElementById("fold").getAttribute("aria-pressed") === "true");
  key("f");
  check("f does not fold", bars() === some);
  key("i");
  check("i does not show idle time", document.getElementById("idle").getAttribute("aria-pressed") === "true");
  const more = document.querySelector("#timeline details");
  more.querySelector("summary").click();
  check("the list of keys does not open", more.open);
} catch (error) {
  wrong.push(String(error));
}
const result = document.createElement("pre");
result.id = "result";
result.textContent = wrong.concat(window.thrown || []).join("\n") || "fine";
document.body.append(result);
