// Weights of two adapters by one point, or of four. Gradio provides element, props, trigger and watch; see
// components/weight_pad.py, and weight_pad_point.js, which comes before this. Names come from files: they are put into
// the page as text, never as markup.
const AXES = ["Left to right", "Bottom to top"];
const CORNERS = ["Top left", "Top right", "Bottom left", "Bottom right"];
const SETTLED = 300; // milliseconds after which what comes from elsewhere is newer than one's own changes
const root = element.querySelector(".weight-pad");

let cards = [];
let four = false;
let range = RANGES["-1 to 2"];
let strength = 1;
let point = [0.5, 0.5]; // of four: shares of the way to the right, and down
const chosen = { axes: ["", ""], corners: ["", "", "", ""] }; // ids; "" for none
let shape = ""; // what the rows were built for
let known = new Set(); // ids of those that acted when the places were settled
let changedAt = -Infinity;
let pointer = null; // id of the one that drags
let strengthField = null;
let fields = new Map(); // id of an adapter -> its number field

function make(tag, className, parent, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function acting() {
  return cards.filter((card) => card.on);
}

// The name, too, where another card has the same title.
function labelOf(card) {
  const alike = cards.some((other) => other !== card && other.title === card.title);
  return alike ? `${card.title} (${card.name})` : card.title;
}

function titleOf(id) {
  const card = cards.find((one) => one.id === id);
  return card ? labelOf(card) : "nothing";
}

function weightOf(id) {
  return cards.find((card) => card.id === id)?.weight ?? 0;
}

const slots = () => (four ? chosen.corners : chosen.axes);
const usable = () => chosen.axes.every(Boolean) && (!four || chosen.corners.some(Boolean));

// The frame: which adapters, the pad, the fields.
const modes = make("fieldset", "modes", root);
make("legend", "for-screen-readers", modes, "What the point sets");
for (const [value, text] of [
  [false, "Two adapters"],
  [true, "Four corners"],
]) {
  const label = make("label", "", modes);
  const input = make("input", "", label);
  Object.assign(input, { type: "radio", name: "weight-pad-mode", checked: value === four });
  make("span", "", label, text);
  input.addEventListener("change", () => {
    four = value;
    update();
  });
}
const note = make("p", "note", root);
const choices = make("div", "choices", root);
const frame = make("div", "frame", root);
const pad = make("div", "pad", frame);
const lines = [
  ["x", 0],
  ["y", 0],
  ["x", 1],
  ["y", 1],
].map(([axis, weight]) => {
  const line = make("i", `line ${axis}`, pad);
  Object.assign(line.dataset, { axis, weight });
  return line;
});
const labels = CORNERS.map(() => named(make("span", "corner", pad)));
const thumb = make("div", "thumb", pad);
thumb.tabIndex = 0;
thumb.setAttribute("role", "slider");
thumb.setAttribute("aria-describedby", "weight-pad-keys");
const axisNames = ["x", "y"].map((axis) => named(make("span", `axis ${axis}`, frame)));
const keys = make("p", "keys", root, "Arrow keys move the point by 0.05, with Shift by 0.01.");
keys.id = "weight-pad-keys";
const weights = make("ul", "weights", root);
weights.setAttribute("aria-label", "Weights");

// A name, which is cut if it is long, and a number, which is not.
function named(label) {
  make("span", "", label);
  make("span", "", label);
  return label;
}

function call(label, id, number) {
  label.children[0].textContent = titleOf(id);
  label.children[1].textContent = number;
}

function selector(text, options, value, onChange) {
  const label = make("label", "choice", choices);
  make("span", "", label, text);
  const select = make("select", "", label);
  select.setAttribute("aria-label", text);
  for (const [key, title] of options) make("option", "", select, title).value = key;
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
}

function numberField(parent, label, value, onNumber) {
  const input = make("input", "number", parent);
  Object.assign(input, { type: "number", min: LOWEST, max: HIGHEST, step: STEP, value });
  input.setAttribute("aria-label", label);
  input.addEventListener("input", () => {
    const typed = input.valueAsNumber;
    const good = Number.isFinite(typed) && typed >= LOWEST && typed <= HIGHEST;
    input.setAttribute("aria-invalid", String(!good));
    if (good) onNumber(typed);
  });
  input.addEventListener("change", () => {
    if (Number.isFinite(input.valueAsNumber)) onNumber(clamped(input.valueAsNumber, LOWEST, HIGHEST));
    input.setAttribute("aria-invalid", "false");
    place(null);
  });
  return input;
}

// Each adapter in one place: who takes another's place gives it his own.
function choose(kind, index, id) {
  const places = chosen[kind];
  const other = places.indexOf(id);
  if (id && other >= 0) places[other] = places[index];
  places[index] = id;
  shape = "";
  update();
}

function build() {
  const focused = root.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  choices.replaceChildren();
  for (const part of [choices, frame]) part.classList.toggle("four", four);
  strengthField = null;
  const options = acting().map((card) => [card.id, labelOf(card)]);
  if (four) {
    const corners = [["", "nothing (the base model)"], ...options];
    CORNERS.forEach((name, index) => selector(name, corners, chosen.corners[index], (id) => choose("corners", index, id)));
    const label = make("label", "choice", choices);
    make("span", "", label, "Total strength");
    strengthField = numberField(label, "Total strength", strength, (number) => {
      strength = number;
      setPoint(...point, strengthField);
    });
  } else {
    AXES.forEach((name, index) => selector(name, options, chosen.axes[index], (id) => choose("axes", index, id)));
    const ranges = Object.keys(RANGES).map((name) => [name, name.replace("-", "\u2212")]);
    const now = Object.keys(RANGES).find((name) => RANGES[name] === range);
    selector("Shown range", ranges, now, (name) => {
      range = RANGES[name];
      place(null);
    });
  }
  weights.replaceChildren();
  fields = new Map();
  for (const card of cards) {
    const item = make("li", card.on ? "" : "off", weights);
    const text = make("span", "adapter", item);
    make("span", "title", text, labelOf(card));
    if (card.trigger) make("code", "", text, card.trigger);
    if (!card.on) make("span", "state", text, "off");
    const field = numberField(item, `Weight of ${card.name}`, card.weight, (number) => {
      tell({ [card.id]: number }, field);
      follow();
      place(field);
    });
    fields.set(card.id, field);
  }
  if (focused) [...root.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
}

// Where the point is, and what it says; all fields but the one that is typed into.
function place(except) {
  const [lowest, highest] = range;
  const share = (weight) => (weight - lowest) / (highest - lowest);
  const [x, y] = four ? point : [share(weightOf(chosen.axes[0])), 1 - share(weightOf(chosen.axes[1]))];
  thumb.style.left = `${100 * clamped(x, 0, 1)}%`;
  thumb.style.top = `${100 * clamped(y, 0, 1)}%`;
  const away = four ? !isAt(point, strength, cornerWeights()) : [x, y].some((one) => one < -CLOSE || one > 1 + CLOSE);
  thumb.classList.toggle("away", away);
  const text = slots().filter(Boolean).map((id) => `${titleOf(id)} ${shown(weightOf(id))}`).join(", ");
  thumb.setAttribute("aria-valuetext", away ? `${text}; the point can't show these weights` : text);
  thumb.setAttribute("aria-valuemin", four ? 0 : lowest);
  thumb.setAttribute("aria-valuemax", four ? 1 : highest);
  thumb.setAttribute("aria-valuenow", four ? x : clamped(weightOf(chosen.axes[0]), lowest, highest));
  const [first, second] = chosen.axes.map(titleOf);
  thumb.setAttribute("aria-label", four ? "Weights of the adapters in the corners" : `Weights of ${first} and ${second}`);
  for (const line of lines) {
    const at = share(Number(line.dataset.weight));
    line.hidden = four || at <= 0 || at >= 1;
    line.style.setProperty("--at", line.dataset.axis === "x" ? at : 1 - at);
  }
  pad.style.setProperty("--cells", four ? 10 : CELLS[highest - lowest]);
  labels.forEach((label, index) => {
    const id = chosen.corners[index];
    label.hidden = !four;
    call(label, id, id ? shown(weightOf(id)) : "");
  });
  axisNames.forEach((name, index) => {
    const id = chosen.axes[index];
    name.hidden = four;
    call(name, id, `${shown(weightOf(id))} \u2192`);
  });
  for (const [id, field] of fields) if (field !== except) field.value = shown(weightOf(id));
  if (strengthField && strengthField !== except) strengthField.value = shown(strength);
}

// Change weights: on the cards of Generate by the event, which asks the server nothing.
function tell(changes, except = null) {
  if (cards.some((card) => card.id in changes && changes[card.id] !== card.weight)) {
    cards = cards.map((card) => (card.id in changes ? { ...card, weight: changes[card.id] } : card));
    changedAt = performance.now();
    props.value = cards;
    trigger("weigh");
  }
  place(except);
}

function setPoint(x, y, except = null) {
  point = [x, y].map((one) => clamped(rounded(one), 0, 1));
  const weights = cornerShares(point).map((share) => rounded(share * strength));
  const placed = chosen.corners.map((id, index) => [id, weights[index]]).filter(([id]) => id);
  tell(Object.fromEntries(placed), except);
}

function cornerWeights() {
  return chosen.corners.map((id) => (id ? weightOf(id) : null));
}

// Let the point follow weights that were set elsewhere, if there is one that gives them.
function follow() {
  const weights = cornerWeights();
  const found = isAt(point, strength, weights) ? null : pointOf(weights, strength);
  if (found && isAt(...found, weights)) [point, strength] = found;
}

function moveTo(across, along, step) {
  if (four) return setPoint(snapped(across, step), snapped(along, step));
  const [lowest, highest] = range;
  const values = [across, 1 - along].map((share) => snapped(lowest + clamped(share, 0, 1) * (highest - lowest), step));
  tell(Object.fromEntries(chosen.axes.map((id, index) => [id, values[index]])));
}

function moveBy(right, up) {
  if (four) return setPoint(point[0] + right, point[1] - up);
  const values = [right, up].map((by, index) => rounded(clamped(weightOf(chosen.axes[index]) + by, ...range)));
  const changes = { [chosen.axes[0]]: values[0], [chosen.axes[1]]: values[1] };
  if (!right) delete changes[chosen.axes[0]];
  if (!up) delete changes[chosen.axes[1]];
  tell(changes);
}

function drag(event) {
  const box = pad.getBoundingClientRect();
  const step = event.shiftKey ? FINE_STEP : STEP;
  moveTo((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, step);
}

pad.addEventListener("pointerdown", (event) => {
  if (!usable() || event.button !== 0 || pointer !== null) return;
  event.preventDefault();
  pointer = event.pointerId;
  pad.setPointerCapture(pointer);
  thumb.focus({ preventScroll: true });
  drag(event);
});
pad.addEventListener("pointermove", (event) => {
  if (event.pointerId === pointer) drag(event);
});
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  pad.addEventListener(end, (event) => {
    if (event.pointerId === pointer) pointer = null;
  });
}
thumb.addEventListener("keydown", (event) => {
  if (!usable() || event.altKey || event.ctrlKey || event.metaKey) return;
  const step = event.shiftKey ? FINE_STEP : STEP;
  const whole = HIGHEST - LOWEST;
  const moves = {
    ArrowLeft: [-step, 0],
    ArrowRight: [step, 0],
    ArrowUp: [0, step],
    ArrowDown: [0, -step],
    PageUp: [0, LARGE_STEP],
    PageDown: [0, -LARGE_STEP],
    Home: [-whole, 0],
    End: [whole, 0],
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  moveBy(...moves[event.key]);
});

// Chosen are adapters that act; free places go to those that have none, of corners to new ones alone.
function settle() {
  const ids = acting().map((card) => card.id);
  const newcomers = ids.filter((id) => !known.has(id));
  for (const [places, candidates] of [
    [chosen.axes, ids],
    [chosen.corners, newcomers],
  ]) {
    places.forEach((id, index) => {
      if (!ids.includes(id)) places[index] = "";
    });
    const free = candidates.filter((id) => !places.includes(id));
    places.forEach((id, index) => {
      if (!id) places[index] = free.shift() ?? "";
    });
  }
  known = new Set(ids);
}

function update() {
  settle();
  follow();
  const now = JSON.stringify([four, chosen, cards.map((card) => [card.id, card.on, labelOf(card), card.trigger])]);
  if (now !== shape) build();
  shape = now;
  const few = acting().length < 2;
  note.hidden = !few;
  note.textContent = cards.length
    ? "The pad takes two adapters that are on. Add another one, or switch one on, on Generate."
    : "No adapter yet. Train one, or add some to Generate from the library; their weights can then be set here, too.";
  for (const part of [modes, choices, frame, keys]) part.hidden = few;
  weights.hidden = cards.length === 0;
  place(root.contains(document.activeElement) && document.activeElement.matches(".number") ? document.activeElement : null);
}

// Own changes come back by way of the cards. While more of them are on the way, the pad knows better.
let waiting = 0;
function receive() {
  clearTimeout(waiting);
  const quiet = performance.now() - changedAt;
  if (pointer !== null || quiet < SETTLED) {
    waiting = setTimeout(receive, SETTLED);
    return;
  }
  cards = Array.isArray(props.value) ? props.value : [];
  update();
}

receive();
watch("value", receive);
