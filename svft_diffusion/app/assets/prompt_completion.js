// Names of adapters in the prompt: after "<adapter:" a list of those in the library, which came with the page.
// Gradio provides element, props and watch. Names come from files: they are put into the page as text.
const WEIGHT_STEP = 0.05;
const FINE_STEP = 0.01;
const MOST_SHOWN = 8;
const OPEN_TAG = /<adapter:([^<>:]*)$/i;
const TAG = /<adapter:[^<>:]*(?::([^<>]*))?>/gi;

const list = document.createElement("ul");
list.id = "prompt-completion";
list.setAttribute("role", "listbox");
list.setAttribute("aria-label", "Adapters of the library");
list.hidden = true;
let field = null;
let names = [];
let chosen = 0;

function insert(start, end, text) {
  field.setRangeText(text, start, end, "end");
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

function openTag() {
  return field.selectionStart === field.selectionEnd ? OPEN_TAG.exec(field.value.slice(0, field.selectionStart)) : null;
}

function close() {
  list.hidden = true;
  field?.removeAttribute("aria-activedescendant");
}

function matching(typed) {
  const wanted = typed.trim().toLowerCase();
  const all = Array.isArray(props.value) ? props.value : [];
  const found = all.filter((one) => `${one.name} ${one.title}`.toLowerCase().includes(wanted));
  const begins = (one) => one.name.toLowerCase().startsWith(wanted);
  return [...found.filter(begins), ...found.filter((one) => !begins(one))].slice(0, MOST_SHOWN);
}

function choose(index) {
  chosen = (index + names.length) % names.length;
  [...list.children].forEach((item, number) => item.setAttribute("aria-selected", String(number === chosen)));
  field.setAttribute("aria-activedescendant", list.children[chosen].id);
}

function offer() {
  const tag = openTag();
  names = tag ? matching(tag[1]) : [];
  if (!names.length) return close();
  list.replaceChildren(
    ...names.map((one, number) => {
      const item = document.createElement("li");
      item.id = `prompt-completion-${number}`;
      item.setAttribute("role", "option");
      item.textContent = one.title && one.title !== one.name ? `${one.name} (${one.title})` : one.name;
      item.addEventListener("mousedown", (event) => {
        event.preventDefault();
        accept(number);
      });
      return item;
    }),
  );
  list.hidden = false;
  choose(0);
}

function accept(number) {
  const tag = openTag();
  const end = field.selectionStart;
  const begin = end - tag[1].length;
  const rest = /^[^<>\s]*>/.exec(field.value.slice(end));
  insert(begin, end, rest ? names[number].name : `${names[number].name}:${names[number].weight}>`);
  close();
}

// Ctrl+Up and Ctrl+Down change the weight of the tag in which the caret is, as on the cards.
function nudge(up, fine) {
  for (const tag of field.value.matchAll(TAG)) {
    const end = tag.index + tag[0].length;
    if (field.selectionStart < tag.index || field.selectionStart > end) continue;
    const weight = tag[1] === undefined || !tag[1].trim() ? 1 : Number(tag[1]);
    if (!Number.isFinite(weight)) return false;
    const changed = Math.min(10, Math.max(-10, weight + (up ? 1 : -1) * (fine ? FINE_STEP : WEIGHT_STEP)));
    const text = `${Number(changed.toFixed(4))}`;
    const caret = tag.index + tag[0].length - 1 - (tag[1] === undefined ? 0 : tag[1].length + 1);
    insert(caret, end, `:${text}>`);
    field.setSelectionRange(caret + 1 + text.length, caret + 1 + text.length);
    return true;
  }
  return false;
}

function onKey(event) {
  const vertical = event.key === "ArrowUp" || event.key === "ArrowDown";
  if (vertical && (event.ctrlKey || event.metaKey)) {
    if (nudge(event.key === "ArrowUp", event.shiftKey)) event.preventDefault();
    return;
  }
  if (list.hidden || event.ctrlKey || event.metaKey) return;
  if (vertical) choose(chosen + (event.key === "ArrowDown" ? 1 : -1));
  else if (event.key === "Enter" || event.key === "Tab") accept(chosen);
  else if (event.key === "Escape") close();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function onInsert(event) {
  const text = String(event.detail.text);
  const before = field.value.slice(0, field.selectionStart);
  const after = field.value.slice(field.selectionEnd);
  const spaced = (before && !/\s$/.test(before) ? " " : "") + text + (after && !/^[\s,.]/.test(after) ? " " : "");
  insert(field.selectionStart, field.selectionEnd, spaced);
  field.focus();
}

function begin() {
  field = document.querySelector("#prompt textarea");
  if (!field) return void requestAnimationFrame(begin);
  element.querySelector(".completion").append(list);
  field.setAttribute("aria-autocomplete", "list");
  field.setAttribute("aria-controls", list.id);
  field.addEventListener("input", offer);
  field.addEventListener("click", offer);
  field.addEventListener("blur", close);
  field.addEventListener("keydown", onKey, true);
  window.addEventListener("svft-insert", onInsert);
}

begin();
