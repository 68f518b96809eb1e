// Answers side by side: rows of samples or turns, a column for each model. Model text is data: it is
// only ever set as textContent, or as the value of a text field.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const TONES = { base: "var(--mdw-base)", finetuned: "var(--mdw-finetuned)",
  edited: "var(--mdw-edited)", random: "var(--mdw-random)",
  good: "var(--mdw-edited)", bad: "var(--mdw-finetuned)" };
const ACTIONS = {
  edit: ["Edit", "edit"],
  regenerate: ["Regenerate", "answer again, with the next seed"],
  share: ["Use everywhere", "make this column's answers up to here those of all columns"],
  prompt: ["As prompt", "make the conversation before this answer the prompt of the other panels"],
  remove: ["Remove", "remove this turn and all after it"],
};

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

const tone = (name) => TONES[name] ?? "#777777";
const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
export const visible = (text) =>
  text.replaceAll(HIDDEN, (c) => (c === "\n" || c === "\t" ? c : code(c)));

function plainButton(label, title, act) {
  const button = make("button", "mdw-plain", label);
  button.type = "button";
  button.title = title;
  button.addEventListener("click", act);
  return button;
}

// Put pieces of streamed text in their places; doing it twice changes nothing. A piece is
// [row, column, index among the cell's parts, text].
export function splice(rows, pieces) {
  for (const [r, c, start, text] of pieces) {
    const cell = rows[r]?.cells?.[c];
    if (!cell) continue;
    cell.parts = [...(cell.parts ?? []).slice(0, start), ["", text]];
    cell.state = "streaming";
  }
}

function update(rows, message) {
  if (message.kind === "text") splice(rows, message.pieces);
  if (message.kind === "cell" && rows[message.row]?.cells?.[message.column]) {
    rows[message.row].cells[message.column] = message.cell;
  }
}

function initialize({ model }) { // a view that is made later must find what came before
  model.on("msg:custom", (message) => update(model.get("rows"), message));
}

