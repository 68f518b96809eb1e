// Token heat in one to three columns. Model text is data: it is only ever set as textContent.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const KEYS = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End",
  "PageUp", "PageDown", "Enter", " "]);
const TONES = { base: "var(--mdw-base)", finetuned: "var(--mdw-finetuned)",
  edited: "var(--mdw-edited)", random: "var(--mdw-random)" };

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
export function visible(text) {
  return text.replaceAll(HIDDEN, (c) => (c === "\n" ? "↵\n" : c === "\t" ? "⇥" : code(c))) || "∅";
}
const alone = (text) => visible(text).replaceAll("\n", "").replaceAll(" ", "␣");

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  const shown = Math.abs(value) >= 100 ? value.toFixed(0)
    : Math.abs(value) >= 0.005 ? value.toFixed(2) : value.toPrecision(2);
  return shown.replace("-", "−");
}

// Put a piece of streamed tokens in its place; doing it twice changes nothing.
export function splice(columns, message) {
  const column = columns[message.column];
  if (!column) return false;
  const put = (list, more) => list.splice(message.start, list.length, ...more);
  put(column.tokens, message.tokens);
  for (const key of ["marks", "notes"]) {
    if (message[key]) put((column[key] ??= []), message[key]);
  }
  for (const key of ["values", "top"]) {
    for (const [name, more] of Object.entries(message[key] ?? {})) {
      put(((column[key] ??= {})[name] ??= []), more);
    }
  }
  column.streaming = message.streaming;
  return true;
}

function initialize({ model }) { // a view that is made later must find what came before
  model.on("msg:custom", (message) => {
    if (message.kind === "append") splice(model.get("columns"), message);
  });
}

