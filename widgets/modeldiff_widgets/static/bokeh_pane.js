// A live bokeh figure. BokehJS comes over the comm once per page; nothing of it is stored.
const LIBRARIES = (globalThis.modeldiffBokeh ??= new Map()); // version -> promise, one per page
let number = 0;

async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()],
    { type: "text/javascript" }));
}

function install(url) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = resolve;
    script.onerror = () => reject(new Error("BokehJS could not be loaded"));
    document.head.append(script);
  }).finally(() => URL.revokeObjectURL(url));
}

const installed = (version) => globalThis.Bokeh?.[version]
  ?? (globalThis.Bokeh?.version === version ? globalThis.Bokeh : null);

function library(version, ask) {
  if (installed(version)) return Promise.resolve(installed(version));
  if (!LIBRARIES.has(version)) {
    const coming = ask().then(unpack).then(install).then(() => installed(version));
    coming.catch(() => LIBRARIES.delete(version));
    LIBRARIES.set(version, coming);
  }
  return LIBRARIES.get(version);
}

function isDark() {
  const { jpThemeLight } = document.body.dataset;
  if (jpThemeLight) return jpThemeLight === "false";
  if (document.body.classList.contains("vscode-dark")) return true;
  if (document.body.classList.contains("vscode-light")) return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// Binary columns that the browser changes travel as base64, as they do the other way.
function plain(value) {
  if (value === null || typeof value !== "object") return value;
  if (typeof value.to_base64 === "function") return value.to_base64();
  if (value instanceof Map) return { type: "map", entries: [...value].map((e) => e.map(plain)) };
  if (Array.isArray(value)) return value.map(plain);
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plain(each)]));
}

function render({ model, el }) {
  const id = `view-${Date.now().toString(36)}-${++number}`;
  el.classList.add("mdw");
  const host = document.createElement("div");
  host.className = "mdw-bokeh";
  host.setAttribute("role", "figure");
  host.setAttribute("aria-label", model.get("label"));
  el.append(host);
  const wait = document.createElement("div");
  wait.className = "wait";
  wait.textContent = "drawing…";
  host.append(wait);

  let document_ = null, views = null, at = -1, closed = false, dark = isDark();
  let queue = [], drawing = Promise.resolve(), camera = null, sendBundle = null;

  const ask = () => new Promise((resolve) => {
    sendBundle = resolve;
    model.send({ kind: "library", view: id });
  });
  const hello = () => model.send({ kind: "hello", view: id, dark });

  function clear() {
    for (const view of views?.roots ?? []) view.remove();
    document_?.remove_on_change(changed);
    [document_, views] = [null, null];
  }

  async function draw({ content, seq }) {
    const Bokeh = await library(model.get("version"), ask);
    if (closed) return;
    clear();
    host.replaceChildren();
    const made = Bokeh.Document?.from_json(content)
      ?? Bokeh.require("document").Document.from_json(content);
    views = await Bokeh.embed.add_document_standalone(made, host);
    if (closed) return;
    [document_, at] = [made, seq];
    host.mdViews = views;
    made.on_change(changed, true);
    const waiting = queue;
    queue = [];
    waiting.forEach(patch);
    photograph();
  }

  function patch(message) {
    if (!document_) return void queue.push(message);
    if (message.seq <= at) return;
    at = message.seq;
    if (message.from === id) return;
    document_.apply_json_patch(message.content);
    photograph();
  }

  // what belongs to this view alone: its size, the ranges that it computed, that it is drawn
  const OWN = new Set(["inner_width", "inner_height", "outer_width", "outer_height"]);
  const isOwn = (event) => OWN.has(event.attr) || event.model?.type === "DataRange1d"
    || event.msg_data?.event_name === "document_ready";
  function changed(event) {
    if (event.sync === false) return;
    const events = (event.events ?? [event]).filter((each) => each.sync !== false && !isOwn(each));
    if (!events.length) return;
    model.send({ kind: "patch", view: id, content: plain(document_.create_json_patch(events)) });
    photograph();
  }

  // a still picture for what is pinned, some time after the last change
  function photograph() {
    clearTimeout(camera);
    camera = setTimeout(() => {
      const [view] = views?.roots ?? [];
      if (closed || !view?.export || !host.checkVisibility()) return;
      const { canvas } = view.export("png", true);
      if (!canvas.width || !canvas.height) return;
      const paper = document.createElement("canvas");
      [paper.width, paper.height] = [canvas.width, canvas.height];
      const ink = paper.getContext("2d");
      ink.fillStyle = getComputedStyle(el).getPropertyValue("--mdw-paper") || "#fff";
      ink.fillRect(0, 0, paper.width, paper.height);
      ink.drawImage(canvas, 0, 0);
      model.send({ kind: "picture", data: paper.toDataURL("image/png") });
    }, 700);
  }

  function custom(message, buffers) {
    if (message.to && message.to !== id) return;
    if (message.kind === "library") sendBundle?.(buffers[0]);
    if (message.kind === "doc") {
      drawing = drawing.then(() => draw(message)).catch((error) => {
        wait.textContent = `This figure could not be drawn: ${error.message}`;
        host.replaceChildren(wait);
        console.error(error);
      });
    }
    if (message.kind === "patch") patch(message);
  }

  const themed = () => {
    if (isDark() === dark) return;
    dark = isDark();
    hello();
  };
  const observer = new MutationObserver(themed);
  observer.observe(document.body, { attributes: true });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", themed);
  model.on("msg:custom", custom);
  hello();
  return () => {
    closed = true;
    clearTimeout(camera);
    observer.disconnect();
    media.removeEventListener("change", themed);
    model.off("msg:custom", custom);
    clear();
  };
}

export default { render };
