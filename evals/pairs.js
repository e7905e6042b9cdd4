// The script of the page of `evaluate.py pairs`. It puts texts in by textContent only: they come from models.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STORE = `plaintune pairs ${data.page}`;
  const SIDES = ["left", "right"];
  const SCALES = ["accuracy", "helpfulness", "fluency"];
  const CHOICES = ["left", "tie", "right"];
  // Characters of an answer that are shown at first: more than anybody reads, and a browser lays them out at once.
  const SHOWN = 50000;

  const element = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");

  // What is saved. judgements: {pair, from 0 on: {choice, ratings: {left, right: {scale: 1 to 5}},
  // success: {left, right: true or false}, at: when it was last changed, in milliseconds}}.
  let state = emptyState();
  let index = 0;
  let stored = true;
  let exported = true;

  function emptyState() {
    return { rater: "", advance: false, judgements: {} };
  }

  // ---- what is saved ----

  // Returns a judgement with nothing in it that is not allowed, or null: it may come from a file.
  function checkedJudgement(found) {
    if (typeof found !== "object" || found === null) return null;
    const judgement = { choice: null, ratings: { left: {}, right: {} }, success: {}, at: 0 };
    if (CHOICES.includes(found.choice)) judgement.choice = found.choice;
    if (Number.isFinite(found.at)) judgement.at = found.at;
    for (const side of SIDES) {
      for (const scale of SCALES) {
        const value = found.ratings?.[side]?.[scale];
        if (Number.isInteger(value) && value >= 1 && value <= 5) judgement.ratings[side][scale] = value;
      }
      const success = found.success?.[side];
      if (typeof success === "boolean") judgement.success[side] = success;
    }
    return judgement;
  }

  function isPair(key) {
    return Number.isInteger(key) && key >= 0 && key < data.pairs.length;
  }

  function load(text) {
    state = emptyState();
    let saved = null;
    try {
      saved = JSON.parse(text);
    } catch {
      warn("What this browser had saved of this page is damaged and can't be read.");
    }
    if (typeof saved !== "object" || saved === null) return;
    if (typeof saved.rater === "string") state.rater = saved.rater;
    state.advance = saved.advance === true;
    for (const [key, found] of Object.entries(saved.judgements ?? {})) {
      const judgement = checkedJudgement(found);
      if (judgement && isPair(Number(key))) state.judgements[key] = judgement;
    }
  }

  function save() {
    exported = false;
    if (!stored) return;
    try {
      localStorage.setItem(STORE, JSON.stringify(state));
    } catch {
      notStored();
    }
  }

  function notStored() {
    stored = false;
    warn("This browser saves nothing for this page. Export your judgements before you close or reload it.");
  }

  // ---- messages ----

  function say(text) {
    element("message").textContent = text;
    element("message").hidden = text === "";
  }

  function warn(text) {
    element("warning").textContent = text;
    element("warning").hidden = false;
  }

  // ---- what is shown ----

  function make(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // A text of a model: of a very long one the beginning, and a button that shows the rest.
  function textBlock(text) {
    const block = make("div", "block");
    const body = make("div", "text");
    body.dir = "auto";
    block.append(body);
    if (text.trim() === "") {
      body.classList.add("empty");
      body.textContent = text === "" ? "(empty)" : "(only spaces or line ends)";
    } else if (text.length <= SHOWN) {
      body.textContent = text;
    } else {
      // Not between the halves of a character of two.
      const half = /[\uD800-\uDBFF]/.test(text[SHOWN - 1]) ? 1 : 0;
      body.textContent = text.slice(0, SHOWN - half);
      const more = make("button", "more", `Show all ${number.format(text.length)} characters`);
      more.type = "button";
      more.addEventListener("click", () => {
        body.textContent = text;
        more.remove();
      });
      block.append(more);
    }
    return block;
  }

  function answerCard(side) {
    const card = element(side);
    const answer = data.pairs[index][side];
    const title = make("h3", "", side === "left" ? "Answer 1" : "Answer 2");
    const parts = [title, textBlock(answer.text)];
    if (answer.was_cut) parts.push(make("p", "quiet", "The model was stopped here: the answer reached the longest length."));
    const table = make("div", "ratings");
    for (const scale of SCALES) {
      const buttons = [1, 2, 3, 4, 5].map((value) => {
        const button = make("button", "", String(value));
        button.dataset.value = value;
        button.addEventListener("click", () => rate(side, scale, value));
        return button;
      });
      table.append(...ratingRow(side, scale, scale[0].toUpperCase() + scale.slice(1), buttons));
    }
    const yesNo = [true, false].map((value) => {
      const button = make("button", "", value ? "Yes" : "No");
      button.dataset.value = value;
      button.addEventListener("click", () => succeed(side, value));
      return button;
    });
    const label = make("span", "", "Did what was asked ");
    label.append(make("kbd", "", side === "left" ? "S" : "D"));
    table.append(...ratingRow(side, "success", label, yesNo));
    parts.push(table);
    card.replaceChildren(...parts);
  }

  function ratingRow(side, name, label, buttons) {
    const title = make("span", "label");
    title.append(label);
    title.id = `${side}-${name}`;
    const group = make("div", "group");
    group.setAttribute("role", "group");
    group.setAttribute("aria-labelledby", title.id);
    for (const button of buttons) {
      button.type = "button";
      button.dataset.side = side;
      button.dataset.scale = name;
    }
    group.append(...buttons);
    return [title, group];
  }

  function showPair() {
    const pair = data.pairs[index];
    element("number").textContent = `Pair ${number.format(index + 1)} of ${number.format(data.pairs.length)}`;
    const turns = pair.question.map((turn) => {
      const box = make("div", "turn");
      box.append(make("div", "role", turn.role), textBlock(turn.text));
      return box;
    });
    element("question").replaceChildren(...turns);
    element("question").scrollTop = 0;
    const reference = element("reference");
    reference.hidden = pair.reference === null;
    reference.open = false;
    element("reference-text").textContent = pair.reference ?? "";
    SIDES.forEach(answerCard);
    element("back").disabled = index === 0;
    element("next").disabled = index === data.pairs.length - 1;
    showJudgement();
  }

  function showJudgement() {
    const judgement = state.judgements[index];
    for (const button of document.querySelectorAll("[data-choice]")) {
      press(button, judgement?.choice === button.dataset.choice);
    }
    for (const button of document.querySelectorAll("[data-scale]")) {
      const { side, scale, value } = button.dataset;
      const given = scale === "success" ? judgement?.success[side] : judgement?.ratings[side][scale];
      press(button, String(given) === value);
    }
    for (const side of SIDES) element(side).classList.toggle("chosen", judgement?.choice === side);
    element("clear").hidden = judgement === undefined;
    const judged = numJudged();
    const all = data.pairs.length;
    element("progress").max = all;
    element("progress").value = judged;
    element("count").textContent = `${number.format(judged)} of ${number.format(all)} judged`;
    element("export").classList.toggle("primary", judged === all);
    if (element("rater") !== document.activeElement) element("rater").value = state.rater;
    element("advance").checked = state.advance;
  }

  function press(button, isPressed) {
    button.setAttribute("aria-pressed", isPressed);
  }

  function numJudged() {
    return Object.values(state.judgements).filter((judgement) => judgement.choice).length;
  }

  // ---- what the rater does ----

  function change(work) {
    const judgement = state.judgements[index] ?? checkedJudgement({});
    work(judgement);
    judgement.at = Date.now();
    state.judgements[index] = judgement;
    save();
    say("");
    showJudgement();
  }

  function choose(choice) {
    change((judgement) => (judgement.choice = choice));
    if (numJudged() === data.pairs.length) {
      say("All pairs are judged. Press Export, and send the file to whoever asked you.");
    } else if (state.advance) {
      go(index + 1);
    }
  }

  function rate(side, scale, value) {
    change((judgement) => {
      const given = judgement.ratings[side];
      if (given[scale] === value) delete given[scale];
      else given[scale] = value;
    });
  }

  function succeed(side, value) {
    change((judgement) => {
      if (judgement.success[side] === value) delete judgement.success[side];
      else judgement.success[side] = value;
    });
  }

  function clearPair() {
    delete state.judgements[index];
    save();
    say("");
    showJudgement();
  }

  function go(to) {
    if (to < 0 || to >= data.pairs.length) return;
    index = to;
    say("");
    showPair();
    scrollTo(0, 0);
  }

  function nextUnjudged() {
    const all = data.pairs.length;
    for (let step = 1; step <= all; step++) {
      const at = (index + step) % all;
      if (!state.judgements[at]?.choice) return go(at);
    }
    say("All pairs are judged.");
  }

  function restart() {
    const question = "Delete all judgements of this page in this browser? Export them first if they are of use.";
    if (Object.keys(state.judgements).length && !confirm(question)) return;
    state = { ...emptyState(), advance: state.advance };
    save();
    exported = true;
    go(0);
    say("Everything is deleted. Type your name and begin.");
    element("rater").focus();
  }

  // ---- files ----

  function exportFile() {
    const rater = state.rater.trim();
    if (!rater) {
      say("Type your name first: judgements of several people are told apart by it.");
      element("rater").focus();
      return;
    }
    const keys = Object.keys(state.judgements).map(Number).sort((a, b) => a - b);
    const file = {
      format: data.format,
      page: data.page,
      key: data.key,
      pairs: data.pairs.length,
      rater,
      exported: new Date().toISOString(),
      judgements: keys.map((key) => ({ pair: key + 1, ...state.judgements[key] })),
    };
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1) + "\n"], { type: "application/json" }));
    link.download = `judgements-${rater.replace(/[^\p{L}\p{N}_-]+/gu, "_")}-${data.page.slice(0, 8)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    exported = true;
    const judged = numJudged();
    const missing = data.pairs.length - judged;
    const rest = missing ? ` ${number.format(missing)} pairs are not judged yet.` : "";
    say(`${number.format(judged)} judgements saved as ${link.download}.${rest}`);
  }

  async function importFile(input) {
    const file = input.files[0];
    if (!file) return;
    let found = null;
    try {
      found = JSON.parse(await file.text());
    } catch {
      // Said below.
    }
    // So that the same file can be chosen again.
    input.value = "";
    if (found?.format !== data.format || !Array.isArray(found.judgements)) {
      return say(`${file.name} holds no judgements that this page can read.`);
    }
    if (found.page !== data.page) {
      return say(`${file.name} holds judgements of another page (${found.page}; this one is ${data.page}).`);
    }
    const rater = String(found.rater ?? "");
    const isOther = state.rater.trim() && state.rater.trim() !== rater;
    if (isOther && Object.keys(state.judgements).length) {
      return say(`${file.name} is by ${rater}, and this page holds judgements by ${state.rater}: export those, start over, and import again.`);
    }
    state.rater = rater;
    let taken = 0;
    let kept = 0;
    for (const each of found.judgements) {
      const judgement = checkedJudgement(each);
      const key = each?.pair - 1;
      if (!judgement || !isPair(key)) continue;
      const own = state.judgements[key];
      if (own && own.at > judgement.at) {
        kept += 1;
      } else {
        state.judgements[key] = judgement;
        taken += 1;
      }
    }
    save();
    showPair();
    const rest = kept ? ` ${number.format(kept)} that were changed here later are kept.` : "";
    say(`${number.format(taken)} judgements imported from ${file.name}.${rest}`);
  }

  // ---- keys ----

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target.matches("input[type=text]")) {
      if (event.key === "Enter") event.target.blur();
      return;
    }
    const toggle = (side) => succeed(side, state.judgements[index]?.success[side] !== true);
    const keys = {
      1: () => choose("left"),
      2: () => choose("right"),
      t: () => choose("tie"),
      s: () => toggle("left"),
      d: () => toggle("right"),
      n: nextUnjudged,
      arrowright: () => go(index + 1),
      arrowleft: () => go(index - 1),
    };
    const work = Object.hasOwn(keys, event.key.toLowerCase()) ? keys[event.key.toLowerCase()] : null;
    if (!work || event.repeat) return;
    event.preventDefault();
    work();
  }

  function begin() {
    try {
      const text = localStorage.getItem(STORE);
      if (text !== null) load(text);
      // A browser may let a page read, and not write.
      localStorage.setItem(STORE, JSON.stringify(state));
    } catch {
      notStored();
    }
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", () => choose(button.dataset.choice));
    }
    element("back").addEventListener("click", () => go(index - 1));
    element("next").addEventListener("click", () => go(index + 1));
    element("clear").addEventListener("click", clearPair);
    element("restart").addEventListener("click", restart);
    element("export").addEventListener("click", exportFile);
    element("import").addEventListener("click", () => element("file").click());
    element("file").addEventListener("change", (event) => importFile(event.target));
    element("rater").addEventListener("input", (event) => {
      state.rater = event.target.value;
      save();
    });
    element("advance").addEventListener("change", (event) => {
      state.advance = event.target.checked;
      save();
    });
    document.addEventListener("keydown", onKey);
    // Another tab with this page has changed something: without this, the next change here would undo it.
    addEventListener("storage", (event) => {
      if (event.key !== STORE || event.newValue === null) return;
      load(event.newValue);
      showJudgement();
    });
    addEventListener("beforeunload", (event) => {
      if (!stored && !exported) event.preventDefault();
    });
    const first = data.pairs.findIndex((_, key) => !state.judgements[key]?.choice);
    index = first < 0 ? 0 : first;
    element("help").open = Object.keys(state.judgements).length === 0;
    showPair();
  }

  begin();
})();
