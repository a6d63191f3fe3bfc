// The arithmetic of the pad: places in it from 0 to 1, from the left and from the top, and weights.
const LOWEST = -10;
const HIGHEST = 10;
const STEP = 0.05;
const FINE_STEP = 0.01;
const LARGE_STEP = 0.25;
const DIGITS = 6; // after the point: products of two places and a strength
const CLOSE = 1e-5;
const RANGES = { "0 to 1": [0, 1], "-1 to 2": [-1, 2], "-10 to 10": [LOWEST, HIGHEST] };
const CELLS = { 1: 10, 3: 12, 20: 20 }; // of the grid, by the size of the range

function rounded(number, digits = DIGITS) {
  return Number(number.toFixed(digits)) + 0;
}

function shown(number) {
  return String(rounded(number, 4));
}

function clamped(number, lowest, highest) {
  return Math.min(highest, Math.max(lowest, number));
}

function snapped(number, step) {
  return rounded(Math.round(number / step) * step);
}

// Bilinear weights of the corners, which sum to 1: top left, top right, bottom left, bottom right.
function cornerShares([x, y]) {
  return [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y];
}

// The point and the strength of which weights in the corners may come; null where none can be told. The weight of a
// corner without an adapter is null: it has what the others leave of the strength.
function pointOf(weights, strength) {
  const known = weights.filter((weight) => weight !== null);
  if (known.length < 3) return null;
  const sum = known.reduce((one, other) => one + other, 0);
  const total = known.length === 4 ? sum : strength;
  if (Math.abs(total) < CLOSE) return null;
  const [, topRight, bottomLeft, bottomRight] = weights.map((weight) => weight ?? total - sum);
  const point = [topRight + bottomRight, bottomLeft + bottomRight].map((share) => clamped(rounded(share / total), 0, 1));
  return [point, clamped(rounded(total), LOWEST, HIGHEST)];
}

// Whether corners have the weights that a point gives them.
function isAt(point, strength, weights) {
  return cornerShares(point).every(
    (share, index) => weights[index] === null || Math.abs(share * strength - weights[index]) < CLOSE,
  );
}
