"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const palettes = {
    light: {paper: "#ffffff", ink: "#1b1f24", muted: "#565e67", line: "#d5dbe1"},
    dark: {paper: "#14171b", ink: "#e8eaed", muted: "#a3acb6", line: "#363d46"},
  };
  const plots = [];

  const paint = ({view: {model}}, palette) => {
    const {paper, ink, muted, line} = palette ?? (dark.matches ? palettes.dark : palettes.light);
    const colours = {
      background_fill_color: paper, border_fill_color: paper,
      axis_line_color: line, major_tick_line_color: line, grid_line_color: line,
      major_label_text_color: ink, axis_label_text_color: muted, label_text_color: ink,
    };
    for (const part of model.references()) {
      for (const [name, colour] of Object.entries(colours)) {
        if (name in part.properties) part.setv({[name]: colour});
      }
    }
  };

  const draw = async (script) => {
    const item = JSON.parse(script.textContent);
    const host = document.getElementById(item.target_id);
    host.replaceChildren();
    const views = await Bokeh.embed.embed_item(item);
    const plot = {host, view: views.roots[0]};
    plots.push(plot);
    paint(plot);
  };

  // a plot does not shrink in time for the printer, so a light picture of it stands in
  window.addEventListener("beforeprint", () => plots.forEach((plot) => {
    paint(plot, palettes.light);
    const picture = plot.view.export("png", true).canvas;
    picture.className = "paper";
    picture.removeAttribute("style");
    plot.host.append(picture);
  }));
  window.addEventListener("afterprint", () => plots.forEach((plot) => {
    plot.host.querySelector(".paper")?.remove();
    paint(plot);
  }));
  dark.addEventListener("change", () => plots.forEach((plot) => paint(plot)));
  document.querySelectorAll("script[data-plot]").forEach(draw);
})();