function render({ model, el }) {
  el.classList.add("mdw");
  const root = make("div", "mdw-pair");
  const cols = make("div", "cols");
  const detail = make("div", "mdw-detail");
  const foot = make("div", "foot");
  detail.setAttribute("aria-live", "polite");
  root.append(cols, detail, foot);
  el.append(root);
  const card = make("div", "mdw mdw-card-hover mdw-detail");
  card.setAttribute("popover", "manual");
  card.setAttribute("role", "tooltip");

  let spans = [];   // [column][token]
  let boxes = [];   // the listbox of each column
  let active = [0, 0];
  let hovered = null;

  const columns = () => model.get("columns");
  const names = (metric) => model.get("labels")[metric] ?? [metric, metric];
  const valueOf = (c, i, metric = model.get("metric")) => columns()[c]?.values?.[metric]?.[i];

  function describe(c, i) {
    const metric = model.get("metric");
    const value = valueOf(c, i);
    const token = alone(columns()[c].tokens[i]);
    return value === undefined || value === null ? token
      : `${token} ${names(metric)[0]} ${number(value)}`;
  }

  function shown() { // the value of full colour, and whether there are negative ones
    const all = columns().flatMap((column) => column.values?.[model.get("metric")] ?? [])
      .filter((value) => value !== null);
    const largest = all.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const full = model.get("scale") > 0 ? model.get("scale") : largest || 1;
    return { full, signed: all.some((value) => negative(value, full)), any: all.length > 0, largest };
  }

  function negative(value, full) { // a divergence that rounding left at −1e-9 has no sign
    return value <= -0.0005 * full;
  }

  function paint(c, i, full) {
    const span = spans[c][i];
    const value = valueOf(c, i) ?? 0;
    span.style.setProperty("--v", Math.min(Math.abs(value) / full, 1).toFixed(3));
    span.classList.toggle("neg", negative(value, full));
    span.setAttribute("aria-label", describe(c, i));
  }

  function addTokens(c, from) {
    const column = columns()[c];
    const pieces = document.createDocumentFragment();
    for (let i = from; i < column.tokens.length; i++) {
      const text = visible(column.tokens[i]);
      const space = text.startsWith(" ") && text.length > 1 ? " " : "";
      const span = make("span", "t", text.slice(space.length));
      span.mdwSpace = document.createTextNode(space); // not coloured: it hangs where lines break
      const mark = column.marks?.[i];
      if (mark && /^[a-z]+$/.test(mark)) span.classList.add(`m-${mark}`);
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.tabIndex = -1;
      span.mdwAt = [c, i];
      spans[c].push(span);
      pieces.append(span.mdwSpace, span);
    }
    boxes[c].append(pieces);
  }

  function build() {
    hide();
    cols.replaceChildren();
    cols.style.setProperty("--min-col", columns().length > 2 ? "14rem" : "18rem");
    root.style.setProperty("--height", model.get("height"));
    [spans, boxes] = [[], []];
    columns().forEach((column, c) => {
      const frame = make("div", "col");
      frame.style.setProperty("--tone", TONES[column.kind] ?? "#777777");
      const head = make("div", "head");
      head.append(make("span", "name", visible(column.title ?? "")));
      if (column.subtitle) head.append(make("span", "sub", visible(column.subtitle)));
      for (const text of column.badges ?? []) head.append(make("span", "mdw-badge", visible(text)));
      const box = make("div", "tokens");
      box.setAttribute("role", "listbox");
      box.setAttribute("aria-label", `tokens: ${column.title ?? `column ${c + 1}`}`);
      box.dir = "auto";
      frame.append(head, box);
      cols.append(frame);
      spans.push([]);
      boxes.push(box);
      addTokens(c, 0);
      finishColumn(c);
    });
    active = [0, 0];
    rove(...active, false);
    recolour();
    select();
  }

  function finishColumn(c) {
    const column = columns()[c];
    boxes[c].classList.toggle("caret", Boolean(column.streaming));
    boxes[c].querySelector(".blank")?.remove();
    if (!column.tokens.length && !column.streaming) {
      boxes[c].append(make("span", "blank", model.get("blank")));
    }
  }

  function recolour() {
    const { full, signed, any, largest } = shown();
    spans.forEach((column, c) => column.forEach((_, i) => paint(c, i, full)));
    legend(full, signed, any, largest);
    select();
  }

  function legend(full, signed, any, largest) {
    foot.replaceChildren();
    foot.hidden = !any;
    if (!any) return;
    const ramp = make("span", signed ? "ramp signed" : "ramp");
    ramp.setAttribute("aria-hidden", "true");
    foot.append(make("span", "", names(model.get("metric"))[1]),
      make("span", "", signed ? `−${number(full)}` : "0"), ramp, make("span", "", number(full)),
      make("span", "", `largest ${number(largest)}`));
    if (signed) foot.append(make("span", "", "dotted: negative"));
  }

  function append(message) {
    const before = spans[message.column]?.length;
    if (!splice(columns(), message) || before === undefined) return;
    const c = message.column;
    for (const span of spans[c].splice(message.start)) {
      span.mdwSpace.remove();
      span.remove();
    }
    addTokens(c, spans[c].length);
    finishColumn(c);
    const { full } = shown();
    for (let i = message.start; i < spans[c].length; i++) paint(c, i, full);
    if (message.start === 0) rove(...active, false);
    if (message.values) recolour();
    const box = boxes[c];
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
  }

  // what one token says of itself, in the card and below
  function facts(c, i) {
    const column = columns()[c];
    const parts = [];
    const line = make("div", "line");
    line.append(make("span", "tok", alone(column.tokens[i])), make("span", "num", `token ${i}`));
    parts.push(line);
    const values = make("div", "line");
    for (const metric of Object.keys(column.values ?? {})) {
      const value = valueOf(c, i, metric);
      if (value === undefined || value === null) continue;
      const entry = make("span", "", `${names(metric)[0]} ${number(value)}`);
      if (metric === model.get("metric")) entry.style.fontWeight = "600";
      values.append(entry);
    }
    if (values.childElementCount) parts.push(values);
    if (column.notes?.[i]) parts.push(make("div", "mdw-note", visible(column.notes[i])));
    const sides = make("div", "sides");
    for (const [who, tops] of Object.entries(column.top ?? {})) {
      if (tops?.[i]?.length) sides.append(topTokens(who, tops[i]));
    }
    if (sides.childElementCount) parts.push(sides);
    return parts;
  }

  function topTokens(who, pairs) {
    const side = make("div", "side");
    side.style.setProperty("--tone", TONES[who] ?? "#777777");
    side.append(make("div", "who", who === "finetuned" ? "fine-tuned" : who));
    for (const [token, p] of pairs) {
      const bar = make("span", "p");
      bar.style.setProperty("--p", p);
      side.append(make("span", "tok", alone(token)), bar, make("span", "num", number(p)));
    }
    return side;
  }

  function select() {
    const [c, i] = model.get("selected");
    root.querySelectorAll(".t.selected").forEach((span) => {
      span.classList.remove("selected");
      span.setAttribute("aria-selected", "false");
    });
    const span = spans[c]?.[i];
    detail.hidden = !span || !model.get("details");
    if (!span) return;
    span.classList.add("selected");
    span.setAttribute("aria-selected", "true");
    if (!detail.hidden) detail.replaceChildren(...facts(c, i));
  }

  function choose(c, i) {
    model.set("selected", [c, i]);
    model.save_changes();
    model.send({ kind: "select", column: c, index: i });
  }

  function rove(c, i, focus = true) {
    const old = spans[active[0]]?.[active[1]];
    if (old) old.tabIndex = -1;
    active = [c, i];
    const span = spans[c]?.[i];
    if (!span) return;
    span.tabIndex = 0;
    if (focus) span.focus({ preventScroll: false });
  }

  function link(c, i, on) {
    if (!model.get("linked")) return;
    spans.forEach((column, other) => other !== c && column[i]?.classList.toggle("linked", on));
  }

  function hover(span) {
    if (hovered === span) return;
    hide();
    hovered = span;
    const [c, i] = span.mdwAt;
    link(c, i, true);
    card.replaceChildren(...facts(c, i));
    document.body.append(card);
    card.showPopover?.();
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = card.getBoundingClientRect();
    const below = at.bottom + 8 + height < innerHeight;
    card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
    card.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - height - 8)}px`;
  }

  function hide() {
    if (!hovered) return;
    link(...hovered.mdwAt, false);
    hovered = null;
    card.remove();
  }

  function key(event) {
    if (event.key !== "Tab") event.stopPropagation(); // Lab's shortcuts must not fire
    if (!KEYS.has(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target.mdwAt;
    if (!at) return;
    event.preventDefault();
    let [c, i] = at;
    const last = (column) => Math.max(0, spans[column].length - 1);
    const up = event.key === "ArrowUp", down = event.key === "ArrowDown";
    if (event.key === "Enter" || event.key === " ") return choose(c, i);
    if (event.key === "ArrowLeft") i -= 1;
    if (event.key === "ArrowRight") i += 1;
    if (event.key === "PageUp") i -= 20;
    if (event.key === "PageDown") i += 20;
    if (event.key === "Home") i = 0;
    if (event.key === "End") i = last(c);
    if (up || down) c = Math.min(Math.max(c + (down ? 1 : -1), 0), spans.length - 1);
    if (!spans[c].length) return;
    i = Math.min(Math.max(i, 0), last(c));
    rove(c, i);
    hover(spans[c][i]);
  }

  const tokenOf = (event) => (event.target.mdwAt ? event.target : null);
  cols.addEventListener("pointerover", (event) => tokenOf(event) ? hover(event.target) : hide());
  cols.addEventListener("pointerleave", hide);
  cols.addEventListener("focusout", hide);
  cols.addEventListener("scroll", hide, true);
  cols.addEventListener("keydown", key);
  cols.addEventListener("click", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    rove(...span.mdwAt);
    choose(...span.mdwAt);
  });

  const custom = (message) => message.kind === "append" && append(message);
  const rebuilt = "change:columns change:height change:blank";
  const recoloured = "change:metric change:scale change:labels";
  model.on(rebuilt, build);
  model.on(recoloured, recolour);
  model.on("change:selected change:details", select);
  model.on("msg:custom", custom);
  build();
  return () => {
    model.off(rebuilt, build);
    model.off(recoloured, recolour);
    model.off("change:selected change:details", select);
    model.off("msg:custom", custom);
    hide();
    card.remove();
  };
}

export default { initialize, render };
