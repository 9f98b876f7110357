// A small line chart as SVG. Its range is written below it, and a screen reader hears the last value.
import { element } from "./element.js";

const POINTS = 500, WIDTH = 260, HEIGHT = 90, EDGE = 4;  // points at most: there are fewer pixels
const SPACE = "http://www.w3.org/2000/svg";

export const figure = (number) => (Math.abs(number) >= 1000 ? Math.round(number).toLocaleString() : Number(number.toPrecision(3)).toString());

// `points` are pairs; null for fewer than two.
export function curve(title, points) {
  if (points.length < 2) return null;
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const stride = Math.ceil(points.length / POINTS);
  const thinned = points.filter((_, i) => i % stride === 0 || i === points.length - 1);
  const place = ([x, y]) => [
    EDGE + ((WIDTH - 2 * EDGE) * (x - left)) / (right - left || 1),
    HEIGHT - EDGE - ((HEIGHT - 2 * EDGE) * (y - low)) / (high - low || 1),
  ].map((each) => each.toFixed(1)).join(",");
  const svg = document.createElementNS(SPACE, "svg"), line = document.createElementNS(SPACE, "polyline");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}, now ${figure(ys.at(-1))}`);
  line.setAttribute("points", thinned.map(place).join(" "));
  svg.append(line);
  const range = `${figure(low)} to ${figure(high)}, now ${figure(ys.at(-1))}`;
  return element("figure", {}, element("figcaption", {}, element("span", { textContent: title })), svg,
    element("figcaption", {}, element("span", { textContent: range })));
}
