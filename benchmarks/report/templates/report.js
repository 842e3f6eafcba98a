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
  // The reader's axes for the artifacts; an artifact without a figure leaves the chart.
  const choices = JSON.parse(document.getElementById("choices").textContent);
  function chooseAxes(chart) {
    for (const axis of ["x", "y"]) {
      const select = document.getElementById("pareto-" + axis);
      const choice = select && choices.find((one) => one.key === select.value);
      if (!choice || select.value === select.dataset.drawn) continue;
      chart.data.forEach((trace, i) => { trace[axis] = [choice.values[i]]; });
      const title = Object.assign({}, chart.layout[axis + "axis"].title, { text: choice.title });
      chart.layout[axis + "axis"] = {
        title, automargin: true, fixedrange: true, zeroline: false, autorange: true, nticks: 5,
        gridcolor: chart.layout.xaxis.gridcolor, linecolor: chart.layout.xaxis.linecolor,
        type: choice.logarithmic ? "log" : "linear",
      };
    }
  }
  for (const axis of ["x", "y"]) {
    const select = document.getElementById("pareto-" + axis);
    if (!select) continue;
    select.dataset.drawn = select.value; // as the page was made, with its own ticks
    select.addEventListener("change", () => draw());
  }
  function draw(width) {
    const charts = coloured();
    if (charts.pareto) chooseAxes(charts.pareto);
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
