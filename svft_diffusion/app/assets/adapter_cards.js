// The cards of a visitor's adapters. Gradio provides element, props and watch; see components/adapter_cards.py.
// Everything that comes from files is put into the page as text, never as markup.
const LOWEST = -10;
const HIGHEST = 10;
const STEP = 0.05;
const FINE_STEP = 0.01;
const root = element.querySelector(".adapter-cards");
let shown = null; // the value that the page shows, to tell one's own changes from those of the server

const list = make("ul", "cards", root);
list.setAttribute("aria-label", "Adapters");
const empty = make("p", "empty", root, "No adapter yet: the base model draws alone. Add adapters from the library; Train makes one, and Library imports some.");
const news = make("p", "for-screen-readers", root);
news.setAttribute("role", "status");

function make(tag, className, parent, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function cards() {
  return Array.isArray(props.value) ? props.value : [];
}

function cardOf(id) {
  return cards().find((card) => card.id === id);
}

function tell(value) {
  shown = JSON.stringify(value);
  props.value = value;
}

function change(id, fields) {
  tell(cards().map((card) => (card.id === id ? { ...card, ...fields } : card)));
}

function clamped(number) {
  return Number(Math.min(HIGHEST, Math.max(LOWEST, number)).toFixed(4));
}

// A slider and a number field for one weight. The field takes more than the slider shows.
function weightInputs(parent, label, lowest, highest, part, get, set) {
  const row = make("div", "weight", parent);
  const slider = make("input", "slider", row);
  const number = make("input", "number", row);
  Object.assign(slider, { type: "range", min: lowest, max: highest, step: FINE_STEP });
  Object.assign(number, { type: "number", min: LOWEST, max: HIGHEST, step: STEP });
  slider.setAttribute("aria-label", label);
  number.setAttribute("aria-label", `${label}, as a number`);
  slider.dataset.part = `${part} slider`;
  number.dataset.part = `${part} number`;
  slider.title = `${label}. Ctrl+Up or Ctrl+Down: ${STEP}, with Shift ${FINE_STEP}`;
  const show = (weight, except) => {
    if (except !== slider) slider.value = weight;
    if (except !== number) number.value = weight;
    number.setAttribute("aria-invalid", "false");
    const part = (Math.min(highest, Math.max(lowest, weight)) - lowest) / (highest - lowest);
    slider.style.setProperty("--filled", `${100 * part}%`);
  };
  const commit = (weight, source) => {
    set(weight);
    show(weight, source);
  };
  for (const input of [slider, number]) input.setAttribute("aria-keyshortcuts", "Control+ArrowUp Control+ArrowDown");
  slider.addEventListener("input", () => commit(clamped(Math.round(Number(slider.value) / STEP) * STEP), slider));
  number.addEventListener("input", () => {
    const typed = number.valueAsNumber;
    const usable = Number.isFinite(typed) && typed >= LOWEST && typed <= HIGHEST;
    if (usable) commit(typed, number);
    else number.setAttribute("aria-invalid", "true");
  });
  number.addEventListener("change", () => {
    const typed = number.valueAsNumber;
    commit(Number.isFinite(typed) ? clamped(typed) : get());
  });
  row.addEventListener("keydown", (event) => {
    const withControl = event.ctrlKey || event.metaKey;
    const onSlider = event.target === slider && !event.altKey;
    const up = event.key === "ArrowUp" || (event.key === "ArrowRight" && onSlider);
    const down = event.key === "ArrowDown" || (event.key === "ArrowLeft" && onSlider);
    if (!(up || down) || !(withControl || onSlider)) return;
    event.preventDefault();
    event.stopPropagation();
    commit(clamped(get() + (up ? 1 : -1) * (event.shiftKey ? FINE_STEP : STEP)));
  });
  show(get());
}

function picture(card, parent) {
  const frame = make("div", "thumbnail", parent);
  frame.setAttribute("aria-hidden", "true");
  if (String(card.thumbnail).startsWith("data:image/")) {
    const image = make("img", "", frame);
    image.src = card.thumbnail;
    image.alt = "";
  } else {
    frame.textContent = String(card.title || "?").slice(0, 1).toUpperCase();
  }
}

function heading(card, parent) {
  const line = make("div", "heading", parent);
  make("strong", "title", line, card.title).title = card.name;
  if (card.title !== card.name) make("span", "name", line, card.name);
  if (!card.trigger) return;
  const trigger = make("button", "trigger", line, card.trigger);
  Object.assign(trigger, { type: "button", title: "Insert into the prompt" });
  trigger.setAttribute("aria-label", `Insert ${card.trigger} into the prompt`);
  trigger.dataset.part = "trigger";
  trigger.addEventListener("click", () => {
    window.dispatchEvent(new CustomEvent("svft-insert", { detail: { text: card.trigger } }));
  });
}

function onOff(card, parent, item) {
  const label = make("label", "switch", parent);
  const input = make("input", "", label);
  Object.assign(input, { type: "checkbox", checked: card.on, title: "On or off" });
  input.setAttribute("role", "switch");
  input.setAttribute("aria-label", `${card.name} acts`);
  input.dataset.part = "on";
  make("span", "track", label);
  input.addEventListener("change", () => {
    change(card.id, { on: input.checked });
    item.classList.toggle("off", !input.checked);
  });
}

function remover(card, parent) {
  const button = make("button", "remove", parent, "\u00d7");
  Object.assign(button, { type: "button", title: "Remove" });
  button.setAttribute("aria-label", `Remove ${card.name}`);
  button.dataset.part = "remove";
  button.addEventListener("click", () => {
    const place = cards().findIndex((other) => other.id === card.id);
    tell(cards().filter((other) => other.id !== card.id));
    draw();
    news.textContent = `${card.name} removed`;
    const buttons = list.querySelectorAll(".remove");
    buttons[Math.min(place, buttons.length - 1)]?.focus();
  });
}

function details(card, parent) {
  const parts = card.parts || [];
  const presets = card.presets || [];
  if (parts.length < 2 && presets.length < 2) return;
  const more = make("details", "more", parent);
  const summary = make("summary", "", more, "Parts of the model");
  summary.dataset.part = "more";
  for (const [part, title] of parts) {
    const line = make("div", "part", more);
    make("span", "part-title", line, title);
    const shares = () => ({ ...Object.fromEntries(parts.map(([name]) => [name, 1])), ...cardOf(card.id)?.components });
    weightInputs(
      line, `Share of the weight in the ${title}, for ${card.name}`, 0, 1, part,
      () => shares()[part],
      (share) => {
        const changed = { ...shares(), [part]: share };
        change(card.id, { components: Object.values(changed).every((one) => one === 1) ? null : changed });
      },
    );
  }
  if (presets.length < 2) return;
  const label = make("label", "part", more);
  make("span", "part-title", label, "Blocks");
  const select = make("select", "blocks", label);
  select.setAttribute("aria-label", `Blocks in which ${card.name} acts`);
  select.dataset.part = "blocks";
  for (const [name, title] of presets) make("option", "", select, title).value = name;
  select.value = card.blocks;
  select.addEventListener("change", () => change(card.id, { blocks: select.value }));
}

function drawCard(card) {
  const item = make("li", "card", list);
  item.dataset.id = card.id;
  item.classList.toggle("off", !card.on);
  picture(card, item);
  heading(card, item);
  const buttons = make("div", "buttons", item);
  onOff(card, buttons, item);
  remover(card, buttons);
  weightInputs(
    item, `Weight of ${card.name}`, card.lowest, card.highest, "weight",
    () => cardOf(card.id)?.weight ?? 0,
    (weight) => change(card.id, { weight }),
  );
  details(card, item);
  if (card.warning) make("p", "warning", item, card.warning).setAttribute("role", "alert");
}

function draw() {
  const open = new Set([...list.querySelectorAll("details[open]")].map((more) => more.closest("li").dataset.id));
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const place = focused && [focused.closest("li").dataset.id, focused.dataset.part];
  list.replaceChildren();
  cards().forEach(drawCard);
  empty.hidden = cards().length > 0;
  for (const item of list.children) {
    const more = item.querySelector("details");
    if (more && open.has(item.dataset.id)) more.open = true;
    if (place && item.dataset.id === place[0]) item.querySelector(`[data-part="${place[1]}"]`)?.focus();
  }
}

draw();
watch("value", () => {
  if (JSON.stringify(props.value) !== shown) draw();
  shown = JSON.stringify(props.value);
});
