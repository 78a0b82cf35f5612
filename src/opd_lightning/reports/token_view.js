"use strict";
// The token view: one section of a page. Everything that models wrote goes through textContent, never through HTML.
(() => {
  const view = document.currentScript.closest(".token-view");
  const data = JSON.parse(view.querySelector("script[type='application/json']").textContent);
  const find = (name) => view.querySelector(`[data-tv='${name}']`);
  const WORST = 50;

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const show = (value) => {
    if (value === null || value === undefined) return "unknown";
    return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3));
  };
  const percent = (logProb) => {
    const share = 100 * Math.exp(logProb);
    return share < 0.01 ? "< 0.01 %" : `${share >= 10 ? share.toFixed(1) : share.toFixed(2)} %`;
  };
  const visible = (text) => {
    if (text === "") return "(nothing)";
    return (text.trim() ? text : text.replace(/ /g, "␣")).replace(/\n/g, "↵").replace(/\t/g, "⇥");
  };
  const valuesOf = (look) => look.values[state.quantity.name] ?? null;
  const valueAt = (look, place) => valuesOf(look)?.[place] ?? null;
  const size = (value) => (value === null ? -1 : Math.abs(value));

  // ------------------------------------------------------------------------------------------------------- selection

  const known = data.quantities.filter((quantity) => quantity.known);
  const points = data.points; // {run, step, label}
  const state = { quantity: known[0] ?? data.quantities[0], shown: [], worst: [], at: -1, active: null };
  const cards = new Map(); // element -> {looks, body, isDrawn}

  const fill = (select, options) => {
    for (const [value, text] of options) {
      const option = make("option", "", text);
      option.value = value;
      select.append(option);
    }
  };
  fill(find("quantity"), data.quantities.map((each) => [each.name, each.known ? each.label : `${each.label} (unknown)`]));
  fill(find("first"), [...points.map((point, place) => [place, point.label]), ["", "every step"]]);
  fill(find("second"), [["", "nothing"], ...points.map((point, place) => [place, point.label])]);
  fill(find("source"), [["", "all"], ...data.sources.map((name) => [name, name])]);
  find("quantity").value = state.quantity.name;
  find("first").value = String(data.start[0]);
  find("second").value = data.start[1] === null ? "" : String(data.start[1]);

  const numberIn = (name, otherwise) => {
    const text = find(name).value;
    return text === "" ? otherwise : Number(text);
  };
  const passes = (look) => {
    const answer = data.answers[look.answer];
    const wanted = find("reward").value;
    const length = answer.tokens.length;
    return (
      (wanted === "" ||
        (wanted === "unmarked" ? look.reward === null : look.reward !== null && look.reward >= 1 === (wanted === "right"))) &&
      (find("source").value === "" || answer.source === find("source").value) &&
      length >= numberIn("shortest", 0) && length <= numberIn("longest", Infinity)
    );
  };
  const isInside = (place) => place >= numberIn("from", 0) && place <= numberIn("to", Infinity);
  const mean = (look) => {
    const values = (valuesOf(look) ?? []).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  };
  const orders = {
    divergence: (a, b) => size(mean(b[0])) - size(mean(a[0])),
    reward: (a, b) => (a[0].reward ?? 2) - (b[0].reward ?? 2),
    length: (a, b) => data.answers[b[0].answer].tokens.length - data.answers[a[0].answer].tokens.length,
    recorded: () => 0,
  };

  const select = () => {
    const [first, second] = ["first", "second"].map((name) => find(name).value);
    const kind = find("kind").value;
    const isAt = (look, place) => place === "" || look.point === Number(place);
    const at = (place) => data.looks.filter((look) => isAt(look, place) && (!kind || look.kinds.includes(kind)));
    const others = second === "" ? null : new Map(at(second).map((look) => [look.answer, look]));
    return at(first)
      .filter(passes)
      .map((look) => (others ? [look, others.get(look.answer)] : [look]))
      .filter((looks) => looks.every(Boolean))
      .sort(orders[find("order").value]);
  };

  // --------------------------------------------------------------------------------------------------------- drawing

  const colourClass = (value) => {
    if (value === null) return "unknown";
    const { bins, diverging } = state.quantity;
    const level = bins.filter((limit) => Math.abs(value) >= limit).length;
    return diverging && level ? (value < 0 ? "n" : "p") + level : "q" + level;
  };
  const className = (look, place) => {
    const answer = data.answers[look.answer];
    const wrote = !answer.others.includes(place);
    const special = data.vocabulary[answer.tokens[place]].special;
    const parts = ["tok", wrote ? colourClass(valueAt(look, place)) : "others"];
    if (special) parts.push("special");
    if (!isInside(place)) parts.push("outside");
    return parts.join(" ");
  };
  const drawTokens = (look) => {
    const block = make("div", "answer");
    block.look = look;
    data.answers[look.answer].tokens.forEach((index, place) => {
      const { text } = data.vocabulary[index];
      const token = make("span", className(look, place), visible(text));
      token.tabIndex = -1;
      block.append(token);
      if (text.includes("\n")) block.append(document.createElement("br"));
    });
    if (block.firstChild) block.firstChild.tabIndex = 0;
    return block;
  };
  const describe = (look) => {
    const answer = data.answers[look.answer];
    const marked = look.reward === null ? "no mark" : `reward ${show(look.reward)}`;
    const average = mean(look);
    return [
      points[look.point].label,
      marked,
      `${answer.tokens.length} tokens${look.truncated ? ", cut" : ""}`,
      `${state.quantity.label} ${show(average)} a token`,
    ].join(" · ");
  };
  const prompts = (answer) => {
    const details = make("details");
    const same = answer.teacherPrompt === answer.prompt;
    details.append(make("summary", "", "Prompt, as rendered"));
    details.append(make("p", "faint", same ? "Both templates make the same prompt." : "For the student (the teacher reads this one too):"));
    details.append(make("pre", "", data.prompts[answer.prompt]));
    if (answer.teacherPrompt === null) {
      details.append(make("p", "faint", "The teacher's own template is not known here."));
    } else if (!same) {
      details.append(make("p", "faint", "As the teacher's own template would make it:"));
      details.append(make("pre", "", data.prompts[answer.teacherPrompt]));
    }
    if (answer.reference !== null) details.append(make("p", "", `Reference: ${answer.reference}`));
    return details;
  };
  const drawBody = (card) => {
    const kept = cards.get(card);
    if (kept.isDrawn) return;
    kept.isDrawn = true;
    kept.body.replaceChildren(
      ...kept.looks.map((look) => {
        const column = make("div", "look");
        column.append(make("p", "faint about", describe(look)), drawTokens(look));
        return column;
      }),
    );
    kept.body.style.minHeight = "";
  };
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawBody(entry.target)),
    { rootMargin: "600px" },
  );
  const drawCards = () => {
    watcher.disconnect();
    cards.clear();
    const columns = find("second").value === "" ? 1 : 2;
    const drawn = state.shown.map((looks) => {
      const answer = data.answers[looks[0].answer];
      const card = make("article");
      card.append(make("h3", "", answer.uid), prompts(answer));
      const body = make("div", columns === 2 ? "looks two" : "looks");
      body.style.minHeight = `${2 + Math.ceil((answer.tokens.length * columns) / 25)}rem`;
      card.append(body);
      cards.set(card, { looks, body, isDrawn: false });
      return card;
    });
    find("answers").replaceChildren(...drawn);
    drawn.forEach((card) => watcher.observe(card));
    const total = state.shown.reduce((sum, looks) => sum + data.answers[looks[0].answer].tokens.length, 0);
    find("count").textContent = state.shown.length
      ? `${state.shown.length} answers, ${total} tokens`
      : "No answer passes: the two sides share none, or the filters leave none.";
  };
  const recolour = () => {
    for (const block of find("answers").querySelectorAll(".answer")) {
      let place = 0;
      for (const token of block.children) if (token.tagName === "SPAN") token.className = className(block.look, place++);
      block.previousSibling.textContent = describe(block.look);
    }
  };
  const drawLegend = () => {
    const { bins, diverging, unit, note } = state.quantity;
    const range = (level) =>
      level === 0 ? `< ${bins[0]}` : level === bins.length ? `≥ ${bins[level - 1]}` : `${bins[level - 1]} to ${bins[level]}`;
    const levels = bins.map((_, place) => place + 1);
    const swatches = diverging
      ? [...levels.map((level) => ["n" + level, "−" + bins[level - 1]]).reverse(), ["q0", "0"], ...levels.map((level) => ["p" + level, "+" + bins[level - 1]])]
      : [0, ...levels].map((level) => ["q" + level, range(level)]);
    const legend = find("legend");
    legend.replaceChildren(...swatches.map(([name, text]) => make("span", `tok ${name}`, text)));
    const known = state.quantity.known ? "" : " Unknown in these records: this teacher or this training does not give it.";
    legend.append(make("span", "faint", ` ${unit}: ${note}${known}`));
  };

  // ------------------------------------------------------------------------------------------------------ the worst

  const findWorst = () => {
    const found = [];
    for (const [look] of state.shown) {
      (valuesOf(look) ?? []).forEach((value, place) => {
        if (value !== null && isInside(place)) found.push([look, place, value]);
      });
    }
    found.sort((a, b) => size(b[2]) - size(a[2]));
    state.worst = found.slice(0, WORST);
    state.at = -1;
    find("worst").replaceChildren(
      ...state.worst.map(([look, place, value], at) => {
        const answer = data.answers[look.answer];
        const item = make("li");
        const button = make("button", "", "");
        button.append(
          make("span", `tok ${colourClass(value)}`, visible(data.vocabulary[answer.tokens[place]].text)),
          make("span", "", ` ${show(value)} `),
          make("span", "faint", `${answer.uid}, token ${place}, ${points[look.point].label}`),
        );
        button.type = "button";
        button.dataset.at = at;
        item.append(button);
        return item;
      }),
    );
  };
  const go = (at) => {
    if (!state.worst.length) return;
    state.at = (at + state.worst.length) % state.worst.length;
    const [look, place] = state.worst[state.at];
    for (const [card, kept] of cards) {
      if (kept.looks[0] !== look) continue;
      drawBody(card);
      focus(card.querySelector(".answer").querySelectorAll("span")[place]);
    }
    find("worst").querySelectorAll("button").forEach((button, number) => {
      if (number === state.at) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
  };
  const focus = (token) => {
    token.scrollIntoView({ block: "center" });
    token.focus({ preventScroll: true });
  };

  // ------------------------------------------------------------------------------------------------------ one token

  const list = (look, who, place) => {
    const top = look[who];
    if (!top) return make("p", "faint", "unknown: these scores hold no list");
    const ids = top.tokens[place];
    if (!ids) return make("p", "faint", "none: the student did not write this token");
    const other = new Set(look[who === "student" ? "teacher" : "student"]?.tokens[place] ?? []);
    const sampled = data.answers[look.answer].tokens[place];
    const table = make("table", "likeliest");
    ids.forEach((index, rank) => {
      const row = make("tr", index === sampled ? "sampled" : "");
      const name = make("th", "", visible(data.vocabulary[index].text));
      name.scope = "row";
      const meter = make("td", "meter");
      const bar = make("i");
      bar.style.width = `${100 * Math.exp(top.logProbs[place][rank])}%`;
      meter.append(bar);
      row.append(name, make("td", "", percent(top.logProbs[place][rank])), meter, make("td", "", other.has(index) ? "both" : ""));
      table.append(row);
    });
    return table;
  };
  const inspect = (token) => {
    const block = token.parentNode;
    if (state.active) state.active.classList.remove("active");
    state.active = token;
    token.classList.add("active");
    const look = block.look;
    const place = [...block.querySelectorAll("span")].indexOf(token);
    const index = data.answers[look.answer].tokens[place];
    const { id, text, special } = data.vocabulary[index];
    const other = [...cards.values()].find((kept) => kept.looks.includes(look)).looks.filter((each) => each !== look);
    const looks = [look, ...other];
    const values = make("table");
    const head = make("tr");
    head.append(make("td"), ...looks.map((each) => make("th", "", points[each.point].label)));
    values.append(head);
    for (const { name, label } of data.facts) {
      const row = make("tr");
      const title = make("th", "", label);
      title.scope = "row";
      row.append(title, ...looks.map((each) => make("td", "", show(each.values[name]?.[place] ?? null))));
      values.append(row);
    }
    find("detail").replaceChildren(
      make("h3", "", visible(text)),
      make("p", "faint", `id ${id} · position ${place}${special ? " · special" : ""} · at ${points[look.point].label}`),
      make("h4", "", "Student expected"),
      list(look, "student", place),
      make("h4", "", "Teacher expected"),
      list(look, "teacher", place),
      make("h4", "", "Measured, nats or shares"),
      values,
    );
  };

  // --------------------------------------------------------------------------------------------------------- events

  const refresh = () => {
    state.shown = select();
    drawCards();
    findWorst();
  };
  find("quantity").addEventListener("change", () => {
    state.quantity = data.quantities.find((each) => each.name === find("quantity").value);
    drawLegend();
    if (find("order").value === "divergence") refresh();
    else { recolour(); findWorst(); }
  });
  for (const name of ["first", "second", "kind", "reward", "source", "order", "shortest", "longest"]) {
    find(name).addEventListener("change", refresh);
  }
  for (const name of ["from", "to"]) find(name).addEventListener("change", () => { recolour(); findWorst(); });
  const tokenOf = (event) => (event.target.closest ? event.target.closest(".answer .tok") : null);
  for (const name of ["mouseover", "focusin"]) {
    find("answers").addEventListener(name, (event) => {
      const token = tokenOf(event);
      if (token && token !== state.active) inspect(token);
    });
  }
  find("worst").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) go(Number(button.dataset.at));
  });
  find("previous").addEventListener("click", () => go(state.at < 0 ? 0 : state.at - 1));
  find("next").addEventListener("click", () => go(state.at + 1));
  document.addEventListener("keydown", (event) => { // a click beside the tokens leaves the focus with the whole page
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "n") go(state.at + 1);
    else if (event.key === "p") go(state.at < 0 ? 0 : state.at - 1);
    else {
      const token = tokenOf(event);
      if (!token) return;
      const all = [...token.parentNode.querySelectorAll("span")];
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const place = Math.min(all.length - 1, Math.max(0, all.indexOf(token) + moves[event.key]));
      token.tabIndex = -1;
      all[place].tabIndex = 0;
      all[place].scrollIntoView({ block: "nearest" });
      all[place].focus({ preventScroll: true });
    }
  });
  drawLegend();
  refresh();
})();
