"use strict";
(function () {
  const source = document.getElementById("charts").textContent;
  const names = Object.keys(JSON.parse(source));
  const config = { displayModeBar: false, responsive: false, showTips: false, doubleClick: false };

  // A colour in a chart is the name of a CSS variable; its value depends on light, dark or print.
  function coloured() {
    const style = getComputedStyle(document.documentElement);
    return JSON.parse(source, (key, value) => {
      const match = typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
      return match ? style.getPropertyValue(match[1]).trim() : value;
    });
  }
  function draw(width) {
    const charts = coloured();
    for (const name of names) {
      const box = document.getElementById(name);
      const layout = Object.assign({}, charts[name].layout);
      layout.width = width ? width(box) : box.clientWidth;
      Plotly.react(box, charts[name].data, layout, config);
    }
  }
  // A4 less its margins is 688 CSS pixels wide; a chart of a pair has half.
  function forPaper() {
    for (const box of document.querySelectorAll("details")) box.open = true;
    draw((box) => (box.parentElement.className === "pair" ? 335 : 680));
  }
  let last = 0;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth !== last) {
      last = document.documentElement.clientWidth;
      draw();
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", forPaper);
  addEventListener("afterprint", () => draw());
  last = document.documentElement.clientWidth;
  draw();
})();
