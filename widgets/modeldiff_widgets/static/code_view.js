// The Python that reproduces what is shown, behind a toggle, with a copy button.
function make(tag, classes, text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

// ipywidgets gives the handle of a slider no name; the one above it is its name
function nameHandle({ target }) {
  const handle = target.closest?.(".mdw-field [role=slider]");
  const name = handle?.closest(".mdw-field").querySelector(".mdw-name")?.textContent;
  if (name) handle.setAttribute("aria-label", name);
}

function render({ model, el }) {
  el.classList.add("mdw");
  const listing = make("details", "mdw-listing");
  const summary = make("summary", "", "Code");
  const box = make("div", "box");
  const code = make("pre", "mdw-code");
  code.tabIndex = 0;
  const copy = make("button", "mdw-plain copy", "Copy");
  copy.type = "button";
  box.append(code, copy);
  listing.append(summary, box);
  el.append(listing);
  document.addEventListener("focusin", nameHandle);

  async function put() {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch { // no permission, or no secure context: select it, so that Ctrl+C does it
      getSelection().selectAllChildren(code);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  }
  function draw() {
    code.textContent = model.get("code");
    if (listing.open !== model.get("unfolded")) listing.open = model.get("unfolded");
  }
  copy.addEventListener("click", put);
  listing.addEventListener("keydown", (event) => event.stopPropagation());
  listing.addEventListener("toggle", () => {
    if (listing.open === model.get("unfolded")) return;
    model.set("unfolded", listing.open);
    model.save_changes();
  });
  model.on("change:code change:unfolded", draw);
  draw();
  return () => {
    model.off("change:code change:unfolded", draw);
    document.removeEventListener("focusin", nameHandle);
  };
}

export default { render };
