// Small charts as SVG: bars over edges, and lines.  A bar that can be chosen is a button.

import { h, power, short, whole } from "/static/dom.js";

const WIDTH = 360;
const LEFT = 46; // of a curve: room for its numbers

// Round numbers between two, with their texts: of a logarithmic scale decades, or parts of them where these are few.
function ticksOf(low, high, log, most = 7) {
  if (!log) {
    const step = niceStep((high - low) / (most - 2));
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step / 1e6; at += step) found.push([at, short(Number(at.toPrecision(6)))]);
    return found;
  }
  const [first, last] = [Math.floor(Math.log10(low) + 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  for (const parts of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    const found = [];
    for (let at = first; at <= last; at += 1) {
      for (const part of parts) {
        const value = Number((part * 10 ** at).toPrecision(3));
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) found.push(value);
      }
    }
    if (found.length < 3) continue;
    const step = Math.ceil(found.length / most);
    const small = last < -2 || last > 4; // all as powers, or none: a mixture does not read as one scale
    return found.filter((_, i) => i % step === 0).map((value) => [value, (small || first < -3) && parts.length === 1 ? power(value) : short(value)]);
  }
  return ticksOf(low, high, false); // a narrow one
}

function niceStep(rough) {
  const base = 10 ** Math.floor(Math.log10(rough || 1));
  return base * [1, 2, 5, 10].find((factor) => factor * base >= rough * 0.999);
}

// Counts over edges; `choose` gets the bounds of a bar that is clicked; `marks` are values at which lines are drawn.
export function bars({ edges, counts, log = false, title, height = 110, width = WIDTH, choose = null, chosen = null, marks = [] }) {
  if (!counts.length) return h("p.empty", {}, "Nothing to draw.");
  const at = (x) => (log ? Math.log10(x) : x);
  const [low, high] = [at(edges[0]), at(edges[edges.length - 1])];
  const place = (x) => ((at(x) - low) / (high - low)) * width;
  const most = Math.max(...counts, 1);
  const svg = h("svg.chart", { viewBox: `0 -14 ${width} ${height + 34}`, role: choose ? "group" : "img", "aria-label": title });
  counts.forEach((count, i) => {
    const [x, end] = [place(edges[i]), place(edges[i + 1])];
    const size = count ? Math.max((count / most) * (height - 4), 1.5) : 0;
    const name = `${short(edges[i])} to ${short(edges[i + 1])}: ${whole(count)}`;
    const selected = chosen && edges[i] >= chosen[0] * (1 - 1e-9) && edges[i + 1] <= chosen[1] * (1 + 1e-9);
    const bar = h("rect.bar", { x: x + 0.5, y: height - size, width: Math.max(end - x - 1, 0.8), height: size, rx: 1 }, h("title", {}, name));
    if (!choose) {
      svg.append(bar);
      return;
    }
    const pick = () => choose(selected ? null : [edges[i], edges[i + 1]]);
    const button = h(
      `g.pick${selected ? ".chosen" : ""}`,
      {
        role: "button",
        tabindex: count ? 0 : -1,
        "aria-label": name,
        "aria-pressed": String(Boolean(selected)),
        onclick: pick,
        onkeydown: (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          pick();
        },
      },
      h("rect.ground", { x, y: 0, width: Math.max(end - x, 1), height }),
      bar,
    );
    svg.append(button);
  });
  for (const mark of marks) {
    if (at(mark) > low && at(mark) < high) svg.append(h("line.mark", { x1: place(mark), x2: place(mark), y1: 0, y2: height }));
  }
  svg.append(h("line.axis", { x1: 0, x2: width, y1: height, y2: height }));
  svg.append(h("text.tick.count", { x: width, y: -4, "text-anchor": "end" }, `highest ${whole(most)}`));
  for (const [value, text] of ticksOf(edges[0], edges[edges.length - 1], log)) {
    const x = place(value);
    const anchor = x < 12 ? "start" : x > width - 12 ? "end" : "middle";
    svg.append(h("line.axis", { x1: x, x2: x, y1: height, y2: height + 3 }));
    svg.append(h("text.tick", { x, y: height + 14, "text-anchor": anchor }, text));
  }
  return svg;
}

// One line over steps, or over `x`, with a band of [x, low, high] where there is one.
export function curve({ title, points, band = [], log = false, share = false, x: across = "step", height = 150 }) {
  const xs = points.map((p) => p[0]);
  const ys = [...points.map((p) => p[1]), ...band.flatMap((p) => p.slice(1))];
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [low, high] = bounds(Math.min(...ys), Math.max(...ys), log, share);
  const at = (v) => (log ? Math.log10(v) : v);
  const x = (v) => LEFT + ((v - left) / (right - left || 1)) * (WIDTH - LEFT - 8);
  const y = (v) => height - ((at(Math.max(v, low)) - at(low)) / (at(high) - at(low))) * (height - 6);
  const path = (pairs) => pairs.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
  const rows = ticksOf(low, high, log, 6).map(([value, text]) => [h("line.lines", { x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }), h("text.tick", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, text)]);
  const columns = ticksOf(left, right, false).map(([value, text]) => h("text.tick", { x: x(value), y: height + 14, "text-anchor": x(value) > WIDTH - 16 ? "end" : "middle" }, text));
  return h(
    "svg.chart",
    { viewBox: `0 0 ${WIDTH} ${height + 32}`, role: "img", "aria-label": `${title}: ${short(points[points.length - 1][1])} at the end` },
    rows,
    band.length ? h("path.band", { d: `${path(band.map((p) => [p[0], p[1]]))}${path(band.map((p) => [p[0], p[2]]).reverse()).replace("M", "L")}Z` }) : null,
    h("path.line", { d: path(points) }),
    h("line.axis", { x1: LEFT, x2: WIDTH, y1: height, y2: height }),
    columns,
    h("text.tick", { x: WIDTH, y: height + 28, "text-anchor": "end" }, across),
  );
}

// The ends of a scale: a share begins at 0, and noise of a constant does not fill the height.
function bounds(low, high, log, share) {
  if (log) return high > low * 1.2 ? [low / (high / low) ** 0.05, high * (high / low) ** 0.05] : [low / 1.2, high * 1.2];
  if (share) return [0, Math.max(high * 1.05, 0.01)];
  const narrow = 0.02 * Math.abs(high);
  if (high - low < narrow) [low, high] = [(low + high - narrow) / 2, (low + high + narrow) / 2];
  if (low === high) return [low, low + 1];
  const room = (high - low) * 0.05;
  return [low > 0 && low < high / 2 ? 0 : low - (low ? room : 0), high + room];
}
