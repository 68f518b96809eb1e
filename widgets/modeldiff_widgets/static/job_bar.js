// What runs, how far it is, a way to stop it, and what went wrong. All text is textContent.
function make(tag, classes, text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

const WORDS = { idle: "ready", queued: "waiting", running: "running", done: "done",
  cancelled: "cancelled", failed: "failed", lost: "disconnected" };
const LOST = "The kernel was restarted or has ended: run the cell again.";

function render({ model, el }) {
  el.classList.add("mdw");
  const bar = make("div", "mdw-jobs");
  const status = make("span", "status");
  const words = make("span", "words");
  status.append(make("span", "lamp"), words);
  status.setAttribute("role", "status");
  const track = make("div", "track");
  const fill = make("div", "fill");
  track.setAttribute("role", "progressbar");
  track.setAttribute("aria-label", "progress");
  track.append(fill);
  const message = make("span", "message");
  const cancel = make("button", "mdw-plain cancel", "◼ Cancel");
  const pin = make("button", "mdw-plain pin", "⊕ Pin");
  cancel.title = "Stop what is running; what is finished stays";
  pin.title = "Keep what is shown as plain HTML below; it stays in the file without a kernel";
  for (const button of [cancel, pin]) button.type = "button";
  let asked = 0;
  function ask(tries) { // a page that has just been loaded may lose a message
    if (asked <= model.get("heard") || !tries) return;
    model.send({ kind: "cancel", number: asked });
    setTimeout(() => ask(tries - 1), 300);
  }
  cancel.addEventListener("click", () => {
    asked = model.get("heard") + 1;
    ask(60);
  });
  pin.addEventListener("click", () => model.send({ kind: "pin" }));
  const trouble = make("div", "trouble");
  bar.append(status, track, message, cancel, pin, trouble);
  el.append(bar);

  function draw() {
    const lost = el.closest(".jupyter-widgets-disconnected") !== null;
    const state = lost ? "lost" : model.get("status");
    const share = Math.round(100 * model.get("fraction"));
    bar.dataset.status = state;
    words.textContent = lost ? WORDS.lost
      : [WORDS[state] ?? state, model.get("label")].filter(Boolean).join(": ");
    fill.style.width = `${share}%`;
    track.setAttribute("aria-valuenow", String(share));
    message.textContent = lost ? LOST : model.get("message");
    message.title = message.textContent;
    cancel.disabled = !["running", "queued"].includes(state);
    if (cancel.disabled) asked = 0;
    pin.hidden = !model.get("can_pin");
    pin.disabled = lost;
  }
  function complain() {
    const [line, traceback] = model.get("error");
    trouble.replaceChildren();
    if (!line) return;
    const alert = make("div", "mdw-alert");
    alert.setAttribute("role", "alert");
    alert.append(make("span", "line", line));
    if (traceback) {
      const more = make("details", "");
      more.append(make("summary", "", "Traceback"), make("pre", "", traceback));
      alert.append(more);
    }
    trouble.append(alert);
  }
  const names = ["status", "label", "fraction", "message", "can_pin"].map((n) => `change:${n}`);
  const heard = () => setTimeout(draw); // the class that says it comes with the same event
  model.on("comm_live_update", heard);
  names.forEach((name) => model.on(name, draw));
  model.on("change:error", complain);
  draw();
  complain();
  return () => {
    model.off("comm_live_update", heard);
    names.forEach((name) => model.off(name, draw));
    model.off("change:error", complain);
  };
}

export default { render };
