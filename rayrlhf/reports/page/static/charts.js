"use strict";
/* The curves: uPlot draws them; smoothing, the keyboard, and the table beside each are made here. */

const Curves = (() => {
  const drawn = new Map(); // place of the chart -> { chart, plot, figure }
  const settings = { half: 2, raw: true };
  const roles = ["s0", "s1", "s2", "s3", "s4", "s5"];
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

  const make = (tag, content = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.append(content);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  /** A number for people: few digits, a real minus. */
  const show = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2)
      : size >= 100 && Number.isInteger(value) ? String(value)
      : size >= 100 ? value.toFixed(1) : Number.isInteger(value) ? String(value) : value.toPrecision(4);
    return text.replace("-", "−");
  };

  /** What a colour of the style is now: canvas knows no variables. */
  const colour = (name) => {
    const probe = document.body.appendChild(make("i"));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const faint = (text, share) => text.replace(/^rgb\((.*)\)$/, `rgba($1, ${share})`);
  const colourOf = (series, index) => colour(series.role || roles[index % roles.length]);

  /** Centred moving average; near an end the window shrinks on both sides, so that a trend is not bent. */
  const smooth = (values, half) => values.map((value, index) => {
    if (value === null) return null;
    const own = Math.min(half, index, values.length - 1 - index);
    const near = values.slice(index - own, index + own + 1).filter((each) => each !== null);
    return near.reduce((sum, each) => sum + each, 0) / near.length;
  });

  /** Steps on either side that are averaged: at most a sixth of all, or few steps would become one line. */
  const reach = (chart) => chart.smooth ? Math.min(settings.half, Math.floor(chart.x.length / 6)) : 0;

  /** The columns of a chart for uPlot: x; for each series the limits if any, the raw values and the line. */
  const columns = (chart) => {
    const half = reach(chart);
    const found = [chart.x];
    if (chart.kind === "stacked") {
      let below = chart.x.map(() => 0);
      for (const series of chart.series) {
        below = smooth(series.values, half).map((value, index) => below[index] + (value ?? 0));
        found.push(below);
      }
      return found;
    }
    for (const series of chart.series) {
      if (series.low) found.push(series.low, series.high);
      found.push(series.values, smooth(series.values, half));
    }
    return found;
  };

  const options = (chart, figure) => {
    const series = [{ label: chart.x_words.split(",")[0], value: (_, value) => show(value) }];
    const bands = [];
    const ink = colour("quiet"), line = colour("line");
    const dots = chart.x.length <= 30;
    chart.series.forEach((each, index) => {
      const stroke = colourOf(each, index);
      const common = { label: each.words, stroke, width: 2 };
      if (chart.kind === "stacked") {
        // The value is that of this part alone, not the height of the pile.
        const value = (_, __, ___, at) => show(at === null ? null : each.values[at]);
        series.push({ ...common, fill: faint(stroke, 0.75), width: 1, points: { show: false }, value });
        return;
      }
      if (chart.kind === "bars") {
        const paths = uPlot.paths.bars({ size: [0.9] });
        series.push({ ...common, show: false, class: "raw" });
        series.push({ ...common, fill: faint(stroke, 0.6), width: 1, paths, points: { show: false }, value: (_, v) => show(v) });
        return;
      }
      if (each.low) {
        for (const limit of ["low", "high"]) series.push({ label: `${each.words}, ${limit}`, class: "raw", width: 0, points: { show: false } });
        bands.push({ series: [series.length - 1, series.length - 2], fill: faint(stroke, 0.16) });
      }
      const blurred = reach(chart) > 0;
      series.push({
        label: `${each.words}, raw`, class: "raw", stroke: faint(stroke, 0.4), width: 1,
        points: { show: dots, size: 5, stroke: faint(stroke, 0.5), fill: faint(stroke, 0.5) },
        show: settings.raw && blurred, spanGaps: true,
      });
      const ideal = each.role === "ideal";
      series.push({
        ...common, width: ideal ? 1.5 : 2, dash: ideal ? [5, 5] : undefined, spanGaps: true,
        points: { show: !ideal && (dots || chart.kind === "points") && !blurred, size: 6, fill: stroke },
        value: (_, value, __, at) => {
          if (at === null) return "–";
          const range = each.low && each.low[at] !== null ? ` [${show(each.low[at])}, ${show(each.high[at])}]` : "";
          return show(value) + range;
        },
      });
    });
    const stacked = chart.kind === "stacked";
    if (stacked) for (let at = series.length - 1; at > 1; at--) bands.push({ series: [at, at - 1], fill: series[at].fill });
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 5 }, font: "11px system-ui, sans-serif" };
    return {
      width: width(figure), height: figure.closest(".wide") ? 300 : 190,
      padding: [8, 8, 0, 0],
      series, bands,
      scales: { x: { time: false, range: chart.kind === "bars" ? undefined : (_, least, most) => least === most ? [least - 1, most + 1] : [least, most] },
                y: { range: (_, least, most) => bounds(least, most, stacked || chart.kind === "bars") } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 60, incrs: chart.sync ? [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 50000, 100000] : undefined,
          values: (_, ticks) => ticks.map((tick) => compact.format(tick).replace("-", "−")) },
        { ...axis, size: 50, space: 34, values: (_, ticks) => ticks.map((tick) => axisText(tick, ticks)) },
      ],
      cursor: { drag: { x: true, y: false }, sync: chart.sync ? { key: chart.sync } : undefined, points: { size: 7 } },
      hooks: { setCursor: [(plot) => latest({ plot, chart })], ready: [(plot) => latest({ plot, chart })] },
      legend: { live: true, markers: { width: 0, fill: (_, index) => series[index].stroke ?? ink } },
    };
  };

  const axisText = (tick, ticks) => {
    const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(tick) || 1;
    const most = Math.max(...ticks.map(Math.abs));
    if (most >= 1e4) return compact.format(tick).replace("-", "−");
    if (most !== 0 && most < 1e-3) return tick === 0 ? "0" : Number(tick.toPrecision(2)).toExponential().replaceAll("-", "−");
    let digits = 0;
    while (digits < 6 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6 * step * 10 ** digits) digits++;
    return tick.toFixed(digits).replace("-", "−");
  };

  const bounds = (least, most, zero) => {
    if (least === null || least === undefined) return [0, 1];
    if (least === 0 && most === 0) return [0, 1];
    if (zero) return [0, most * 1.05 || 1];
    const room = (most - least) * 0.08 || Math.abs(most) * 0.1 || 1;
    return [least - room, most + room];
  };

  const width = (figure) => Math.max(220, figure.clientWidth - parseFloat(getComputedStyle(figure).paddingLeft) * 2);

  /** The numbers as a table, made when it is opened. */
  const table = (chart) => {
    const found = make("table");
    const head = found.createTHead().insertRow();
    for (const words of [chart.x_words, ...chart.series.map((each) => each.words)]) head.append(make("th", words, { scope: "col" }));
    const body = found.createTBody();
    chart.x.forEach((x, index) => {
      const row = body.insertRow();
      row.append(make("th", show(x), { scope: "row" }));
      for (const each of chart.series) row.append(make("td", show(each.values[index])));
    });
    return found;
  };

  const draw = (figure, chart) => {
    const place = Number(figure.dataset.chart);
    drawn.get(place)?.plot.destroy();
    const title = make("h4", chart.title);
    title.append(make("small", [chart.unit, chart.kind === "points" || chart.kind === "bars" || !chart.sync ? `over ${chart.x_words}` : ""].filter(Boolean).join(" "), {}));
    const stage = make("div", "", { class: "plot", tabindex: "0", role: "img", "aria-label": chart.summary });
    const said = make("span", "", { class: "unseen", "aria-live": "polite" });
    const details = make("details");
    const holder = make("div");
    details.append(make("summary", "Numbers"), holder);
    details.addEventListener("toggle", () => holder.replaceChildren(...(details.open ? [table(chart)] : [])));
    figure.replaceChildren(title, stage, said, ...(chart.note ? [make("p", chart.note, { class: "note" })] : []), details);
    const plot = new uPlot(options(chart, figure), columns(chart), stage);
    const own = { chart, plot, figure, stage };
    drawn.set(place, own);
    stage.addEventListener("keydown", (event) => key(event, own, said));
    sized.observe(figure);
  };

  /** Without a pointer the legend shows the last values. */
  const latest = ({ plot, chart }) => { if (chart.x.length && plot.cursor.idx == null) plot.setLegend({ idx: chart.x.length - 1 }, false); };

  const key = (event, { plot, chart }, said) => {
    const last = chart.x.length - 1, now = plot.cursor.idx ?? last;
    const { min, max } = plot.scales.x;
    const middle = chart.x[now], half = (max - min) / 2;
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last };
    if (event.key in moves) {
      const to = Math.min(last, Math.max(0, moves[event.key]));
      plot.setCursor({ left: plot.valToPos(chart.x[to], "x"), top: plot.over.clientHeight / 2 });
      said.textContent = `${chart.x_words.split(",")[0]} ${show(chart.x[to])}: ` + chart.series.map((each) => `${each.words} ${show(each.values[to])}`).join(", ");
    } else if (event.key === "+" || event.key === "=") plot.setScale("x", { min: Math.max(chart.x[0], middle - half / 2), max: Math.min(chart.x[last], middle + half / 2) });
    else if (event.key === "-" || event.key === "−") plot.setScale("x", { min: Math.max(chart.x[0], middle - half * 2), max: Math.min(chart.x[last], middle + half * 2) });
    else if (event.key === "Escape" || event.key === "0") whole(plot, chart);
    else return;
    event.preventDefault();
  };

  const whole = (plot, chart) => plot.setScale("x", { min: chart.x[0], max: chart.x[chart.x.length - 1] });
  const zoomed = ({ plot, chart }) => plot.scales.x.min > chart.x[0] || plot.scales.x.max < chart.x[chart.x.length - 1];

  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const own = drawn.get(Number(target.dataset.chart));
      if (own && target.isConnected && own.plot.width !== width(target)) own.plot.setSize({ width: width(target), height: own.plot.height });
    }
  });

  /** Draw all charts anew, with what the reader has zoomed to. */
  const redraw = () => {
    for (const own of [...drawn.values()]) {
      const range = zoomed(own) ? { min: own.plot.scales.x.min, max: own.plot.scales.x.max } : null;
      const open = own.figure.querySelector("details").open;
      draw(own.figure, own.chart);
      const again = drawn.get(Number(own.figure.dataset.chart));
      if (range) again.plot.setScale("x", range);
      again.figure.querySelector("details").open = open;
    }
  };

  return {
    show, make, settings, redraw,
    /** Draw the page's figures from its data; those that are there keep their zoom. */
    mount(charts) {
      for (const figure of document.querySelectorAll("figure[data-chart]")) {
        const place = Number(figure.dataset.chart), own = drawn.get(place);
        const range = own && own.chart.title === charts[place].title && zoomed(own) ? { min: own.plot.scales.x.min, max: own.plot.scales.x.max } : null;
        if (!own || own.figure !== figure || JSON.stringify(own.chart) !== JSON.stringify(charts[place])) draw(figure, charts[place]);
        if (range) drawn.get(place).plot.setScale("x", range);
      }
      for (const [place, own] of drawn) if (!own.figure.isConnected) { own.plot.destroy(); drawn.delete(place); }
    },
    reset() { for (const { plot, chart } of drawn.values()) whole(plot, chart); },
    plots: drawn,
  };
})();
