"use strict";
// The timeline of a run. The data is in the page; everything is drawn again whenever the view changes.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const detail = document.getElementById("detail");
  const rows = data.rows, marks = data.marks;
  const ROW = 14, TOP = 3, ROWS_MAX = 40;
  const LETTER = { crash: "C", fault: "F", decision: "D", broken: "X" };
  let tracks = [], unfolded = new Set(), view = [0, 1], selected = null, at = -1, idle = false;

  const clamp = (ns) => Math.min(Math.max(ns, 0), data.end);
  const micros = (ns) => `${Math.floor(ns / 1000)}.${String(Math.floor(ns % 1000)).padStart(3, "0")}`;
  const element = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const endOf = (row) => (row.end === null ? data.end : row.end);

  // Positions: time, with idle gaps cut to a bounded length unless they are asked for.
  let times = [], places = [];
  function scale() {
    const all = new Set([0, data.end]);
    rows.forEach((row) => all.add(row.begin).add(endOf(row)));
    marks.forEach((mark) => all.add(mark.at));
    times = [...all].sort((a, b) => a - b);
    const gaps = times.slice(1).map((t, i) => t - times[i]).sort((a, b) => a - b);
    const usual = gaps.length ? gaps[Math.floor(gaps.length * 0.75)] : 1;
    const most = idle ? Infinity : Math.max(4 * usual, 1000);
    places = [0];
    for (let i = 1; i < times.length; i++) places.push(places[i - 1] + Math.min(times[i] - times[i - 1], most));
  }
  function search(list, value) {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] <= value) low = middle; else high = middle;
    }
    return low;
  }
  function convert(from, to, value) {
    if (from.length < 2) return 0;
    const i = search(from, value), width = from[i + 1] - from[i];
    return to[i] + (width > 0 ? ((value - from[i]) / width) * (to[i + 1] - to[i]) : 0);
  }
  const place = (ns) => convert(times, places, ns);
  const time = (x) => convert(places, times, x);
  const total = () => Math.max(places[places.length - 1] || 0, 1);

  // The tracks in the order of the stack, each with its work, and the events of processes.
  function collect() {
    const byName = new Map();
    const track = (name, layer) => {
      if (!byName.has(name)) byName.set(name, { name, layer, rows: [], events: [] });
      return byName.get(name);
    };
    rows.forEach((row) => track(row.track, row.layer).rows.push(row));
    data.events.forEach((event) => track(event.who, 2).events.push(event));
    tracks = [...byName.values()].sort((a, b) => a.layer - b.layer || (a.name < b.name ? -1 : 1));
  }

  // Puts work that overlaps into rows of its own.
  function pack(list) {
    const ends = [];
    return list.map((row) => {
      let line = ends.findIndex((end) => end <= row.begin);
      if (line < 0) line = ends.length < ROWS_MAX ? ends.length : ROWS_MAX - 1;
      ends[line] = Math.max(endOf(row), row.begin + 1);
      return [row, line];
    });
  }

  function x(ns, width) {
    return ((place(ns) - view[0]) / (view[1] - view[0])) * width;
  }

  function drawMarks(svg, width, height, letters) {
    let free = -Infinity;
    marks.forEach((mark, i) => {
      const left = x(mark.at, width);
      if (left < -20 || left > width + 20) return;
      const line = element("line", { x1: left, x2: left, y1: letters ? 14 : 0, y2: height, class: `mark ${mark.kind}` });
      svg.append(line);
      if (!letters) return;
      // Marks at one time stand side by side, of a crowd only the first ones.
      const start = Math.max(left - 3, free);
      if (start > left + 40) return;
      free = start + 8;
      const letter = element("text", { x: start, y: 11, "data-mark": i }, LETTER[mark.kind]);
      letter.append(element("title", {}, `${micros(mark.at)} ${mark.text}`));
      svg.append(letter);
    });
  }

  function lane(label, isButton, height, draw) {
    const line = document.createElement("div");
    line.className = "track";
    const head = document.createElement(isButton ? "button" : "span");
    head.textContent = label;
    const svg = element("svg", { height, "aria-hidden": "true" });
    line.append(head, svg);
    chart.append(line);
    draw(svg, svg.getBoundingClientRect().width || 600, head);
  }

  function drawAxis(svg, width) {
    drawMarks(svg, width, 34, true);
    const steps = Math.max(2, Math.floor(width / 130));
    for (let i = 0; i < steps; i++) {
      const ns = clamp(time(view[0] + ((view[1] - view[0]) * i) / steps));
      svg.append(element("text", { x: (width * i) / steps, y: 30 }, micros(ns)));
    }
  }

  function drawTrack(track) {
    const open = unfolded.has(track.name);
    const shown = open ? track.rows : track.rows.filter((row) => row.matters);
    const packed = pack(shown);
    const lines = packed.reduce((most, [, line]) => Math.max(most, line + 1), 1);
    const events = track.events.length ? ROW : 0;
    const folded = track.rows.length - shown.length;
    const count = track.rows.length ? ` (${shown.length} of ${track.rows.length})` : "";
    const canFold = track.rows.some((row) => !row.matters);
    const sign = canFold ? (open ? "\u25be " : "\u25b8 ") : "";
    lane(`${sign}${track.name}${count}`, canFold, (track.rows.length ? lines * ROW : 0) + events + 2 * TOP, (svg, width, head) => {
      if (canFold) {
        head.setAttribute("aria-expanded", String(open));
        head.title = folded ? `${folded} requests are folded` : "all requests are shown";
        head.addEventListener("click", () => {
          if (open) unfolded.delete(track.name); else unfolded.add(track.name);
          draw();
          const again = [...chart.querySelectorAll("button")].find((b) => b.textContent.includes(track.name));
          if (again) again.focus();
        });
      }
      drawMarks(svg, width, 4000, false);
      for (const [row, line] of packed) {
        const left = x(row.begin, width), right = x(endOf(row), width);
        if (right < 0 || left > width) continue;
        const bar = element("rect", { x: left, y: TOP + line * ROW, width: Math.max(right - left, 3), height: ROW - 3 });
        bar.setAttribute("class", ["bar", row.matters && "matters", row.failed && "failed", row.end === null && "open",
          row === selected && "selected"].filter(Boolean).join(" "));
        bar.append(element("title", {}, words(row)));
        bar.addEventListener("click", () => select(row));
        svg.append(bar);
        if (right - left > 60) {
          const text = element("text", { x: Math.max(left, 0) + 4, y: TOP + line * ROW + 9, "pointer-events": "none" });
          text.textContent = row.name.slice(0, Math.floor((right - Math.max(left, 0)) / 7));
          if (row.matters && !row.failed) text.style.fill = "var(--paper)";
          svg.append(text);
        }
      }
      const base = track.rows.length ? lines * ROW : 0;
      for (const event of track.events) {
        const left = x(event.at, width);
        if (left < 0 || left > width) continue;
        const tick = element("line", { x1: left, x2: left, y1: TOP + base, y2: TOP + base + ROW - 3, class: "tick" });
        tick.append(element("title", {}, `${micros(event.at)} ${event.text}`));
        svg.append(tick);
      }
    });
  }

  function words(row) {
    const end = row.end === null ? "never ended" : `ended at ${micros(row.end)} (${row.outcome})`;
    return `${row.name}, ${row.track}: began at ${micros(row.begin)}, ${end}`;
  }

  function draw() {
    chart.replaceChildren();
    lane("microseconds", false, 36, drawAxis);
    tracks.forEach(drawTrack);
    chart.dataset.view = view.map((x) => Math.round(clamp(time(x)))).join("..");
  }

  function show(from, to) {
    const width = Math.min(Math.max(to - from, 20), total() * 1.04);
    const left = Math.min(Math.max(from, -total() * 0.02), total() * 1.02 - width);
    view = [left, left + width];
    draw();
  }
  const zoom = (factor, middle = (view[0] + view[1]) / 2) =>
    show(middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor);
  const pan = (part) => {
    const by = (view[1] - view[0]) * part;
    show(view[0] + by, view[1] + by);
  };
  const whole = () => show(-total() * 0.02, total() * 1.02);

  function reveal(ns) {
    const middle = place(ns), half = (view[1] - view[0]) / 2;
    if (middle < view[0] || middle > view[1]) show(middle - half, middle + half); else draw();
  }
  function select(row) {
    selected = row;
    detail.textContent = words(row);
    reveal(row.begin);
  }
  // The next mark, or the previous one.
  function jump(step) {
    if (!marks.length) return;
    at = at < 0 && step < 0 ? marks.length - 1 : (at + step + marks.length) % marks.length;
    const mark = marks[at];
    detail.textContent = `${LETTER[mark.kind]} (${mark.kind}) at ${micros(mark.at)}: ${mark.text}`;
    reveal(mark.at);
  }
  // The next request that is shown, or the previous one.
  function step(by) {
    const shown = tracks.flatMap((t) => t.rows.filter((row) => row.matters || unfolded.has(t.name)));
    if (!shown.length) return;
    const now = shown.indexOf(selected);
    select(shown[now < 0 ? (by > 0 ? 0 : shown.length - 1) : (now + by + shown.length) % shown.length]);
  }
  function foldAll() {
    const any = tracks.some((t) => t.rows.some((row) => !row.matters) && !unfolded.has(t.name));
    unfolded = new Set(any ? tracks.map((t) => t.name) : []);
    document.getElementById("fold").setAttribute("aria-pressed", String(any));
    draw();
  }
  function toggleIdle() {
    const [from, to] = view.map(time);
    idle = !idle;
    document.getElementById("idle").setAttribute("aria-pressed", String(idle));
    scale();
    show(place(from), place(to));
  }

  const actions = {
    "zoom-in": () => zoom(0.5), "zoom-out": () => zoom(2), left: () => pan(-0.25), right: () => pan(0.25), whole,
    next: () => jump(1), previous: () => jump(-1), fold: foldAll, idle: toggleIdle,
  };
  for (const id in actions) document.getElementById(id).addEventListener("click", actions[id]);
  const keys = {
    "+": "zoom-in", "=": "zoom-in", "-": "zoom-out", ArrowLeft: "left", ArrowRight: "right", 0: "whole", Home: "whole",
    n: "next", p: "previous", f: "fold", i: "idle",
  };
  chart.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowDown") step(1);
    else if (event.key === "ArrowUp") step(-1);
    else if (keys[event.key]) actions[keys[event.key]]();
    else return;
    event.preventDefault();
  });
  chart.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    const box = chart.querySelector("svg").getBoundingClientRect();
    const part = (event.clientX - box.left) / Math.max(box.width, 1);
    zoom(event.deltaY > 0 ? 1.25 : 0.8, view[0] + part * (view[1] - view[0]));
    event.preventDefault();
  }, { passive: false });
  let grip = null;
  chart.addEventListener("pointerdown", (event) => { grip = { from: event.clientX, view: [...view] }; });
  chart.addEventListener("pointermove", (event) => {
    if (!grip || !event.buttons) return;
    const width = chart.querySelector("svg").getBoundingClientRect().width;
    const by = ((grip.from - event.clientX) / Math.max(width, 1)) * (grip.view[1] - grip.view[0]);
    if (Math.abs(grip.from - event.clientX) > 4) show(grip.view[0] + by, grip.view[1] + by);
  });
  window.addEventListener("pointerup", () => { grip = null; });
  window.addEventListener("resize", draw);

  document.getElementById("timeline").hidden = false;
  scale();
  collect();
  whole();
})();
