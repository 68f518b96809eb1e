"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const palettes = {
    light: {paper: "#ffffff", ink: "#1b1f24", muted: "#565e67", line: "#d5dbe1"},
    dark: {paper: "#14171b", ink: "#e8eaed", muted: "#a3acb6", line: "#363d46"},
  };
  const roots = [];

  const paint = (root) => {
    const {paper, ink, muted, line} = dark.matches ? palettes.dark : palettes.light;
    const colours = {
      background_fill_color: paper, border_fill_color: paper,
      axis_line_color: line, major_tick_line_color: line, grid_line_color: line,
      major_label_text_color: ink, axis_label_text_color: muted, label_text_color: ink,
    };
    for (const model of root.references()) {
      for (const [name, colour] of Object.entries(colours)) {
        if (name in model.properties) model.setv({[name]: colour});
      }
    }
  };

  const draw = async (script) => {
    const item = JSON.parse(script.textContent);
    document.getElementById(item.target_id).replaceChildren();
    const views = await Bokeh.embed.embed_item(item);
    for (const view of views.roots) { roots.push(view.model); paint(view.model); }
  };

  dark.addEventListener("change", () => roots.forEach(paint));
  document.querySelectorAll("script[data-plot]").forEach(draw);
})();
