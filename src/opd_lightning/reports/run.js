"use strict";
// Values under the pointer, or under a cursor moved with the arrow keys.
for (const panel of document.querySelectorAll(".panel")) {
  const { prefix, box, limits, curves } = JSON.parse(panel.dataset.points);
  const [drawing, cursor, output] = [".drawing", ".cursor", "output"].map((each) => panel.querySelector(each));
  const steps = [...new Set(curves.flatMap((curve) => curve.xs))].sort((a, b) => a - b);
  let place = -1;

  const isShown = (curve) => curve.run === null || !hiddenRuns.has(curve.run);
  const nearest = (values, x) => values.reduce((best, each, i) => (Math.abs(each - x) < Math.abs(values[best] - x) ? i : best), 0);
  const format = (value) => String(Number(value.toPrecision(4)));

  function show(next) {
    place = Math.max(0, Math.min(steps.length - 1, next));
    const x = steps[place];
    const words = curves.filter(isShown).flatMap((curve) => {
      const i = curve.xs.indexOf(x);
      return i < 0 ? [] : [`${curve.label} ${format(curve.ys[i])}`];
    });
    output.textContent = `${x}: ${words.join(" · ")}`; // steps are shown whole: 12345 is not 12350
    const share = (x - limits[0]) / (limits[1] - limits[0]);
    Object.assign(cursor.style, {
      left: `${100 * (box[0] + share * (box[1] - box[0]))}%`,
      top: `${100 * box[2]}%`,
      height: `${100 * (box[3] - box[2])}%`,
    });
    cursor.hidden = false;
  }
  function leave() {
    cursor.hidden = true;
    output.textContent = "";
    place = -1;
  }
  drawing.addEventListener("pointermove", (event) => {
    const frame = drawing.getBoundingClientRect();
    const share = ((event.clientX - frame.left) / frame.width - box[0]) / (box[1] - box[0]);
    show(nearest(steps, limits[0] + share * (limits[1] - limits[0])));
  });
  drawing.addEventListener("pointerleave", leave);
  panel.addEventListener("blur", leave);
  panel.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: place + 1, ArrowLeft: place < 0 ? steps.length - 1 : place - 1, Home: 0, End: steps.length - 1 };
    if (event.target === panel && event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}

// Runs that are not shown.
var hiddenRuns = new Set();
for (const box of document.querySelectorAll("input[data-run]")) {
  box.checked = true; // some browsers remember
  box.addEventListener("change", () => {
    const run = Number(box.dataset.run);
    box.checked ? hiddenRuns.delete(run) : hiddenRuns.add(run);
    for (const panel of document.querySelectorAll(".panel")) {
      const { prefix, curves } = JSON.parse(panel.dataset.points);
      curves.forEach((curve, i) => {
        for (const part of panel.querySelectorAll(`[id^="${prefix}-curve-${i}-"]`))
          part.classList.toggle("hidden-run", curve.run !== null && hiddenRuns.has(curve.run));
      });
    }
  });
}

// Tables sorted by a column; once more turns them around.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const isDown = head.getAttribute("aria-sort") === "ascending";
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    const key = (row) => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [parseFloat(a), parseFloat(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || a.localeCompare(b);
      return x - y;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => (isDown ? -1 : 1) * compare(key(a), key(b)));
    table.tBodies[0].append(...rows);
  }));
}
