// A table whose rows can be chosen and whose columns sort it. Texts are data: textContent only.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const visible = (text) => String(text).replaceAll(HIDDEN, code);
const COLOUR = /^#[0-9a-fA-F]{6}$/;

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

function render({ model, el }) {
  el.classList.add("mdw");
  const frame = make("div", "mdw-rows mdw-scroll");
  const table = make("table", "mdw-table");
  table.tabIndex = 0;
  table.setAttribute("role", "grid");
  const head = make("thead"), body = make("tbody"), note = make("div", "mdw-note");
  table.append(head, body);
  frame.append(table);
  el.append(frame, note);
  let lines = [];

  function heading(name, column) {
    const cell = make("th", model.get("numeric").includes(column) ? "num" : "");
    const [by, falling] = model.get("sorted");
    const button = make("button", "sort", visible(name) + (by === column ? (falling ? " ↓" : " ↑") : ""));
    button.type = "button";
    button.title = `sort by ${visible(name)}`;
    button.addEventListener("click", () => model.send({ kind: "sort", column }));
    cell.setAttribute("aria-sort", by === column ? (falling ? "descending" : "ascending") : "none");
    cell.append(button);
    return cell;
  }

  function line(cells, index) {
    const row = make("tr");
    row.setAttribute("role", "row");
    if (model.get("tickable")) row.append(box(cells, index));
    cells.forEach((value, column) => {
      const cell = make("td", model.get("numeric").includes(column) ? "num" : "");
      const [text, colour] = Array.isArray(value) ? value : [value, ""];
      if (COLOUR.test(colour)) {
        const dot = make("span", "mdw-dot");
        dot.style.background = colour;
        cell.append(dot);
      }
      cell.append(make("span", "", visible(text)));
      row.append(cell);
    });
    row.addEventListener("click", () => choose(index));
    return row;
  }

  function box(cells, index) {
    const cell = make("td", "tick"), input = make("input");
    input.type = "checkbox";
    input.tabIndex = -1; // the space key ticks the chosen row
    const [first] = [cells[0]].flat();
    input.setAttribute("aria-label", `tick ${visible(first)}`);
    input.addEventListener("change", () => tick(index, input.checked));
    cell.append(input);
    return cell;
  }

  function tick(index, on) {
    const ids = model.get("ids");
    if (index >= 0 && index < ids.length) model.send({ kind: "tick", id: ids[index], on });
  }

  function check() {
    const ids = model.get("ids"), ticked = model.get("ticked");
    if (model.get("tickable")) lines.forEach((row, index) => {
      row.querySelector("input").checked = ticked.includes(ids[index]);
    });
  }

  function choose(index) {
    const ids = model.get("ids");
    if (index >= 0 && index < ids.length) model.send({ kind: "choose", id: ids[index] });
  }

  function draw() {
    const top = make("tr");
    if (model.get("tickable")) top.append(make("th", "tick", "✓"));
    top.append(...model.get("headings").map(heading));
    head.replaceChildren(top);
    lines = model.get("rows").map(line);
    body.replaceChildren(...lines);
    note.textContent = visible(model.get("note"));
    note.hidden = !note.textContent;
    table.setAttribute("aria-label", visible(model.get("label")));
    mark();
    check();
  }

  function mark() {
    const at = model.get("ids").indexOf(model.get("selected"));
    lines.forEach((row, index) => {
      row.classList.toggle("selected", index === at);
      row.setAttribute("aria-selected", String(index === at));
    });
    if (lines[at]) { // rows that come with the choice are drawn in the next frame
      const box = frame.getBoundingClientRect(), row = lines[at].getBoundingClientRect();
      const under = head.getBoundingClientRect().height;
      if (row.top < box.top + under) frame.scrollTop -= box.top + under - row.top;
      if (row.bottom > box.bottom) frame.scrollTop += row.bottom - box.bottom;
    }
  }

  table.addEventListener("keydown", (event) => {
    const chosen = model.get("ids").indexOf(model.get("selected"));
    if (event.key === " " && model.get("tickable") && chosen >= 0) {
      event.preventDefault();
      tick(chosen, !model.get("ticked").includes(model.get("selected")));
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = model.get("ids").indexOf(model.get("selected"));
    choose(at < 0 ? 0 : Math.min(Math.max(at + step, 0), lines.length - 1));
  });
  const redraw = ["headings", "rows", "numeric", "sorted", "note", "label"];
  let waiting = 0;
  const later = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); };
  redraw.forEach((name) => model.on(`change:${name}`, later));
  model.on("change:selected", mark);
  model.on("change:ticked", check);
  draw();
  return () => {
    cancelAnimationFrame(waiting);
    redraw.forEach((name) => model.off(`change:${name}`, later));
    model.off("change:selected", mark);
    model.off("change:ticked", check);
  };
}

export default { render };
