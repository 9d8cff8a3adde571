// Small charts as SVG: bars over edges, and lines.  A bar that can be chosen is a button.

import { h, power, short, whole } from "/static/dom.js";

const WIDTH = 360;

function ticksOf(edges, log) {
  const [low, high] = [edges[0], edges[edges.length - 1]];
  if (log) {
    const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
    const step = Math.max(1, Math.ceil((last - first + 1) / 7));
    const found = [];
    for (let at = first; at <= last; at += step) found.push([10 ** at, at >= -2 && at <= 4 ? short(10 ** at) : power(10 ** at)]);
    return found.length > 1 ? found : [[low, short(low, 2)], [high, short(high, 2)]];
  }
  const step = niceStep((high - low) / 4);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push([at, short(Number(at.toPrecision(6)))]);
  return found;
}

function niceStep(rough) {
  const base = 10 ** Math.floor(Math.log10(rough || 1));
  return base * [1, 2, 5, 10].find((factor) => factor * base >= rough * 0.999);
}

// Counts over edges; `choose` gets the bounds of a bar that is clicked; `marks` are values at which lines are drawn.
export function bars({ edges, counts, log = false, title, height = 110, choose = null, chosen = null, marks = [] }) {
  if (!counts.length) return h("p.empty", {}, "Nothing to draw.");
  const at = (x) => (log ? Math.log10(x) : x);
  const [low, high] = [at(edges[0]), at(edges[edges.length - 1])];
  const place = (x) => ((at(x) - low) / (high - low)) * WIDTH;
  const most = Math.max(...counts, 1);
  const svg = h("svg.chart", { viewBox: `0 -14 ${WIDTH} ${height + 34}`, role: choose ? "group" : "img", "aria-label": title });
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
  svg.append(h("line.axis", { x1: 0, x2: WIDTH, y1: height, y2: height }));
  svg.append(h("text.tick.count", { x: WIDTH, y: -5, "text-anchor": "end" }, `highest ${whole(most)}`));
  for (const [value, text] of ticksOf(edges, log)) {
    const x = place(value);
    const anchor = x < 12 ? "start" : x > WIDTH - 12 ? "end" : "middle";
    svg.append(h("text.tick", { x, y: height + 14, "text-anchor": anchor }, text));
  }
  return svg;
}

// One line over steps, with a band where the points have [low, high].
export function curve({ points, title, height = 120 }) {
  const xs = points.map((p) => p[0]);
  const ys = points.flatMap((p) => p.slice(1)).filter((y) => y !== null && y !== undefined);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (low === high) [low, high] = [Math.min(2 * low, 0), Math.max(2 * low, low ? 0 : 1)]; // a constant
  const x = (v) => 50 + ((v - left) / (right - left || 1)) * (WIDTH - 54);
  const y = (v) => height - 4 - ((v - low) / (high - low)) * (height - 12);
  const path = (pairs) => pairs.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
  const band = points.filter((p) => p.length > 2);
  const digits = [3, 4, 5, 6].find((n) => short(low, n) !== short(high, n)) ?? 3;
  return h(
    "svg.chart",
    { viewBox: `0 0 ${WIDTH} ${height + 20}`, role: "img", "aria-label": `${title}: ${short(points[points.length - 1][1])} at the end` },
    band.length
      ? h("path.band", { d: `${path(band.map((p) => [p[0], p[2]]))}${path(band.map((p) => [p[0], p[3]]).reverse()).replace("M", "L")}Z` })
      : null,
    h("path.line", { d: path(points) }),
    h("line.axis", { x1: 50, x2: WIDTH, y1: height, y2: height }),
    h("text.tick", { x: 44, y: 12, "text-anchor": "end" }, short(high, digits)),
    h("text.tick", { x: 44, y: height, "text-anchor": "end" }, short(low, digits)),
    h("text.tick", { x: 50, y: height + 14 }, whole(left)),
    h("text.tick", { x: WIDTH, y: height + 14, "text-anchor": "end" }, `step ${whole(right)}`),
  );
}
