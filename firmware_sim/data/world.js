// Moves the time-lapse: a scrubber, a play button, states that can be singled out, and what is under the pointer.
"use strict";
(() => {
  const source = document.getElementById("lapse-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const byId = (id) => document.getElementById(id);
  const play = byId("play"), scrub = byId("scrub"), clock = byId("clock"), strip = byId("strip");
  const playhead = byId("playhead"), cells = strip.querySelector(".cells");
  const dots = [...document.querySelectorAll("#lapse .sky circle")];
  const buttons = [...document.querySelectorAll("#lapse .states button")];
  const rows = data.rows.map((row) => row.replace(/(\D)(\d+)/g, (_, letter, count) => letter.repeat(count)));
  const columns = data.opened.length, lapseMilliseconds = 24000;
  let column = data.at, only = "", started = null;

  function when(at) {
    const minutes = Math.round(at * data.seconds / 60), two = (number) => String(number).padStart(2, "0");
    return `day ${Math.floor(minutes / 1440) + 1}, ${two(Math.floor(minutes / 60) % 24)}:${two(minutes % 60)}`;
  }

  function show(at) {
    column = Math.max(0, Math.min(columns - 1, at));
    const counts = {};
    for (const row of rows) counts[row[column]] = (counts[row[column]] || 0) + 1;
    for (const dot of dots) {
      const letter = rows[dot.dataset.n][column];
      dot.setAttribute("class", data.classes[letter] + (only && only !== letter ? " dim" : ""));
    }
    for (const button of buttons) button.querySelector("b").textContent = counts[button.dataset.state] || 0;
    scrub.value = column;
    clock.textContent = when(column);
    playhead.style.left = `${100 * (column + .5) / columns}%`;
    const told = buttons.filter((button) => counts[button.dataset.state])
      .map((button) => `${counts[button.dataset.state]} ${data.states[button.dataset.state]}`);
    scrub.setAttribute("aria-valuetext", `${when(column)}: ${told.join("; ")}`);
  }

  function single(letter) {
    only = only === letter ? "" : letter;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.state === only));
    for (const path of cells.querySelectorAll("path")) {
      path.classList.toggle("dim", only !== "" && !path.classList.contains(data.classes[only]));
    }
    show(column);
  }

  function stop() {
    started = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play the time-lapse");
  }

  function step(now) {
    if (started === null) return;
    const at = Math.floor((now - started) / lapseMilliseconds * columns);
    if (at >= columns) return stop();
    if (at !== column) show(at);
    requestAnimationFrame(step);
  }

  play.addEventListener("click", () => {
    if (started !== null) return stop();
    const from = column >= columns - 1 ? 0 : column;
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Stop the time-lapse");
    started = performance.now() - from / columns * lapseMilliseconds;
    requestAnimationFrame(step);
  });
  scrub.addEventListener("input", () => { stop(); show(Number(scrub.value)); });
  for (const button of buttons) {
    button.disabled = false;
    button.addEventListener("click", () => single(button.dataset.state));
  }

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  strip.append(tip);
  function under(event) {
    const box = cells.getBoundingClientRect();
    const at = Math.floor((event.clientX - box.left) / box.width * columns);
    const y = (event.clientY - box.top) / box.height * data.height;
    const found = data.tops.find(([, top]) => y >= top && y < top + 1);
    return {at, member: found && at >= 0 && at < columns ? found[0] : null};
  }
  strip.addEventListener("pointermove", (event) => {
    const {at, member} = under(event);
    tip.hidden = member === null;
    if (member === null) return;
    tip.textContent = `${data.about[member]} · ${when(at)} · ${data.states[rows[member][at]]}`;
    const box = strip.getBoundingClientRect(), half = tip.offsetWidth / 2;
    tip.style.left = `${Math.max(half, Math.min(box.width - half, event.clientX - box.left))}px`;
    tip.style.top = `${event.clientY - box.top}px`;
  });
  strip.addEventListener("pointerleave", () => { tip.hidden = true; });
  strip.addEventListener("click", (event) => { stop(); show(under(event).at); });

  byId("controls").hidden = false;
  show(data.at);
})();