function render({ model, el }) {
  el.classList.add("mdw");
  const root = make("div", "mdw-answers");
  const list = make("div", "list");
  root.append(list);
  el.append(root);
  let boxes = [];

  const rows = () => model.get("rows");
  const act = (action, row, column, text) =>
    model.send({ kind: "act", action, row, column, ...(text === undefined ? {} : { text }) });

  function badges(several) {
    return (several ?? []).map(([text, kind, title]) => {
      const badge = make("span", "mdw-badge");
      badge.style.borderColor = tone(kind);
      const dot = make("span", "mdw-dot");
      dot.style.background = tone(kind);
      badge.append(dot, make("span", "", visible(text)));
      if (title) badge.title = visible(title);
      return badge;
    });
  }

  function words(parts) {
    const pieces = document.createDocumentFragment();
    for (const [mark, text] of parts ?? []) {
      pieces.append(make(mark ? "mark" : "span", "", visible(text)));
    }
    return pieces;
  }

  function actions(names, r, c, what, edit) {
    const bar = make("span", "acts");
    for (const name of names ?? []) {
      const [label, title] = ACTIONS[name] ?? [name, name];
      const button = plainButton(label, title, () =>
        name === "edit" ? edit() : act(name, r, c));
      button.setAttribute("aria-label", `${label}: ${what}`);
      bar.append(button);
    }
    return bar;
  }

  function editing(frame, raw, what, save) {
    const form = make("div", "editor");
    const field = make("textarea");
    field.value = raw;
    field.rows = Math.min(12, Math.max(3, Math.ceil(raw.length / 40)));
    field.setAttribute("aria-label", `new text: ${what}`);
    const done = () => { form.remove(); frame.classList.remove("editing"); };
    const keep = () => { done(); save(field.value); };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep();
      if (event.key === "Escape") done();
    });
    const bar = make("span", "acts shown");
    bar.append(plainButton("Save", "Ctrl+Enter", keep), plainButton("Cancel", "Escape", done));
    form.append(field, bar);
    frame.classList.add("editing");
    frame.append(form);
    field.focus();
  }

  const raw = (cell) => (cell.parts ?? []).map((part) => part[1]).join("");

  function drawCell(r, c) {
    const row = rows()[r], cell = row.cells[c], column = model.get("columns")[c];
    const frame = boxes[r][c];
    const name = `${column.title}, ${row.title || `row ${r + 1}`}`;
    frame.className = `cell ${cell.state ?? ""}`;
    frame.setAttribute("aria-label", visible(name));
    frame.setAttribute("aria-busy", String(cell.state === "streaming"));
    frame.style.setProperty("--tone", tone(column.kind));
    const head = make("div", "head");
    head.append(make("span", "name", visible(column.title)));
    if (column.note) head.append(make("span", "sub", visible(column.note)));
    const text = make("div", "words");
    text.dir = "auto";
    text.append(words(cell.parts));
    if (!raw(cell) && cell.state !== "streaming") {
      text.append(make("span", "blank", cell.state === "waiting" ? "waiting …" : cell.blank || "no text"));
    }
    const foot = make("div", "foot");
    foot.append(make("span", "sub", visible(cell.note ?? "")), ...badges(cell.badges));
    const edit = () =>
      editing(frame, raw(cell), name, (changed) => act("edit", r, c, changed));
    if (cell.actions?.length) foot.append(actions(cell.actions, r, c, visible(name), edit));
    foot.hidden = !foot.textContent;
    frame.replaceChildren(head, text, foot);
  }

  function drawRow(r) {
    const row = rows()[r];
    const part = make("section", "row");
    if (row.title) part.append(make("div", "mdw-name", visible(row.title)));
    if (row.text !== undefined && row.text !== null) {
      const bubble = make("div", "said");
      const text = make("div", "words", visible(row.text));
      text.dir = "auto";
      const what = row.title || `row ${r + 1}`;
      const edit = () => editing(bubble, row.text, what, (changed) => act("edit", r, -1, changed));
      const foot = make("div", "foot");
      foot.append(make("span", "sub", visible(row.note ?? "")),
        actions(row.actions, r, -1, what, edit));
      bubble.append(text, foot);
      part.append(bubble);
    }
    const grid = make("div", "grid");
    grid.dataset.n = String(row.cells.length);
    boxes[r] = row.cells.map(() => make("article", "cell"));
    grid.append(...boxes[r]);
    part.append(grid);
    list.append(part);
    row.cells.forEach((_, c) => drawCell(r, c));
  }

  function build() {
    list.replaceChildren();
    boxes = [];
    rows().forEach((_, r) => drawRow(r));
    if (!rows().length) list.append(make("div", "blank", model.get("blank")));
  }

  function custom(message) {
    if (message.kind === "cell") {
      update(rows(), message);
      if (boxes[message.row]?.[message.column]) drawCell(message.row, message.column);
    }
    if (message.kind === "text") stream(message.pieces);
  }

  function stream(pieces) {
    splice(rows(), pieces);
    for (const [r, c, start] of pieces) {
      const frame = boxes[r]?.[c];
      if (!frame) continue;
      const box = frame.querySelector(".words");
      if (!frame.classList.contains("streaming") || box.childElementCount < start) {
        drawCell(r, c);
        continue;
      }
      while (box.childElementCount > start) box.lastElementChild.remove();
      box.append(words(rows()[r].cells[c].parts.slice(start)));
    }
  }

  const stop = (event) => event.stopPropagation(); // Lab's shortcuts must not fire
  root.addEventListener("keydown", stop);
  let field = null;

  function compose() { // the box in which the next message is written
    root.querySelector(".compose")?.remove();
    field = null;
    if (!model.get("ask")) return;
    const form = make("div", "compose");
    field = make("textarea");
    field.rows = 2;
    field.placeholder = model.get("ask");
    field.value = model.get("draft");
    field.setAttribute("aria-label", "message");
    const send = () => {
      const text = field.value;
      if (!text.trim()) return;
      field.value = "";
      remember();
      act("send", rows().length, -1, text);
    };
    const remember = () => { model.set("draft", field.value); model.save_changes(); };
    field.addEventListener("change", remember);
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    const button = plainButton("Send", "Enter; Shift+Enter begins a new line", send);
    button.classList.add("primary");
    form.append(field, button);
    root.append(form);
  }
  const redraft = () => { if (field && field.value !== model.get("draft")) field.value = model.get("draft"); };

  const rebuilt = "change:rows change:columns change:blank";
  model.on(rebuilt, build);
  model.on("change:ask", compose);
  model.on("change:draft", redraft);
  model.on("msg:custom", custom);
  build();
  compose();
  return () => {
    model.off(rebuilt, build);
    model.off("change:ask", compose);
    model.off("change:draft", redraft);
    model.off("msg:custom", custom);
  };
}

export default { initialize, render };
